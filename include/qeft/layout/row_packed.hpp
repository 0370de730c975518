// SPDX-License-Identifier: Apache-2.0
// The interchange layout: row after row, each row a packed_array of its dense codes.
#pragma once

#include "qeft/layout/extent.hpp"

namespace qeft::layout {

/// Codes (OC, words per row), scales and zero points (OC, groups), weak columns (OC, k), all
/// row-major and without padding but for the end of each row of codes. Rows of codes start on
/// 32-bit words, so a permutation of rows moves whole runs of words; integer zero points are one
/// packed_array. A tile is one row of 32 columns.
struct row_packed {
  static constexpr const char* name = "row_packed";
  static constexpr bool zeros_in_scales = false;
  static constexpr index_t rows = 1;
  template <int Bits>
  static constexpr index_t columns = 32;

  /// 32-bit words of one row of codes.
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t row_words(const extent& e) noexcept {
    return packed_array<Bits>::words(e.dense);
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t code_words(const extent& e) noexcept {
    return e.out_channels * row_words<Bits>(e);
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t tile_word(const extent& e, int p, index_t n,
                                                      index_t k_tile) noexcept {
    const index_t plane = p == 0 ? 0 : packed_array<Bits>::plane_words(0, e.dense);
    return n * row_words<Bits>(e) + plane + k_tile * bit_planes<Bits>::width(p);
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr tile_address locate_in_tile(int p, int /*r*/, int c) noexcept {
    const int bit = c * bit_planes<Bits>::width(p);
    return {bit / 32, bit % 32};
  }

  QEFT_HOST_DEVICE static constexpr index_t scale_count(const extent& e) noexcept {
    return e.out_channels * e.groups;
  }
  QEFT_HOST_DEVICE static constexpr index_t scale_index(const extent& e, index_t n,
                                                        index_t g) noexcept {
    return n * e.groups + g;
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
    return packed_array<Bits>::words(scale_count(e));
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr code_address locate_zero(const extent& e, int p, index_t n,
                                                             index_t g) noexcept {
    return packed_array<Bits>::locate(p, scale_index(e, n, g), scale_count(e));
  }

  QEFT_HOST_DEVICE static constexpr index_t weak_count(const extent& e) noexcept {
    return e.out_channels * e.weak;
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_index(const extent& e, index_t n,
                                                       index_t j) noexcept {
    return n * e.weak + j;
  }
};

}  // namespace qeft::layout
