// SPDX-License-Identifier: Apache-2.0
// Gradient sensitivities against finite differences of a forward pass in double, written here on
// its own.
#include "gradient.hpp"

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "qeft/io/safetensors_writer.hpp"
#include "support/catch.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft_llm;
using namespace qeft_test;
using qeft::errc;
using qeft::index_t;
using qeft::io::dtype;

namespace {

using values = std::vector<double>;
using rows = std::vector<values>;  // one per token

/// Random weights, exact in FP32, in memory and in a directory.
struct random_model {
  model_config config;
  std::map<std::string, values> tensors;
  temporary_directory directory;

  random_model(const model_config& c, unsigned seed) : config(c) {
    std::mt19937 rng(seed);
    std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
    qeft::io::safetensors_writer writer;
    for (const tensor_spec& spec : expected_tensors(c)) {
      const bool is_matrix = spec.shape.size() == 2;
      const bool is_norm = spec.name.find("norm") != std::string::npos;
      const float scale = is_matrix ? 1.7F / std::sqrt(static_cast<float>(spec.shape[1])) : 0.3F;
      const index_t count = spec.shape[0] * (is_matrix ? spec.shape[1] : 1);
      std::vector<float> floats;
      for (index_t i = 0; i < count; ++i) {
        floats.push_back(uniform(rng) * scale + (is_norm ? 1.0F : 0.0F));
      }
      tensors[spec.name] = values(floats.begin(), floats.end());
      const auto* bytes = reinterpret_cast<const std::byte*>(floats.data());
      writer.add(spec.name, dtype::f32, spec.shape,
                 std::vector<std::byte>(bytes, bytes + floats.size() * sizeof(float)));
    }
    writer.write(directory / "model.safetensors");
  }

  hf_weights weights() const { return hf_weights(directory.path()); }
};

class reference {
 public:
  explicit reference(const random_model& model) : c_(model.config), tensors_(model.tensors) {}

  values& tensor(const std::string& name) { return tensors_.at(name); }

  /// Mean cross-entropy of predicting tokens[1..] each from those before it.
  double loss(const std::vector<int>& tokens) const {
    const values& embedding = tensors_.at("model.embed_tokens.weight");
    const auto width = static_cast<std::size_t>(c_.hidden_size);
    rows x;
    for (const int token : tokens) {
      const auto first = embedding.begin() + token * c_.hidden_size;
      x.emplace_back(first, first + c_.hidden_size);
    }
    for (index_t l = 0; l < c_.num_hidden_layers; ++l) {
      const std::string block = "model.layers." + std::to_string(l) + ".";
      const rows mixed = attention(norm(x, block + "input_layernorm"), block + "self_attn.");
      add(x, linear(mixed, block + "self_attn.o_proj"));
      const rows in = norm(x, block + "post_attention_layernorm");
      rows inner = linear(in, block + "mlp.gate_proj");
      const rows up = linear(in, block + "mlp.up_proj");
      for (std::size_t t = 0; t < inner.size(); ++t) {
        for (std::size_t i = 0; i < inner[t].size(); ++i) {
          inner[t][i] *= up[t][i] / (1 + std::exp(-inner[t][i]));
        }
      }
      add(x, linear(inner, block + "mlp.down_proj"));
    }
    x = norm(x, "model.norm");
    const values& head = c_.tie_word_embeddings ? embedding : tensors_.at("lm_head.weight");
    double total = 0;
    for (std::size_t t = 0; t + 1 < tokens.size(); ++t) {
      double sum = 0;
      double target = 0;
      for (int id = 0; id < c_.vocab_size; ++id) {
        double logit = 0;
        for (std::size_t i = 0; i < width; ++i) {
          logit += x[t][i] * head[static_cast<std::size_t>(id) * width + i];
        }
        sum += std::exp(logit);
        if (id == tokens[t + 1]) target = logit;
      }
      total += std::log(sum) - target;
    }
    return total / static_cast<double>(tokens.size() - 1);
  }

