// SPDX-License-Identifier: Apache-2.0
// How a product with few tokens is spread over a device. No choice changes a result.
#pragma once

#include "qeft/tuning/parts.hpp"

namespace qeft::tuning {

/// Most warps of a block. @param row_tiles of 16 rows that a warp takes: one where there are few
QEFT_HOST_DEVICE constexpr int most_few_tokens_warps(int row_tiles) noexcept {
  return row_tiles == 1 ? 9 : 5;
}

/// Whether codes are asked for to come to the second-level cache before they are loaded: more bytes
/// under way, which compute capability 9.0 needs. Where code is compiled for sm_90a.
#if defined(QEFT_DEVICE_SM90A)
inline constexpr bool prefetch_codes = true;
#else
inline constexpr bool prefetch_codes = false;
#endif

/// How the parts of a row are spread over the warps of a block: each takes some in a row.
struct warp_plan {
  int warps;
  int parts_each;
};

/// As many warps as are good, or fewer if these take as many parts each.
/// @param row_tiles of a warp
constexpr warp_plan plan_warps(int parts, int row_tiles) noexcept {
  const auto each = static_cast<int>(ceil_div(parts, most_few_tokens_warps(row_tiles)));
  return {static_cast<int>(ceil_div(parts, each)), each};
}

/// Tiles of 16 rows that a warp multiplies at a time: two share the activations, where that leaves
/// a block for every second multiprocessor at least.
constexpr int row_tiles_for(index_t row_tiles, int multiprocessors) noexcept {
  return row_tiles >= index_t{multiprocessors} ? 2 : 1;
}

/// Blocks of a cluster on compute capability 9.0, which get the activations from the second-level
/// cache together: each by itself asks for as many bytes of them as of a 4-bit layer from about 8
/// tokens on, and that cache is not twice as fast as DRAM. No size has been measured on hardware.
/// 8 is the most that any such device takes, except for a part of one (MIG) with fewer
/// multiprocessors.
/// @param blocks of rows
constexpr int few_tokens_cluster(index_t blocks, int multiprocessors) noexcept {
  int cluster = 8;
  while (blocks % cluster != 0 || cluster > multiprocessors) cluster /= 2;
  return cluster;
}

}  // namespace qeft::tuning
