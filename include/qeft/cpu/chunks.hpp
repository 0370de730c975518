// SPDX-License-Identifier: Apache-2.0
// How the kernels cut a layer: tiles of 32 rows, and chunks of columns.
#pragma once

#include "qeft/cpu/vectors.hpp"
#include "qeft/layout/simd_tile.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

inline constexpr index_t tile_rows = layout::simd_tile::rows;
inline constexpr index_t tile_columns = layout::simd_tile::columns<8>;  // of every width

/// One float, word ... for each row of a tile.
template <class Isa>
using row_vectors = vectors<Isa, static_cast<int>(tile_rows) / Isa::lanes>;

/// The dense columns, cut into chunks: pieces of one group of at most 128 columns. What a panel
/// holds, what int8 scales together, and what is summed before scale and zero point apply.
struct chunk_list {
  static constexpr index_t max_columns = 128;

  struct chunk {
    index_t group;
    index_t first;    // dense column, a multiple of 32
    index_t columns;  // 1 .. max_columns
    index_t column_tiles() const noexcept { return ceil_div(columns, tile_columns); }
  };

  index_t dense;              // columns
  index_t columns_per_group;  // at least 1

  index_t per_group() const noexcept { return ceil_div(columns_per_group, max_columns); }
  index_t count() const noexcept {
    const index_t full_groups = dense / columns_per_group;
    return full_groups * per_group() + ceil_div(dense % columns_per_group, max_columns);
  }
  chunk operator[](index_t i) const noexcept {
    const index_t group = i / per_group();
    const index_t first = group * columns_per_group + i % per_group() * max_columns;
    index_t end = first + max_columns;
    if (end > (group + 1) * columns_per_group) end = (group + 1) * columns_per_group;
    if (end > dense) end = dense;
    return {group, first, end - first};
  }
};

// Codes stream from memory once; asking for them this far ahead is worth up to 1.5x on machines
// whose prefetchers stop at page boundaries.
inline constexpr std::uintptr_t prefetch_bytes = 3072;

/// Asks for part `Part` of `Parts` of what lies prefetch_bytes behind a tile. A burst of requests
/// would stall the loads that follow.
template <class Isa, int Part = 0, int Parts = 1>
QEFT_ALWAYS_INLINE void prefetch_tile(const std::uint32_t* tile, index_t words) {
  const index_t lines = 4 * words / 64;
  for (index_t line = lines * Part / Parts; line < lines * (Part + 1) / Parts; ++line) {
    // An integer: such a pointer could lie beyond the array.
    Isa::prefetch(reinterpret_cast<std::uintptr_t>(tile) + prefetch_bytes +
                  static_cast<std::uintptr_t>(64 * line));
  }
}

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
