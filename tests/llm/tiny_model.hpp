// SPDX-License-Identifier: Apache-2.0
// A small random model in a temporary directory, and its forward pass written plainly in double.
#pragma once

#include <cmath>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "config.hpp"

namespace qeft_test {

/// A directory that goes with its owner.
class scratch_directory {
 public:
  scratch_directory();
  ~scratch_directory();
  scratch_directory(const scratch_directory&) = delete;
  scratch_directory& operator=(const scratch_directory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

struct tiny_options {
  bool tied = true;
  bool biases = false;  // a Qwen2: biases of q, k and v
  unsigned seed = 1;
};

/// Two blocks, hidden 96, 6 query heads on 2 value heads, inner 160, a vocabulary of 256 bytes: config,
/// FP16 weights with a few outlier channels, tokenizer.
void write_tiny_model(const std::filesystem::path& directory, const tiny_options& options);

using tensor_map = std::map<std::string, std::vector<float>>;
tensor_map read_tensors(const std::filesystem::path& directory);
/// Writes tensors as F32 next to a copy of the other files of `from`.
void write_tensors(const std::filesystem::path& from, const std::filesystem::path& to,
                   const tensor_map& tensors);

/// Logits of every position, (tokens, vocabulary).
std::vector<double> reference_logits(const qeft_llm::model_config& config, const tensor_map& tensors,
                                     const std::vector<int>& tokens);

/// ||a - b|| / ||b||
template <class A, class B>
double relative_error(const A& a, const B& b) {
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return norm == 0 ? difference : std::sqrt(difference / norm);
}

}  // namespace qeft_test