 private:
  static void add(rows& x, const rows& y) {
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t i = 0; i < x[t].size(); ++i) x[t][i] += y[t][i];
    }
  }

  rows norm(const rows& x, const std::string& name) const {
    const values& weight = tensors_.at(name + ".weight");
    rows y = x;
    for (values& row : y) {
      double squares = 0;
      for (const double v : row) squares += v * v;
      const double rms = std::sqrt(squares / static_cast<double>(row.size()) + c_.rms_norm_eps);
      for (std::size_t i = 0; i < row.size(); ++i) row[i] *= weight[i] / rms;
    }
    return y;
  }

  rows linear(const rows& x, const std::string& name) const {
    const values& weight = tensors_.at(name + ".weight");
    const auto bias = tensors_.find(name + ".bias");
    const std::size_t in = x[0].size();
    const std::size_t out = weight.size() / in;
    rows y(x.size(), values(out));
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t n = 0; n < out; ++n) {
        double sum = bias == tensors_.end() ? 0.0 : bias->second[n];
        for (std::size_t i = 0; i < in; ++i) sum += x[t][i] * weight[n * in + i];
        y[t][n] = sum;
      }
    }
    return y;
  }

  /// The frequency of pair i, as the model cards of Llama 3.1 word it: by wavelengths.
  double frequency(std::size_t i) const {
    const rope_config& r = c_.rope;
    const double f =
        1 / std::pow(r.theta, 2 * static_cast<double>(i) / static_cast<double>(c_.head_dim));
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

  void rotate(rows& x) const {
    const auto dim = static_cast<std::size_t>(c_.head_dim);
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t head = 0; head < x[t].size(); head += dim) {
        for (std::size_t i = 0; i < dim / 2; ++i) {
          const double angle = static_cast<double>(t) * frequency(i);
          double& a = x[t][head + i];
          double& b = x[t][head + i + dim / 2];
          const double rotated = a * std::cos(angle) - b * std::sin(angle);
          b = b * std::cos(angle) + a * std::sin(angle);
          a = rotated;
        }
      }
    }
  }

  rows attention(const rows& x, const std::string& block) const {
    rows q = linear(x, block + "q_proj");
    rows k = linear(x, block + "k_proj");
    const rows v = linear(x, block + "v_proj");
    rotate(q);
    rotate(k);
    const auto dim = static_cast<std::size_t>(c_.head_dim);
    const auto heads = static_cast<std::size_t>(c_.num_attention_heads);
    const std::size_t shared = heads / static_cast<std::size_t>(c_.num_key_value_heads);
    const auto window = static_cast<std::size_t>(c_.sliding_window);
    rows out(x.size(), values(heads * dim, 0.0));
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
          for (std::size_t i = 0; i < dim; ++i) out[t][h * dim + i] += weight * v[s][g * dim + i];
        }
        for (std::size_t i = 0; i < dim; ++i) out[t][h * dim + i] /= sum;
      }
    }
    return out;
  }

  const model_config& c_;
  std::map<std::string, values> tensors_;
};

/// Two blocks, grouped-query attention with heads * head_dim != hidden size, untied head.
model_config tiny() {
  model_config c;
  c.model_type = "llama";
  c.hidden_size = 12;
  c.intermediate_size = 10;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 4;
  c.vocab_size = 13;
  c.max_position_embeddings = 128;
  c.rms_norm_eps = 1e-5;
  return c;
}

model_config llama3() {
  model_config c = tiny();
  c.rope = {100.0, rope_scaling::llama3, 8.0, 1.0, 4.0, 32};
  return c;
}

model_config qwen2() {
  model_config c = tiny();
  c.rope = {50.0, rope_scaling::linear, 2.0};
  c.qkv_bias = true;
  c.tie_word_embeddings = true;
  return c;
}

model_config mistral() {
  model_config c = tiny();
  c.num_key_value_heads = 4;
  c.sliding_window = 5;
  c.o_bias = true;
  c.mlp_bias = true;
  return c;
}

std::vector<int> random_tokens(const model_config& c, std::size_t count, unsigned seed) {
  std::mt19937 rng(seed);
  std::vector<int> tokens;
  for (std::size_t t = 0; t < count; ++t) {
    tokens.push_back(static_cast<int>(rng() % static_cast<unsigned>(c.vocab_size)));
  }
  return tokens;
}

