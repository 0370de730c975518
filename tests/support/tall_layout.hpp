// SPDX-License-Identifier: Apache-2.0
// A layout whose tiles have a number of rows that neither divides 32 nor is a multiple of it.
#pragma once

#include "qeft/layout/extent.hpp"

namespace qeft_test {

struct tall_layout {
  using index_t = qeft::index_t;
  using extent = qeft::layout::extent;

  static constexpr const char* name = "tall";
  static constexpr bool zeros_in_scales = false;
  static constexpr index_t rows = 48;
  template <int Bits>
  static constexpr index_t columns = 32;

  static constexpr index_t row_tiles(const extent& e) {
    return qeft::ceil_div(e.out_channels, rows);
  }
  template <int Bits>
  static constexpr index_t code_words(const extent& e) {
    return row_tiles(e) * qeft::ceil_div(e.dense, 32) * rows * Bits;
  }
  template <int Bits>
  static constexpr index_t tile_word(const extent& e, int p, index_t n_tile, index_t k_tile) {
    return (n_tile * qeft::ceil_div(e.dense, 32) + k_tile) * rows * Bits +
           qeft::bit_planes<Bits>::shift(p) * rows;
  }
  /// The last column first, so that nothing lies as in the library's layouts.
  template <int Bits>
  static constexpr qeft::layout::tile_address locate_in_tile(int p, int r, int c) {
    const int bit = (31 - c) * qeft::bit_planes<Bits>::width(p);
    return {bit / 32 * static_cast<int>(rows) + r, bit % 32};
  }

  static constexpr index_t scale_count(const extent& e) { return row_tiles(e) * rows * e.groups; }
  static constexpr index_t scale_index(const extent& e, index_t n, index_t g) {
    return (n / rows * e.groups + g) * rows + n % rows;
  }
  static constexpr index_t zero_count(const extent& e) { return scale_count(e); }
  static constexpr index_t zero_index(const extent& e, index_t n, index_t g) {
    return scale_index(e, n, g);
  }
  /// 48 fields of a plane of w bits take 1.5 w words, of which 2 w are set aside.
  template <int Bits>
  static constexpr index_t zero_words(const extent& e) {
    return row_tiles(e) * e.groups * 2 * Bits;
  }
  template <int Bits>
  static constexpr qeft::code_address locate_zero(const extent& e, int p, index_t n, index_t g) {
    const int bit = static_cast<int>(n % rows) * qeft::bit_planes<Bits>::width(p);
    return {2 * ((n / rows * e.groups + g) * Bits + qeft::bit_planes<Bits>::shift(p)) + bit / 32,
            bit % 32};
  }

  static constexpr index_t weak_count(const extent& e) { return row_tiles(e) * rows * e.weak; }
  static constexpr index_t weak_index(const extent& e, index_t n, index_t j) {
    return (n / rows * e.weak + j) * rows + n % rows;
  }
};

}  // namespace qeft_test
