// SPDX-License-Identifier: Apache-2.0
// Weak-column dropout: in every step a random part of the weak columns is as it was at the start
// (METHOD section 6).
#pragma once

#include "qeft/training/counter_random.hpp"

namespace qeft {

/// Which columns a step leaves out, and how the others make up for it. Trivially copyable; every
/// call with the same members and arguments gives the same answer.
struct weak_dropout {
  float probability = 0.0F;  // of a column to be left out, in [0, 1)
  std::uint64_t seed = 0;

  /// What the step multiplies the change of a column since the start by: 0 for one that is left
  /// out, else 1 / (1 - probability), so that the mean over steps is the change itself. Its
  /// gradient is multiplied by the same.
  QEFT_HOST_DEVICE float scale(index_t step, index_t layer, index_t column) const noexcept {
    const bool kept = counter_uniform(seed, step, layer, column) >= probability;
    return kept ? 1.0F / (1.0F - probability) : 0.0F;
  }
};

/// The value that the forward pass of a step sees.
/// @param initial at the start of training, @param value now, @param scale of its column
QEFT_HOST_DEVICE float dropped_value(float initial, float value, float scale) noexcept {
  return initial + scale * (value - initial);
}

}  // namespace qeft