double relative_error(double x, double expected) { return std::abs(x - expected) / expected; }

/// Compares every `step`-th column of every linear.
void check_gradients(const random_model& model, const std::vector<std::vector<int>>& windows,
                     std::size_t step) {
  reference ref(model);
  std::size_t seen = 0;
  const column_sensitivities found = gradient_sensitivity(
      qeft::on_host(2), model.config, model.weights(), windows, [&](index_t sample, double loss) {
        CHECK(sample == static_cast<index_t>(seen));
        CHECK(relative_error(loss, ref.loss(windows[seen])) < 1e-5);
        ++seen;
      });
  CHECK(seen == windows.size());
  CHECK(found.size() == static_cast<std::size_t>(7 * model.config.num_hidden_layers));

  constexpr double h = 1e-4;
  for (const auto& [name, sensitivity] : found) {
    values& weight = ref.tensor(name + ".weight");
    const std::size_t columns = sensitivity.size();
    REQUIRE(weight.size() % columns == 0);
    for (std::size_t j = 0; j < columns; j += step) {
      double expected = 0;
      for (const std::vector<int>& window : windows) {
        for (std::size_t i = j; i < weight.size(); i += columns) {
          const double kept = std::exchange(weight[i], weight[i] + h);
          const double above = ref.loss(window);
          weight[i] = kept - h;
          const double below = ref.loss(window);
          weight[i] = kept;
          const double gradient = (above - below) / (2 * h);
          expected += gradient * gradient;
        }
      }
      INFO(name << " column " << j);
      CHECK(expected > 0);
      CHECK(relative_error(sensitivity[j], expected) < 1e-4);
    }
  }
}

}  // namespace

TEST_CASE("gradients equal finite differences", "[llm]") {
  const std::vector<std::pair<const char*, model_config>> cases = {
      {"llama3", llama3()}, {"qwen2", qwen2()}, {"mistral", mistral()}};
  for (const auto& [name, config] : cases) {
    INFO(name);
    const random_model model(config, 7);
    // Two samples of different length: each is squared by itself.
    check_gradients(model, {random_tokens(config, 9, 1), random_tokens(config, 6, 2)}, 1);
  }
}

TEST_CASE("gradients over more than one piece of rows", "[llm]") {
  model_config config = tiny();
  config.num_hidden_layers = 1;
  config.intermediate_size = 70;
  const random_model model(config, 8);
  check_gradients(model, {random_tokens(config, 70, 3)}, 23);
}

TEST_CASE("gradients do not depend on the number of threads", "[llm]") {
  model_config config = tiny();
  config.intermediate_size = 200;
  const random_model model(config, 9);
  const std::vector<std::vector<int>> windows = {random_tokens(config, 128, 4),
                                                 random_tokens(config, 65, 5)};
  const auto one = gradient_sensitivity(qeft::on_host(1), config, model.weights(), windows);
  for (const int threads : {2, 3, 8}) {
    CHECK(gradient_sensitivity(qeft::on_host(threads), config, model.weights(), windows) == one);
  }
}

TEST_CASE("gradients of bad samples are refused", "[llm]") {
  const random_model model(tiny(), 10);
  const auto refused = [&](const std::vector<int>& window) {
    return catch_error([&] {
      gradient_sensitivity(qeft::on_host(1), model.config, model.weights(), {{1, 2, 3}, window});
    });
  };
  CHECK(refused({1}).code == errc::invalid_argument);
  CHECK_THAT(refused({1}).message, contains("sample 1 has 1 tokens"));
  CHECK_THAT(refused(std::vector<int>(129, 0)).message, contains("between 2 and 128"));
  CHECK_THAT(refused({1, 13}).message, contains("holds token 13"));
  CHECK_THAT(refused({-1, 3}).message, contains("holds token -1"));

  // A model whose numbers overflow must not choose columns by NaN.
  model_config huge = tiny();
  huge.rms_norm_eps = std::numeric_limits<double>::quiet_NaN();
  CHECK(catch_error([&] {
          gradient_sensitivity(qeft::on_host(1), huge, model.weights(), {{1, 2, 3}});
        }).code == errc::not_finite);
}
