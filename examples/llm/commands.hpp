// SPDX-License-Identifier: Apache-2.0
// The commands of qeft-llm that read a model.
#pragma once

#include <cstdint>
#include <string>

#include "qeft/core/config.hpp"

namespace qeft_llm {

struct generate_options {
  std::string model;
  std::string prompt;
  qeft::index_t max_tokens = 128;
  float temperature = 0;  // 0 is greedy
  std::uint64_t seed = 0;
  bool chat = false;        // wrap the prompt as a ChatML turn
  bool ignore_eos = false;  // go on to max_tokens
  int threads = 0;          // 0: one per hardware thread
};

struct perplexity_options {
  std::string model;
  std::string text;
  qeft::index_t seq_len = 512;
  qeft::index_t tokens = 0;  // evaluate about so many; 0: the whole text
  int threads = 0;
};

/// Streams the answer to stdout and the speed to stderr. Each returns the exit status of its command
/// and throws qeft::error.
int run_generate(const generate_options& options);

/// exp of the mean negative log-likelihood over windows of seq_len tokens that tile the text (see
/// text_windows). Without a prefix the first token of a window has no context and is not counted.
/// The last line on stdout is `perplexity X tokens N`.
int run_perplexity(const perplexity_options& options);

/// A table of a model's linear layers.
/// @param path a model directory or its config.json
int run_inspect(const std::string& path);

}  // namespace qeft_llm
