// SPDX-License-Identifier: Apache-2.0
#include "reference_model.hpp"

#include <cstring>

#include "qeft/core/half.hpp"
#include "support/sweep.hpp"
#include "unit/io/temporary_directory.hpp"

namespace qeft_test {

using nlohmann::json;
using qeft::index_t;
using qeft::io::dtype;
using qeft_llm::model_config;
using qeft_llm::rope_config;
using qeft_llm::rope_scaling;
using qeft_llm::tensor_spec;

namespace {

using values = std::vector<double>;

void add(std::vector<values>& x, const std::vector<values>& y) {
  for (std::size_t t = 0; t < x.size(); ++t) {
    for (std::size_t i = 0; i < x[t].size(); ++i) x[t][i] += y[t][i];
  }
}

/// The frequency of pair i, as the model cards of Llama 3.1 word it: by wavelengths.
double frequency(const model_config& c, std::size_t i) {
  const rope_config& r = c.rope;
  const double f =
      1 / std::pow(r.theta, 2 * static_cast<double>(i) / static_cast<double>(c.head_dim));
  if (r.scaling == rope_scaling::none) return f;
  if (r.scaling == rope_scaling::linear) return f / r.factor;
  const auto context = static_cast<double>(r.original_max_position_embeddings);
  const double wavelength = 2 * std::acos(-1.0) / f;
  if (wavelength < context / r.high_freq_factor) return f;
  if (wavelength > context / r.low_freq_factor) return f / r.factor;
  const double smooth =
      (context / wavelength - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
  return (1 - smooth) * f / r.factor + smooth * f;
}

}  // namespace

reference_model::rows reference_model::norm(const rows& x, const std::string& name) const {
  const values& weight = tensors.at(name + ".weight");
  rows y = x;
  for (values& row : y) {
    double squares = 0;
    for (const double v : row) squares += v * v;
    const double rms = std::sqrt(squares / static_cast<double>(row.size()) + config.rms_norm_eps);
    for (std::size_t i = 0; i < row.size(); ++i) row[i] *= weight[i] / rms;
  }
  return y;
}

reference_model::rows reference_model::linear(const rows& x, const std::string& name) const {
  const values& weight = tensors.at(name + ".weight");
  const auto bias = tensors.find(name + ".bias");
  const std::size_t in = x[0].size();
  const std::size_t out = weight.size() / in;
  rows y(x.size(), values(out));
  for (std::size_t t = 0; t < x.size(); ++t) {
    for (std::size_t n = 0; n < out; ++n) {
      double sum = bias == tensors.end() ? 0.0 : bias->second[n];
      for (std::size_t i = 0; i < in; ++i) sum += x[t][i] * weight[n * in + i];
      y[t][n] = sum;
    }
  }
  return y;
}

void reference_model::rotate(rows& x) const {
  const auto dim = static_cast<std::size_t>(config.head_dim);
  for (std::size_t i = 0; i < dim / 2; ++i) {
    const double f = frequency(config, i);
    for (std::size_t t = 0; t < x.size(); ++t) {
      const double angle = static_cast<double>(t) * f;
      for (std::size_t head = 0; head < x[t].size(); head += dim) {
        double& a = x[t][head + i];
        double& b = x[t][head + i + dim / 2];
        const double rotated = a * std::cos(angle) - b * std::sin(angle);
        b = b * std::cos(angle) + a * std::sin(angle);
        a = rotated;
      }
    }
  }
}

reference_model::rows reference_model::attention(const rows& x, const std::string& block,
                                                 index_t layer) const {
  rows q = linear(x, block + "q_proj");
  rows k = linear(x, block + "k_proj");
  const rows v = linear(x, block + "v_proj");
  rotate(q);
  rotate(k);
  const auto dim = static_cast<std::size_t>(config.head_dim);
  const auto heads = static_cast<std::size_t>(config.num_attention_heads);
  const std::size_t shared = heads / static_cast<std::size_t>(config.num_key_value_heads);
  const auto window = static_cast<std::size_t>(config.window_of(layer));
  rows mixed(x.size(), values(heads * dim, 0.0));
  for (std::size_t t = 0; t < x.size(); ++t) {
    for (std::size_t h = 0; h < heads; ++h) {
      const std::size_t g = h / shared;
      double sum = 0;
      for (std::size_t s = 0; s <= t; ++s) {
        if (window > 0 && s + window <= t) continue;
        double score = 0;
        for (std::size_t i = 0; i < dim; ++i) score += q[t][h * dim + i] * k[s][g * dim + i];
        const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
        sum += weight;
        for (std::size_t i = 0; i < dim; ++i) mixed[t][h * dim + i] += weight * v[s][g * dim + i];
      }
      for (std::size_t i = 0; i < dim; ++i) mixed[t][h * dim + i] /= sum;
    }
  }
  return linear(mixed, block + "o_proj");
}

reference_model::rows reference_model::mlp(const rows& x, const std::string& block) const {
  rows inner = linear(x, block + "gate_proj");
  const rows up = linear(x, block + "up_proj");
  for (std::size_t t = 0; t < inner.size(); ++t) {
    for (std::size_t i = 0; i < inner[t].size(); ++i) {
      inner[t][i] *= up[t][i] / (1 + std::exp(-inner[t][i]));
    }
  }
  return linear(inner, block + "down_proj");
}

std::vector<double> reference_model::logits(const std::vector<int>& tokens) const {
  const values& embedding = tensors.at("model.embed_tokens.weight");
  rows x;
  for (const int token : tokens) {
    const auto first = embedding.begin() + token * config.hidden_size;
    x.emplace_back(first, first + config.hidden_size);
  }
  for (index_t l = 0; l < config.num_hidden_layers; ++l) {
    const std::string block = "model.layers." + std::to_string(l) + ".";
    add(x, attention(norm(x, block + "input_layernorm"), block + "self_attn.", l));
    add(x, mlp(norm(x, block + "post_attention_layernorm"), block + "mlp."));
  }
  const std::string head = config.tie_word_embeddings ? "model.embed_tokens" : "lm_head";
  values all;
  for (const values& row : linear(norm(x, "model.norm"), head)) {
    all.insert(all.end(), row.begin(), row.end());
  }
  return all;
}

double reference_model::loss(const std::vector<int>& tokens,
                             const std::vector<char>& counted) const {
  const values all = logits(tokens);
  double total = 0;
  for (std::size_t t = 1; t < tokens.size(); ++t) {
    if (counted[t] == 0) continue;
    const double* row = all.data() + static_cast<index_t>(t - 1) * config.vocab_size;
    double sum = 0;
    for (index_t id = 0; id < config.vocab_size; ++id) sum += std::exp(row[id]);
    total += std::log(sum) - row[tokens[t]];
  }
  return total;
}

double reference_model::loss(const std::vector<int>& tokens) const {
  std::vector<char> counted(tokens.size(), 1);
  counted[0] = 0;
  return loss(tokens, counted) / static_cast<double>(tokens.size() - 1);
}

json tiny_config(const json& changes) {
  json config = {
      {"model_type", "llama"},          {"hidden_act", "silu"},   {"hidden_size", 48},
      {"intermediate_size", 80},        {"num_hidden_layers", 3}, {"num_attention_heads", 6},
      {"num_key_value_heads", 2},       {"head_dim", 8},          {"vocab_size", 101},
      {"max_position_embeddings", 128}, {"rms_norm_eps", 1e-5},   {"rope_theta", 10000.0},
      {"tie_word_embeddings", true}};
  config.update(changes);
  return config;
}

tensor_map random_tensors(const model_config& config, dtype type, std::uint64_t seed) {
  random_source random(seed);
  tensor_map tensors;
  for (const tensor_spec& spec : expected_tensors(config)) {
    const bool is_matrix = spec.shape.size() == 2;
    const double mean = spec.name.find("norm") != std::string::npos ? 1.0 : 0.0;
    const double scale = is_matrix ? 1.5 / std::sqrt(static_cast<double>(spec.shape[1])) : 0.3;
    values& tensor = tensors[spec.name];
    tensor.resize(static_cast<std::size_t>(spec.shape[0] * (is_matrix ? spec.shape[1] : 1)));
    for (double& x : tensor) {
      auto rounded = static_cast<float>(random.real() * scale + mean);
      if (type == dtype::f16) rounded = to_float(qeft::from_float<qeft::half_bits>(rounded));
      x = static_cast<double>(rounded);
    }
  }
  return tensors;
}

void add_tensor(qeft::io::safetensors_writer& writer, const tensor_spec& spec,
                const std::vector<double>& values, dtype type) {
  std::vector<std::byte> bytes;
  const auto append = [&](const auto& x) {
    bytes.resize(bytes.size() + sizeof(x));
    std::memcpy(bytes.data() + bytes.size() - sizeof(x), &x, sizeof(x));
  };
  for (const double value : values) {
    const auto x = static_cast<float>(value);
    if (type == dtype::f16) {
      append(qeft::from_float<qeft::half_bits>(x));
    } else {
      append(x);
    }
  }
  writer.add(spec.name, type, spec.shape, std::move(bytes));
}

void write_tensors(const std::filesystem::path& directory, const reference_model& model,
                   dtype type) {
  qeft::io::safetensors_writer writer;
  for (const tensor_spec& spec : expected_tensors(model.config)) {
    add_tensor(writer, spec, model.tensors.at(spec.name), type);
  }
  writer.write(directory / "model.safetensors");
}

reference_model write_small_model(const std::filesystem::path& directory, json config,
                                  std::uint64_t seed) {
  std::filesystem::create_directories(directory);
  config.update({{"hidden_size", 96},
                 {"intermediate_size", 160},
                 {"num_hidden_layers", 2},
                 {"head_dim", 16}});
  config = tiny_config(config);
  write_all(directory / "config.json", config.dump());

  json letters = json::object();
  for (int i = 0; i < 26; ++i) letters[std::string(1, static_cast<char>('a' + i))] = i;
  const json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}};
  const json tokenizer = {
      {"added_tokens", json::array()},
      {"pre_tokenizer", byte_level},
      {"decoder", byte_level},
      {"model", {{"type", "BPE"}, {"vocab", letters}, {"merges", json::array()}}}};
  write_all(directory / "tokenizer.json", tokenizer.dump());

  reference_model model{qeft_llm::parse_config(config, "tiny"), {}};
  model.tensors = random_tensors(model.config, dtype::f16, seed);
  for (auto& [name, tensor] : model.tensors) {
    if (name.find("norm") == std::string::npos) continue;
    for (std::size_t i = 7; i < tensor.size(); i += 29) tensor[i] *= 8;
  }
  write_tensors(directory, model, dtype::f16);
  return model;
}

std::vector<int> random_tokens(const model_config& config, std::size_t count, std::uint64_t seed) {
  random_source random(seed);
  std::vector<int> tokens(count);
  for (int& token : tokens) token = static_cast<int>(random.integer(0, config.vocab_size - 1));
  return tokens;
}

}  // namespace qeft_test
