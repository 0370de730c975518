// SPDX-License-Identifier: Apache-2.0
// The order in which kernels read activations: the IC - k dense columns, then the k weak ones. With
// it every weak policy becomes weak_tail, whose stored bytes are the same.
#pragma once

#include "qeft/format/weak_columns.hpp"

namespace qeft {

/// Input column that stands at `slot` of the kernel's order, 0 <= slot < in_channels.
template <class Weak>
QEFT_HOST_DEVICE constexpr index_t activation_column(const Weak& weak, index_t slot,
                                                     index_t in_channels) noexcept {
  const index_t dense = in_channels - weak.count();
  return slot < dense ? weak.dense_column(slot, in_channels)
                      : weak.weak_column(slot - dense, in_channels);
}

/// Calls body(column, slot, count) for runs that cover every column once and keep neighbours
/// together: activation_column(slot + i) == column + i for i < count. Runs may be empty.
template <class Weak, class Body>
QEFT_HOST_DEVICE constexpr void for_each_activation_run(const Weak& weak, index_t in_channels,
                                                        const Body& body) {
  const index_t k = weak.count();
  const index_t dense = in_channels - k;
  if constexpr (Weak::kind == weak_kind::per_head) {
    const index_t head_dim = in_channels / weak.heads;
    const index_t weak_per = k / weak.heads;
    const index_t dense_per = head_dim - weak_per;
    for (index_t head = 0; head < weak.heads; ++head) {
      body(head * head_dim, head * dense_per, dense_per);
      body(head * head_dim + dense_per, dense + head * weak_per, weak_per);
    }
  } else if constexpr (Weak::kind == weak_kind::indexed) {
    index_t begin = 0;  // first column that no run holds yet
    for (index_t j = 0; j < k; ++j) {
      const index_t column = weak.index[j];
      body(begin, begin - j, column - begin);
      body(column, dense + j, index_t{1});
      begin = column + 1;
    }
    body(begin, begin - k, in_channels - begin);
  } else {
    body(index_t{0}, index_t{0}, in_channels);
  }
}

}  // namespace qeft
