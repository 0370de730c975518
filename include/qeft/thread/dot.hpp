// SPDX-License-Identifier: Apache-2.0
// One row of y = W x for any layout: a per-lane body and a combine. Slow and obvious.
#pragma once

#include "qeft/container/quantized_matrix_view.hpp"

namespace qeft {

/// The part of row n of W x that belongs to this lane: input columns rank, rank + size, ... in
/// ascending order, accumulated in FP32.
/// @param x (IC) activations; float, half_bits or bf16_bits
template <class F, class W, class L, class M, class X, class Group>
QEFT_HOST_DEVICE float row_dot_partial(const quantized_matrix_view<F, W, L, M>& w, index_t n,
                                       const X* x, Group group) noexcept {
  float sum = 0.0F;
  for (index_t column = group.rank(); column < w.in_channels; column += group.size()) {
    sum += dequantize(w, n, column) * to_float(x[column]);
  }
  return sum;
}

/// Row n of W x; valid in the lanes for which group.sum is.
template <class F, class W, class L, class M, class X, class Group>
QEFT_HOST_DEVICE float row_dot(const quantized_matrix_view<F, W, L, M>& w, index_t n, const X* x,
                               Group group) noexcept {
  return group.sum(row_dot_partial(w, n, x, group));
}

}  // namespace qeft
