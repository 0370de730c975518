// SPDX-License-Identifier: Apache-2.0
// A trivially copyable view of a quantised linear layer, and the slow accessors that define what it
// means. Every other path is tested against these.
#pragma once

#include "qeft/core/half.hpp"
#include "qeft/core/memory.hpp"
#include "qeft/format/quant_format.hpp"
#include "qeft/format/weak_columns.hpp"
#include "qeft/layout/extent.hpp"
#include "qeft/layout/row_packed.hpp"

namespace qeft {

/// A linear layer y = W x with W of OC x IC: codes for the IC - k robust columns, one (scale, zero)
/// per row and group of them, and k weak columns in full precision. Passed by value to any kernel.
///
/// Make one with quantized_matrix::view, which has checked the sizes.
template <class Format, class Weak = weak_none, class Layout = layout::row_packed,
          class Memory = host_memory>
struct quantized_matrix_view {
  static_assert(sizeof(Format) > 0 && is_quant_format_v<Format>,
                "qeft::quantized_matrix_view: Format must be a qeft::quant_format<...>");
  static_assert(is_weak_policy_v<Weak>,
                "qeft::quantized_matrix_view: Weak must be weak_none, weak_tail<K>, "
                "weak_indexed<K> or weak_per_head<K>");

  using format_type = Format;
  using weak_type = Weak;
  using layout_type = Layout;
  using memory_type = Memory;
  using scalar_type = typename Format::scalar_type;
  using zero_type = typename Format::zero_type;

  index_t out_channels;            // OC
  index_t in_channels;             // IC
  index_t groups;                  // groups per row; the last one may be shorter
  index_t columns_per_group;       // dense columns that share a scale, at least 1
  Weak weak;                       // k, and where the weak columns are
  const std::uint32_t* codes;      // placed by Layout, as everything that follows
  const scalar_type* scales;       // null when there are no groups
  const zero_type* zeros;          // words of packed fields, or scalars; unused when symmetric
  const scalar_type* weak_values;  // null when k = 0

  /// k
  QEFT_HOST_DEVICE constexpr index_t weak_columns() const noexcept { return weak.count(); }
  /// IC - k
  QEFT_HOST_DEVICE constexpr index_t dense_columns() const noexcept {
    return in_channels - weak.count();
  }
  /// Group of dense column i.
  QEFT_HOST_DEVICE constexpr index_t group_of(index_t i) const noexcept {
    if constexpr (Format::group_size == per_channel) return 0;
    return quotient(i, Format::group_size > 0 ? Format::group_size : columns_per_group);
  }
  QEFT_HOST_DEVICE constexpr layout::extent extent() const noexcept {
    return {out_channels, dense_columns(), groups, weak_columns(), Format::zero};
  }
};

/// The code of output channel n and dense column i. The definition of every layout.
template <class F, class W, class L, class M>
QEFT_HOST_DEVICE constexpr unsigned read_code(const quantized_matrix_view<F, W, L, M>& w, index_t n,
                                              index_t i) noexcept {
  return gather_code<F::bits>(w.codes, layout::code_place<L, F::bits>{w.extent(), n, i});
}

/// Scale and zero of output channel n and group g.
template <class F, class W, class L, class M>
QEFT_HOST_DEVICE group_params read_params(const quantized_matrix_view<F, W, L, M>& w, index_t n,
                                          index_t g) noexcept {
  const layout::extent e = w.extent();
  const float scale = to_float(w.scales[L::scale_index(e, n, g)]);
  if constexpr (F::zero == zero_kind::symmetric) {
    return {scale, static_cast<float>(F::mid_code)};
  } else if constexpr (F::zero == zero_kind::scaled) {
    return {scale, to_float(w.zeros[L::zero_index(e, n, g)])};
  } else {
    const unsigned z = gather_code<F::bits>(w.zeros, layout::zero_place<L, F::bits>{e, n, g});
    return {scale, static_cast<float>(z)};
  }
}

/// The weight of output channel n and dense column i.
template <class F, class W, class L, class M>
QEFT_HOST_DEVICE float dense_weight(const quantized_matrix_view<F, W, L, M>& w, index_t n,
                                    index_t i) noexcept {
  return dequantize_code<F>(read_code(w, n, i), read_params(w, n, w.group_of(i)));
}

/// The weight of output channel n and weak column j.
template <class F, class W, class L, class M>
QEFT_HOST_DEVICE float weak_weight(const quantized_matrix_view<F, W, L, M>& w, index_t n,
                                   index_t j) noexcept {
  return to_float(w.weak_values[L::weak_index(w.extent(), n, j)]);
}

/// W[n, column] for an input column in [0, IC): the definition of the whole format.
template <class F, class W, class L, class M>
QEFT_HOST_DEVICE float dequantize(const quantized_matrix_view<F, W, L, M>& w, index_t n,
                                  index_t column) noexcept {
  const column_location at = w.weak.locate(column, w.in_channels);
  return at.is_weak ? weak_weight(w, n, at.index) : dense_weight(w, n, at.index);
}

}  // namespace qeft
