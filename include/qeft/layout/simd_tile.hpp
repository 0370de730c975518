// SPDX-License-Identifier: Apache-2.0
// The CPU layout: 32 rows side by side, so that a vector lane is an output channel and no reduction
// across lanes is ever needed.
#pragma once

#include "qeft/format/bit_planes.hpp"
#include "qeft/layout/extent.hpp"

namespace qeft::layout {

/// A tile is 32 rows x 32 columns and takes `Bits` runs of 32 words; word w of row r is at
/// 32 * w + r of its tile. The column tiles of 32 rows are contiguous. A word holds consecutive
/// columns of one row, lowest bits first; in the 1-bit plane of 3-bit codes column c of the tile is
/// at bit 2 * (c % 16) + c / 16, so that it lines up with the 2-bit plane. Parameters: 32 rows of a
/// group side by side. Weak columns: 32 rows of a column side by side.
struct simd_tile {
  static constexpr const char* name = "simd_tile";
  static constexpr index_t rows = 32;
  static constexpr index_t columns = 32;

  QEFT_HOST_DEVICE static constexpr index_t padded_rows(index_t oc) noexcept {
    return round_up(oc, rows);
  }
  /// Column tiles per row of tiles.
  QEFT_HOST_DEVICE static constexpr index_t column_tiles(const extent& e) noexcept {
    return ceil_div(e.dense, columns);
  }
  /// 32-bit words of one tile.
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t tile_words() noexcept {
    return Bits * rows;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t code_words(const extent& e) noexcept {
    return ceil_div(e.out_channels, rows) * column_tiles(e) * tile_words<Bits>();
  }
  /// Word and bit of column c (0 <= c < 32) within its row of the tile, for plane p.
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr code_address locate_in_row(int p, int c) noexcept {
    const int width = bit_planes<Bits>::width(p);
    const int first_word = bit_planes<Bits>::shift(p);  // a plane of w bits takes w words
    if (width == 1) return {first_word, 2 * (c % 16) + c / 16};
    return {first_word + c * width / 32, c * width % 32};
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr code_address locate(const extent& e, int p, index_t n,
                                                        index_t k) noexcept {
    const index_t tile = n / rows * column_tiles(e) + k / columns;
    const code_address in_row = locate_in_row<Bits>(p, static_cast<int>(k % columns));
    return {tile * tile_words<Bits>() + in_row.word * rows + n % rows, in_row.shift};
  }
  QEFT_HOST_DEVICE static constexpr index_t param_index(const extent& e, index_t n,
                                                        index_t g) noexcept {
    return (n / rows * e.groups + g) * rows + n % rows;
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_index(const extent& e, index_t n,
                                                       index_t j) noexcept {
    return (n / rows * e.weak + j) * rows + n % rows;
  }
};

}  // namespace qeft::layout
