// SPDX-License-Identifier: Apache-2.0
// A layout as a user would write one, unlike the library's own in every respect: tiles of 16 x 64
// in the order of tensor-core fragments, zero points beside their scales, padded groups, and weak
// columns padded to 16 so that k % 16 != 0 leaves holes.
#pragma once

#include "qeft/layout/extent.hpp"

namespace qeft_test {

struct interleaved_layout {
  using index_t = qeft::index_t;
  using extent = qeft::layout::extent;

  static constexpr const char* name = "interleaved";
  static constexpr bool zeros_in_scales = true;
  static constexpr index_t rows = 16;
  template <int Bits>
  static constexpr index_t columns = 64;

  static constexpr index_t row_tiles(const extent& e) { return qeft::ceil_div(e.out_channels, 16); }
  static constexpr index_t column_tiles(const extent& e) { return qeft::ceil_div(e.dense, 64); }

  template <int Bits>
  static constexpr index_t code_words(const extent& e) {
    return row_tiles(e) * column_tiles(e) * (16 * 64 * Bits / 32);
  }
  template <int Bits>
  static constexpr index_t tile_word(const extent& e, int p, index_t n_tile, index_t k_tile) {
    const index_t tile = n_tile * column_tiles(e) + k_tile;
    return tile * (16 * 64 * Bits / 32) + 32 * qeft::bit_planes<Bits>::shift(p);
  }
  /// Lane 4 * (r % 8) + c % 8 / 2 holds the 32 codes of its fragments, plane by plane.
  template <int Bits>
  static constexpr qeft::layout::tile_address locate_in_tile(int p, int r, int c) {
    const int width = qeft::bit_planes<Bits>::width(p);
    const int lane = r % 8 * 4 + c % 8 / 2;
    const int element = c / 16 * 8 + c % 16 / 8 * 4 + r / 8 * 2 + c % 2;
    const int bit = element * width;
    return {lane * width + bit / 32, bit % 32};
  }

  // (scale, zero) pairs of 16 bits, 16 rows of a group side by side, groups padded to an even
  // number.
  static constexpr index_t scale_count(const extent& e) {
    return row_tiles(e) * qeft::round_up(e.groups, 2) * 32;
  }
  static constexpr index_t scale_index(const extent& e, index_t n, index_t g) {
    return ((n / 16 * qeft::round_up(e.groups, 2) + g) * 16 + n % 16) * 2;
  }
  static constexpr index_t zero_index(const extent& e, index_t n, index_t g) {
    return scale_index(e, n, g) + 1;
  }
  template <int Bits>
  static constexpr qeft::code_address locate_zero(const extent& e, int p, index_t n, index_t g) {
    return {scale_index(e, n, g) / 2, 16 + qeft::bit_planes<Bits>::shift(p)};
  }

  static constexpr index_t weak_count(const extent& e) {
    return row_tiles(e) * 16 * qeft::round_up(e.weak, 16);
  }
  static constexpr index_t weak_index(const extent& e, index_t n, index_t j) {
    return (n / 16 * qeft::round_up(e.weak, 16) + j) * 16 + n % 16;
  }
};

}  // namespace qeft_test
