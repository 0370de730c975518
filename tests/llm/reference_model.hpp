// SPDX-License-Identifier: Apache-2.0
// Small random models and their forward pass, written plainly in double: what the decoder and its
// gradients are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "config.hpp"
#include "hf_model.hpp"
#include "qeft/io/safetensors_writer.hpp"
#include "support/catch.hpp"

namespace qeft_test {

using tensor_map = std::map<std::string, std::vector<double>>;

/// A full-precision model. Tensors may be changed between calls.
class reference_model {
 public:
  qeft_llm::model_config config;
  tensor_map tensors;  // those of expected_tensors

  /// (tokens, vocabulary)
  std::vector<double> logits(const std::vector<int>& tokens) const;
  /// Sum of -log p of the tokens that are counted, each predicted from those before it.
  double loss(const std::vector<int>& tokens, const std::vector<char>& counted) const;
  /// Mean of -log p of all tokens but the first.
  double loss(const std::vector<int>& tokens) const;

 private:
  using rows = std::vector<std::vector<double>>;  // one per token

  rows norm(const rows& x, const std::string& name) const;
  rows linear(const rows& x, const std::string& name) const;
  void rotate(rows& x) const;
  rows attention(const rows& x, const std::string& block, qeft::index_t layer) const;
  rows mlp(const rows& x, const std::string& block) const;
};

/// The config.json of a small Llama, with these keys replaced.
nlohmann::json tiny_config(const nlohmann::json& changes = nlohmann::json::object());

/// Random numbers that `type`, F16 or F32, holds exactly.
tensor_map random_tensors(const qeft_llm::model_config& config, qeft::io::dtype type,
                          std::uint64_t seed);
/// Adds one tensor, converted to `type`, F16 or F32.
void add_tensor(qeft::io::safetensors_writer& writer, const qeft_llm::tensor_spec& spec,
                const std::vector<double>& values, qeft::io::dtype type);
/// Writes model.safetensors.
void write_tensors(const std::filesystem::path& directory, const reference_model& model,
                   qeft::io::dtype type);

/// Writes a whole model directory: two blocks with a few outlier channels, which is what weak
/// columns are for, and a tokenizer of the letters a to z (ids 0 to 25). @param config changes
/// tiny_config
reference_model write_small_model(const std::filesystem::path& directory, nlohmann::json config,
                                  std::uint64_t seed);

std::vector<int> random_tokens(const qeft_llm::model_config& config, std::size_t count,
                               std::uint64_t seed);

/// The largest ||actual - expected|| / ||expected|| of a token.
template <class T>
double worst_error(const std::vector<float>& actual, const std::vector<T>& expected,
                   qeft::index_t vocabulary) {
  REQUIRE(actual.size() == expected.size());
  double worst = 0;
  for (std::size_t i = 0; i < actual.size();) {
    double difference = 0;
    double norm = 0;
    for (qeft::index_t v = 0; v < vocabulary; ++v, ++i) {
      const auto e = static_cast<double>(expected[i]);
      const double d = static_cast<double>(actual[i]) - e;
      difference += d * d;
      norm += e * e;
    }
    worst = std::max(worst, std::sqrt(difference / norm));
  }
  return worst;
}

}  // namespace qeft_test
