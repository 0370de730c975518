// SPDX-License-Identifier: Apache-2.0
// Gradient sensitivities against finite differences of a forward pass in double.
#include "gradient.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "reference_model.hpp"
#include "support/catch.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft_llm;
using namespace qeft_test;
using qeft::errc;
using qeft::index_t;
using qeft::io::dtype;

namespace {

/// Random weights, exact in FP16, in memory and in a directory.
struct random_model : reference_model {
  temporary_directory directory;

  random_model(const model_config& c, std::uint64_t seed)
      : reference_model{c, random_tensors(c, dtype::f16, seed)} {
    write_tensors(directory.path(), *this, dtype::f32);
  }

  hf_weights weights() const { return hf_weights(directory.path()); }
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

double relative_error(double x, double expected) { return std::abs(x - expected) / expected; }

/// Compares every `step`-th column of every linear.
void check_gradients(random_model& model, const std::vector<std::vector<int>>& windows,
                     std::size_t step) {
  std::size_t seen = 0;
  const column_sensitivities found = gradient_sensitivity(
      qeft::on_host(2), model.config, model.weights(), windows, [&](index_t sample, double loss) {
        CHECK(sample == static_cast<index_t>(seen));
        CHECK(relative_error(loss, model.loss(windows[seen])) < 1e-5);
        ++seen;
      });
  CHECK(seen == windows.size());
  CHECK(found.size() == static_cast<std::size_t>(7 * model.config.num_hidden_layers));

  constexpr double h = 1e-4;
  for (const auto& [name, sensitivity] : found) {
    std::vector<double>& weight = model.tensors.at(name + ".weight");
    const std::size_t columns = sensitivity.size();
    REQUIRE(weight.size() % columns == 0);
    for (std::size_t j = 0; j < columns; j += step) {
      double expected = 0;
      for (const std::vector<int>& window : windows) {
        for (std::size_t i = j; i < weight.size(); i += columns) {
          const double kept = std::exchange(weight[i], weight[i] + h);
          const double above = model.loss(window);
          weight[i] = kept - h;
          const double below = model.loss(window);
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

TEST_CASE("sensitivities equal finite differences", "[llm]") {
  const std::vector<std::pair<const char*, model_config>> cases = {
      {"llama3", llama3()}, {"qwen2", qwen2()}, {"mistral", mistral()}};
  for (const auto& [name, config] : cases) {
    INFO(name);
    random_model model(config, 7);
    // Two samples of different length: each is squared by itself.
    check_gradients(model, {random_tokens(config, 9, 1), random_tokens(config, 6, 2)}, 1);
  }
}

TEST_CASE("sensitivities over more than one piece of rows", "[llm]") {
  model_config config = tiny();
  config.num_hidden_layers = 1;
  config.intermediate_size = 70;
  random_model model(config, 8);
  check_gradients(model, {random_tokens(config, 70, 3)}, 23);
}

TEST_CASE("sensitivities do not depend on the number of threads", "[llm]") {
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

TEST_CASE("sensitivities of bad samples are refused", "[llm]") {
  const random_model model(tiny(), 10);
  const auto refused = [&](const std::vector<int>& window) {
    return catch_error([&] {
      gradient_sensitivity(qeft::on_host(1), model.config, model.weights(), {{1, 2, 3}, window});
    });
  };
  CHECK(refused({1}).code == errc::invalid_argument);
  CHECK_THAT(refused({1}).message, contains("sample 1: ") && contains("has 1 tokens"));
  CHECK_THAT(refused(std::vector<int>(129, 0)).message, contains("between 2 and 128"));
  CHECK_THAT(refused({1, 13}).message, contains("holds token 13"));
  CHECK_THAT(refused({-1, 3}).message, contains("holds token -1"));

  // A model whose numbers overflow must not choose columns by NaN.
  const auto sensitivity_of = [](random_model& m) {
    write_tensors(m.directory.path(), m, dtype::f32);
    return catch_error([&] {
      gradient_sensitivity(qeft::on_host(1), m.config, m.weights(), {{1, 2, 3}, {4, 5}});
    });
  };
  random_model huge(tiny(), 10);
  for (double& x : huge.tensors.at("model.layers.1.input_layernorm.weight")) x = 3e38;
  CHECK(sensitivity_of(huge).code == errc::not_finite);
  CHECK_THAT(sensitivity_of(huge).message, contains("model.layers.1: the activations"));
  random_model head(tiny(), 10);
  for (double& x : head.tensors.at("model.norm.weight")) x = 3e38;
  CHECK(sensitivity_of(head).code == errc::not_finite);
  CHECK_THAT(sensitivity_of(head).message, contains("sample 0: ") && contains("the loss is"));
}
