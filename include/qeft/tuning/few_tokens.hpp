// SPDX-License-Identifier: Apache-2.0
// How a product with few tokens is spread over a device. No choice changes a result.
#pragma once

#include "qeft/tuning/parts.hpp"

namespace qeft::tuning {

/// Warps of a block, at most.
inline constexpr int few_tokens_warps = 5;

/// Warps of a block: as few as take the parts in as many rounds as few_tokens_warps would.
constexpr int warps_for(int parts) noexcept {
  const int rounds = static_cast<int>(ceil_div(parts, few_tokens_warps));
  return static_cast<int>(ceil_div(parts, rounds));
}

/// Tiles of 16 rows that a warp multiplies at a time: two share the activations, where that leaves
/// a block for every second multiprocessor at least.
constexpr int row_tiles_for(index_t row_tiles, int multiprocessors) noexcept {
  return row_tiles >= index_t{multiprocessors} ? 2 : 1;
}

}  // namespace qeft::tuning
