// SPDX-License-Identifier: Apache-2.0
#include "tiny_model.hpp"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "hf_model.hpp"
#include "qeft/core/half.hpp"
#include "qeft/io/safetensors.hpp"

namespace qeft_test {

namespace fs = std::filesystem;
using qeft::index_t;
using qeft_llm::model_config;
using qeft_llm::tensor_spec;

scratch_directory::scratch_directory() {
  std::random_device random;  // names only; contents never depend on it
  do {
    path_ = fs::temp_directory_path() / ("qeft-test-" + std::to_string(random()));
  } while (!fs::create_directory(path_));
}

scratch_directory::~scratch_directory() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

namespace {

/// GPT-2's alphabet: the character that stands for a byte.
std::string byte_character(int b) {
  const auto printable = [](int c) {
    return (c >= 0x21 && c <= 0x7e) || (c >= 0xa1 && c <= 0xac) || (c >= 0xae && c <= 0xff);
  };
  int code = b;
  if (!printable(b)) {
    code = 256;
    for (int c = 0; c < b; ++c) code += printable(c) ? 0 : 1;
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3f))};
}

index_t count_of(const tensor_spec& t) {
  index_t n = 1;
  for (const index_t s : t.shape) n *= s;
  return n;
}

}  // namespace

void write_tiny_model(const fs::path& directory, const tiny_options& options) {
  fs::create_directories(directory);
  const nlohmann::json config = {{"model_type", options.biases ? "qwen2" : "llama"},
                                 {"hidden_size", 96},
                                 {"intermediate_size", 160},
                                 {"num_hidden_layers", 2},
                                 {"num_attention_heads", 6},
                                 {"num_key_value_heads", 2},
                                 {"head_dim", 16},
                                 {"hidden_act", "silu"},
                                 {"rms_norm_eps", 1e-5},
                                 {"rope_theta", 10000.0},
                                 {"vocab_size", 256},
                                 {"max_position_embeddings", 128},
                                 {"tie_word_embeddings", options.tied}};
  std::ofstream(directory / "config.json") << config.dump(2);

  nlohmann::json vocabulary = nlohmann::json::object();
  for (int b = 0; b < 256; ++b) vocabulary[byte_character(b)] = b;
  const nlohmann::json tokenizer = {
      {"version", "1.0"},
      {"added_tokens", nlohmann::json::array()},
      {"normalizer", nullptr},
      {"pre_tokenizer",
       {{"type", "ByteLevel"},
        {"add_prefix_space", false},
        {"trim_offsets", true},
        {"use_regex", true}}},
      {"post_processor", nullptr},
      {"decoder",
       {{"type", "ByteLevel"},
        {"add_prefix_space", true},
        {"trim_offsets", true},
        {"use_regex", true}}},
      {"model",
       {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", nlohmann::json::array()}}}};
  std::ofstream(directory / "tokenizer.json") << tokenizer.dump();

  std::mt19937 rng(options.seed);
  std::normal_distribution<float> normal;
  qeft::io::safetensors_writer writer(std::map<std::string, std::string>{{"format", "pt"}});
  for (const tensor_spec& t : expected_tensors(qeft_llm::read_config(directory))) {
    const bool is_norm = t.name.find("norm") != std::string::npos;
    const float scale =
        t.shape.size() == 1 ? 0.1F : 1.0F / std::sqrt(static_cast<float>(t.shape[1]));
    std::vector<std::byte> bytes(static_cast<std::size_t>(2 * count_of(t)));
    for (index_t i = 0; i < count_of(t); ++i) {
      float x = normal(rng) * scale + (is_norm ? 1.0F : 0.0F);
      // Some channels of the stream are large: what weak columns are for.
      if (is_norm && i % 29 == 7) x *= 8;
      const auto half = qeft::from_float<qeft::half_bits>(x);
      std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
    writer.add(t.name, qeft::io::dtype::f16, t.shape, std::move(bytes));
  }
  writer.write_directory(directory);
}

tensor_map read_tensors(const fs::path& directory) {
  const qeft_llm::hf_weights weights(directory);
  tensor_map tensors;
  for (const tensor_spec& t : expected_tensors(qeft_llm::read_config(directory))) {
    tensors[t.name] = weights.read(t.name, t.shape);
  }
  return tensors;
}

void write_tensors(const fs::path& from, const fs::path& to, const tensor_map& tensors) {
  fs::create_directories(to);
  for (const char* file : {"config.json", "tokenizer.json"}) {
    fs::copy_file(from / file, to / file, fs::copy_options::overwrite_existing);
  }
  qeft::io::safetensors_writer writer(std::map<std::string, std::string>{{"format", "pt"}});
  for (const tensor_spec& t : expected_tensors(qeft_llm::read_config(from))) {
    const auto& values = tensors.at(t.name);
    writer.add(t.name, qeft::io::dtype::f32, t.shape,
               qeft::span<const std::byte>(reinterpret_cast<const std::byte*>(values.data()),
                                           4 * static_cast<index_t>(values.size())));
  }
  writer.write_directory(to);
}

std::vector<double> reference_logits(const model_config& c, const tensor_map& tensors,
                                     const std::vector<int>& tokens) {
  using vec = std::vector<double>;
  const std::size_t n = tokens.size();
  const auto hidden = static_cast<std::size_t>(c.hidden_size);
  const auto heads = static_cast<std::size_t>(c.num_attention_heads);
  const auto value_heads = static_cast<std::size_t>(c.num_key_value_heads);
  const auto dim = static_cast<std::size_t>(c.head_dim);

  const auto linear = [&](const std::string& name, const vec& x) {
    const auto& w = tensors.at(name + ".weight");
    const std::size_t oc = w.size() / x.size();
    vec y(oc, 0.0);
    const auto bias = tensors.find(name + ".bias");
    for (std::size_t o = 0; o < oc; ++o) {
      if (bias != tensors.end()) y[o] = static_cast<double>(bias->second[o]);
      for (std::size_t i = 0; i < x.size(); ++i) {
        y[o] += static_cast<double>(w[o * x.size() + i]) * x[i];
      }
    }
    return y;
  };
  const auto norm = [&](const std::string& name, const vec& x) {
    const auto& w = tensors.at(name + ".weight");
    double square = 0;
    for (const double v : x) square += v * v;
    const double r = 1 / std::sqrt(square / static_cast<double>(x.size()) + c.rms_norm_eps);
    vec y(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] * r * static_cast<double>(w[i]);
    return y;
  };
  const auto rotate = [&](vec& x, std::size_t position) {
    for (std::size_t h = 0; h < x.size(); h += dim) {
      for (std::size_t i = 0; i < dim / 2; ++i) {
        const double angle =
            static_cast<double>(position) *
            std::pow(c.rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
        const double a = x[h + i];
        const double b = x[h + i + dim / 2];
        x[h + i] = a * std::cos(angle) - b * std::sin(angle);
        x[h + i + dim / 2] = b * std::cos(angle) + a * std::sin(angle);
      }
    }
  };

  std::vector<vec> stream;
  const auto& embedding = tensors.at("model.embed_tokens.weight");
  for (const int id : tokens) {
    const auto row = embedding.begin() + static_cast<std::ptrdiff_t>(id * c.hidden_size);
    stream.emplace_back(row, row + static_cast<std::ptrdiff_t>(hidden));
  }
  for (index_t l = 0; l < c.num_hidden_layers; ++l) {
    const std::string block = "model.layers." + std::to_string(l);
    std::vector<vec> q(n);
    std::vector<vec> k(n);
    std::vector<vec> v(n);
    for (std::size_t t = 0; t < n; ++t) {
      const vec x = norm(block + ".input_layernorm", stream[t]);
      q[t] = linear(block + ".self_attn.q_proj", x);
      k[t] = linear(block + ".self_attn.k_proj", x);
      v[t] = linear(block + ".self_attn.v_proj", x);
      rotate(q[t], t);
      rotate(k[t], t);
    }
    for (std::size_t t = 0; t < n; ++t) {
      vec mixed(heads * dim, 0.0);
      for (std::size_t h = 0; h < heads; ++h) {
        const std::size_t from = h / (heads / value_heads) * dim;
        vec weight(t + 1);
        double sum = 0;
        for (std::size_t s = 0; s <= t; ++s) {
          double dot = 0;
          for (std::size_t i = 0; i < dim; ++i) dot += q[t][h * dim + i] * k[s][from + i];
          weight[s] = std::exp(dot / std::sqrt(static_cast<double>(dim)));
          sum += weight[s];
        }
        for (std::size_t s = 0; s <= t; ++s) {
          for (std::size_t i = 0; i < dim; ++i) {
            mixed[h * dim + i] += weight[s] / sum * v[s][from + i];
          }
        }
      }
      const vec o = linear(block + ".self_attn.o_proj", mixed);
      for (std::size_t i = 0; i < hidden; ++i) stream[t][i] += o[i];
      const vec x = norm(block + ".post_attention_layernorm", stream[t]);
      vec inner = linear(block + ".mlp.gate_proj", x);
      const vec up = linear(block + ".mlp.up_proj", x);
      for (std::size_t i = 0; i < inner.size(); ++i) inner[i] *= up[i] / (1 + std::exp(-inner[i]));
      const vec down = linear(block + ".mlp.down_proj", inner);
      for (std::size_t i = 0; i < hidden; ++i) stream[t][i] += down[i];
    }
  }
  std::vector<double> logits;
  for (const vec& x : stream) {
    const vec y = linear(c.tie_word_embeddings ? "model.embed_tokens" : "lm_head",
                         norm("model.norm", x));
    logits.insert(logits.end(), y.begin(), y.end());
  }
  return logits;
}

}  // namespace qeft_test
