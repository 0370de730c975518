// SPDX-License-Identifier: Apache-2.0
// Choosing the next token.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "qeft/core/config.hpp"

namespace qeft_llm {

/// As `transformers` has them, and applied in its order: penalty, temperature, top-k, top-p.
struct sampling_options {
  float temperature = 0;    // 0 takes the largest logit
  qeft::index_t top_k = 0;  // draw from the k largest logits (and those equal to the k-th); 0: all
  float top_p = 1;          // draw from the fewest tokens that have this probability together
  float repetition_penalty =
      1;  // logits of tokens seen: divided by it when positive, else multiplied
  std::uint64_t seed = 0;
};

/// Throws qeft::error naming the option that is out of range.
void check(const sampling_options& options);

/// Draws tokens. The same options and logits give the same tokens with every standard library.
class sampler {
 public:
  explicit sampler(const sampling_options& options);

  /// Counts a token, of the prompt or drawn, as seen.
  void see(int token);
  /// The next token. @param logits finite; changed
  int next(std::vector<float>& logits);

 private:
  void penalise(std::vector<float>& logits) const;

  sampling_options options_;
  std::mt19937_64 rng_;
  std::vector<bool> seen_;  // by token
};

}  // namespace qeft_llm
