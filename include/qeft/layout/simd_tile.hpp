// SPDX-License-Identifier: Apache-2.0
// The CPU layout: 32 rows side by side, so that a vector lane is an output channel and no reduction
// across lanes is ever needed.
#pragma once

#include "qeft/layout/extent.hpp"

namespace qeft::layout {

/// A tile is 32 rows x 32 columns and takes `Bits` runs of 32 words; word w of row r is at
/// 32 * w + r of its tile. The column tiles of 32 rows are contiguous. A word of the first plane
/// holds consecutive columns of one row, lowest bits first. In a second plane a column lies where
/// its field of the first one does, moved up by as many fields as words of the first plane precede
/// it, so that both are brought together by one shift. Scales: 32 rows of a group side by side.
/// Integer zero points: 32 rows of a group side by side, plane after plane, in `Bits` words of
/// their own. Weak columns: 32 rows of a column side by side. Rows are padded to a multiple of 32.
struct simd_tile {
  static constexpr const char* name = "simd_tile";
  static constexpr bool zeros_in_scales = false;
  static constexpr index_t rows = 32;
  template <int Bits>
  static constexpr index_t columns = 32;

  /// Tiles of rows.
  QEFT_HOST_DEVICE static constexpr index_t row_tiles(const extent& e) noexcept {
    return ceil_div(e.out_channels, rows);
  }
  /// Column tiles per row of tiles.
  QEFT_HOST_DEVICE static constexpr index_t column_tiles(const extent& e) noexcept {
    return ceil_div(e.dense, index_t{32});
  }
  /// 32-bit words of one tile.
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t tile_words() noexcept {
    return Bits * rows;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t code_words(const extent& e) noexcept {
    return row_tiles(e) * column_tiles(e) * tile_words<Bits>();
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t tile_word(const extent& e, int p, index_t n_tile,
                                                      index_t k_tile) noexcept {
    // A plane of w bits takes w runs of words.
    return (n_tile * column_tiles(e) + k_tile) * tile_words<Bits>() +
           bit_planes<Bits>::shift(p) * rows;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr tile_address locate_in_tile(int p, int r, int c) noexcept {
    const int width = bit_planes<Bits>::width(p);
    const int wide = bit_planes<Bits>::width(0);
    const int run = c * wide / 32;  // the word of the first plane that holds the column
    const int shift = c * wide % 32;
    if (p == 0) return {run * static_cast<int>(rows) + r, shift};
    return {run * width / wide * static_cast<int>(rows) + r, shift + run * width % wide};
  }

  QEFT_HOST_DEVICE static constexpr index_t scale_count(const extent& e) noexcept {
    return row_tiles(e) * rows * e.groups;
  }
  QEFT_HOST_DEVICE static constexpr index_t scale_index(const extent& e, index_t n,
                                                        index_t g) noexcept {
    return (n / rows * e.groups + g) * rows + n % rows;
  }
  QEFT_HOST_DEVICE static constexpr index_t zero_count(const extent& e) noexcept {
    return scale_count(e);
  }
  QEFT_HOST_DEVICE static constexpr index_t zero_index(const extent& e, index_t n,
                                                       index_t g) noexcept {
    return scale_index(e, n, g);
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t zero_words(const extent& e) noexcept {
    return row_tiles(e) * e.groups * Bits;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr code_address locate_zero(const extent& e, int p, index_t n,
                                                             index_t g) noexcept {
    const int bit = static_cast<int>(n % rows) * bit_planes<Bits>::width(p);
    return {(n / rows * e.groups + g) * Bits + bit_planes<Bits>::shift(p) + bit / 32, bit % 32};
  }

  QEFT_HOST_DEVICE static constexpr index_t weak_count(const extent& e) noexcept {
    return row_tiles(e) * rows * e.weak;
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_index(const extent& e, index_t n,
                                                       index_t j) noexcept {
    return (n / rows * e.weak + j) * rows + n % rows;
  }
};

}  // namespace qeft::layout
