// SPDX-License-Identifier: Apache-2.0
// The interchange layout: row after row, each row a packed_array of its dense codes.
#pragma once

#include "qeft/format/bit_planes.hpp"
#include "qeft/layout/extent.hpp"

namespace qeft::layout {

/// Codes (OC, words per row), group parameters (OC, groups), weak columns (OC, k), all row-major.
/// Rows start on 32-bit words, so a permutation of rows moves whole runs of words.
struct row_packed {
  static constexpr const char* name = "row_packed";

  QEFT_HOST_DEVICE static constexpr index_t padded_rows(index_t oc) noexcept { return oc; }

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
  QEFT_HOST_DEVICE static constexpr code_address locate(const extent& e, int p, index_t n,
                                                        index_t k) noexcept {
    const code_address in_row = packed_array<Bits>::locate(p, k, e.dense);
    return {n * row_words<Bits>(e) + in_row.word, in_row.shift};
  }
  QEFT_HOST_DEVICE static constexpr index_t param_index(const extent& e, index_t n,
                                                        index_t g) noexcept {
    return n * e.groups + g;
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_index(const extent& e, index_t n,
                                                       index_t j) noexcept {
    return n * e.weak + j;
  }
};

}  // namespace qeft::layout
