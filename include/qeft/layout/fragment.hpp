// SPDX-License-Identifier: Apache-2.0
// The GPU layout: what a lane loads is what the tensor cores take.
#pragma once

#include "qeft/layout/extent.hpp"

namespace qeft::layout {

/// A tile is 16 rows and as many columns as one 16-byte load per lane of a warp brings of the first
/// bit plane: 256 / its width. A lane's words hold its part of the A operand of mma.m16n8k16 (and
/// of wgmma), k-step after k-step of 16 columns; a second plane follows the first. The column tiles
/// of 16 rows are contiguous.
///
/// In a word the two elements of an operand register lie 16 bits apart, so that one mask makes a
/// pair of them; registers follow each other from the lowest bits up. In a second plane an element
/// lies where its field of the first one does, moved up by as many fields as words of the first
/// plane share its word and precede it, so that both are brought together by one shift.
///
/// Groups are padded to a multiple of 4: then lane 4 r + g holds the scales of rows r and r + 8 and
/// group g in one word, and their integer zero points in one byte (two for 8 bits). Weak columns:
/// operand fragments of 16 rows and 16 columns, padded with zeros.
struct fragment {
  static constexpr const char* name = "fragment";
  static constexpr bool zeros_in_scales = false;
  static constexpr index_t rows = 16;
  template <int Bits>
  static constexpr index_t columns = 256 / bit_planes<Bits>::width(0);

  /// Columns of one mma: a k-step.
  static constexpr int step_columns = 16;
  static constexpr int lanes = 32;
  /// Groups whose parameters a warp loads together.
  static constexpr index_t groups_together = 4;

  /// Where an element of a 16 x 16 operand is: in which lane, register and half of it.
  struct operand_place {
    int lane;
    int reg;
    int half;
  };
  QEFT_HOST_DEVICE static constexpr operand_place operand(int r, int c) noexcept {
    return {r % 8 * 4 + c % 8 / 2, r / 8 + 2 * (c / 8), c % 2};
  }

  /// Tiles of rows.
  QEFT_HOST_DEVICE static constexpr index_t row_tiles(const extent& e) noexcept {
    return ceil_div(e.out_channels, rows);
  }
  /// Column tiles per row of tiles.
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t column_tiles(const extent& e) noexcept {
    return ceil_div(e.dense, columns<Bits>);
  }
  /// Words of plane p that a lane has of a tile.
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr int lane_words(int p) noexcept {
    return 4 * bit_planes<Bits>::width(p) / bit_planes<Bits>::width(0);
  }
  /// 32-bit words of one tile.
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t tile_words() noexcept {
    return rows * columns<Bits> * Bits / 32;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t code_words(const extent& e) noexcept {
    return row_tiles(e) * column_tiles<Bits>(e) * tile_words<Bits>();
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t tile_word(const extent& e, int p, index_t n_tile,
                                                      index_t k_tile) noexcept {
    return (n_tile * column_tiles<Bits>(e) + k_tile) * tile_words<Bits>() +
           (p == 0 ? 0 : lanes * lane_words<Bits>(0));
  }

  /// Where a register of a k-step begins in a lane's words of plane p: the word, and the bit of its
  /// lower element; that of the upper one is 16 above.
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr tile_address locate_register(int p, int step,
                                                                 int reg) noexcept {
    const int wide = bit_planes<Bits>::width(0);
    const int fields = 16 / wide;  // in half a word
    const int word = (step * 4 + reg) / fields;
    const int shift = (step * 4 + reg) % fields * wide;
    if (p == 0) return {word, shift};
    const int narrow = bit_planes<Bits>::width(p);
    const int sharing = wide / narrow;
    return {word / sharing, shift + word % sharing * narrow};
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr tile_address locate_in_tile(int p, int r, int c) noexcept {
    const operand_place at = operand(r, c % step_columns);
    const tile_address in = locate_register<Bits>(p, c / step_columns, at.reg);
    return {at.lane * lane_words<Bits>(p) + in.word, in.shift + 16 * at.half};
  }

  /// Sets of four groups in a row.
  QEFT_HOST_DEVICE static constexpr index_t group_sets(const extent& e) noexcept {
    return ceil_div(e.groups, groups_together);
  }
  /// Lane after lane, over sets of four groups: where that of row n and group g begins.
  QEFT_HOST_DEVICE static constexpr index_t params_lane(const extent& e, index_t n,
                                                        index_t g) noexcept {
    return (n / rows * group_sets(e) + g / groups_together) * lanes + n % 8 * 4 +
           g % groups_together;
  }
  QEFT_HOST_DEVICE static constexpr index_t scale_count(const extent& e) noexcept {
    return row_tiles(e) * group_sets(e) * lanes * 2;
  }
  QEFT_HOST_DEVICE static constexpr index_t scale_index(const extent& e, index_t n,
                                                        index_t g) noexcept {
    return 2 * params_lane(e, n, g) + n % rows / 8;
  }
  QEFT_HOST_DEVICE static constexpr index_t zero_count(const extent& e) noexcept {
    return scale_count(e);
  }
  QEFT_HOST_DEVICE static constexpr index_t zero_index(const extent& e, index_t n,
                                                       index_t g) noexcept {
    return scale_index(e, n, g);
  }
  /// Bits that an integer zero point takes.
  template <int Bits>
  static constexpr int zero_width = Bits <= 4 ? 4 : 8;
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t zero_words(const extent& e) noexcept {
    return scale_count(e) * zero_width<Bits> / 32;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr code_address locate_zero(const extent& e, int p, index_t n,
                                                             index_t g) noexcept {
    const index_t bit = scale_index(e, n, g) * zero_width<Bits>;
    return {bit / 32, static_cast<int>(bit % 32) + bit_planes<Bits>::shift(p)};
  }

  /// Weak k-steps in a row.
  QEFT_HOST_DEVICE static constexpr index_t weak_steps(const extent& e) noexcept {
    return ceil_div(e.weak, step_columns);
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_count(const extent& e) noexcept {
    return row_tiles(e) * weak_steps(e) * rows * step_columns;
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_index(const extent& e, index_t n,
                                                       index_t j) noexcept {
    const operand_place at =
        operand(static_cast<int>(n % rows), static_cast<int>(j % step_columns));
    return ((n / rows * weak_steps(e) + j / step_columns) * lanes + at.lane) * 8 + 2 * at.reg +
           at.half;
  }
};

}  // namespace qeft::layout
