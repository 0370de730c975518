// SPDX-License-Identifier: Apache-2.0
// The order in which kernels read activations: the IC - k dense columns, then the k weak ones. With
// it every weak policy becomes weak_tail, whose stored bytes are the same.
#pragma once

#include "qeft/container/quantized_matrix_view.hpp"

namespace qeft {

/// Input column that stands at `slot` of the kernel's order, 0 <= slot < in_channels.
template <class Weak>
QEFT_HOST_DEVICE constexpr index_t activation_column(const Weak& weak, index_t slot,
                                                     index_t in_channels) noexcept {
  const index_t dense = in_channels - weak.count();
  return slot < dense ? weak.dense_column(slot, in_channels)
                      : weak.weak_column(slot - dense, in_channels);
}

/// Consecutive columns at consecutive slots.
struct activation_run {
  index_t column;
  index_t slot;
  index_t count;
};

inline namespace QEFT_TARGET {

/// Calls body(activation_run) for the dense columns, in ascending order, or for the weak ones: the
/// same order as activation_column, by whole runs. No run is empty.
template <class Weak, class Body>
void for_each_dense_run(const Weak& weak, index_t in_channels, const Body& body) {
  index_t begin = 0;  // first column behind the last weak one
  for (index_t j = 0; j <= weak.count(); ++j) {
    const index_t end = j < weak.count() ? weak.weak_column(j, in_channels) : in_channels;
    if (begin < end) body(activation_run{begin, begin - j, end - begin});
    begin = end + 1;
  }
}
template <class Weak, class Body>
void for_each_weak_run(const Weak& weak, index_t in_channels, const Body& body) {
  const index_t k = weak.count();
  for (index_t j = 0, end = 0; j < k; j = end) {
    const index_t column = weak.weak_column(j, in_channels);
    end = j + 1;
    while (end < k && weak.weak_column(end, in_channels) == column + (end - j)) ++end;
    body(activation_run{column, in_channels - k + j, end - j});
  }
}

}  // namespace QEFT_TARGET

/// The layer as kernels see it, whose activations are in the kernel's order.
template <class F, class W, class L, class M>
QEFT_HOST_DEVICE quantized_matrix_view<F, weak_tail<>, L, M> as_tail(
    const quantized_matrix_view<F, W, L, M>& w) noexcept {
  return {w.out_channels, w.in_channels, w.groups, w.columns_per_group, {{w.weak_columns()}},
          w.codes,        w.scales,      w.zeros,  w.weak_values};
}

}  // namespace qeft
