// SPDX-License-Identifier: Apache-2.0
// Activations in another order: that in which products read them, or any.
#pragma once

#include "qeft/thread/activation_order.hpp"

namespace qeft::kernel {

/// Tokens and columns of a block of order_activations.
inline constexpr int order_tokens = 16;
inline constexpr int order_threads = 256;

/// to[t][slot] = x[t][activation_column(slot)], the dense columns from 0 on, the weak ones from
/// `weak_begin` on. Columns between are not written. A thread takes one column of order_tokens
/// tokens (blockIdx.y).
template <class Weak, class Scalar>
__global__ void order_activations(Weak weak, const Scalar* x, index_t tokens, index_t in_channels,
                                  Scalar* to, index_t stride, index_t weak_begin) {
  const index_t slot = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= in_channels) return;
  const index_t dense = in_channels - weak.count();
  const index_t first = static_cast<index_t>(blockIdx.y) * order_tokens;
  x += first * in_channels + activation_column(weak, slot, in_channels);
  to += first * stride + (slot < dense ? slot : weak_begin + slot - dense);
  const int count = static_cast<int>(min(tokens - first, index_t{order_tokens}));
#pragma unroll 4
  for (int t = 0; t < count; ++t, x += in_channels, to += stride) *to = *x;
}

inline constexpr int gather_threads = 128;

/// to[t][i] = x[t][index[i]], 0 <= i < count. A thread takes one column of every gridDim.y-th
/// token: with more of them side by side, its neighbours would read other sectors.
template <class Word>
__global__ void __launch_bounds__(gather_threads)
    gather_columns(const Word* x, index_t tokens, index_t columns, const std::int32_t* index,
                   index_t count, Word* to) {
  const index_t i = static_cast<index_t>(blockIdx.x) * gather_threads + threadIdx.x;
  if (i >= count) return;
  const index_t from = index[i];
  for (index_t t = blockIdx.y; t < tokens; t += gridDim.y) {
    to[t * count + i] = x[t * columns + from];
  }
}

/// to[t][index[i]] = x[t][i], 0 <= i < count, by threads as in gather_columns.
template <class Word>
__global__ void __launch_bounds__(gather_threads)
    scatter_columns(const Word* x, index_t tokens, index_t columns, const std::int32_t* index,
                    index_t count, Word* to) {
  const index_t i = static_cast<index_t>(blockIdx.x) * gather_threads + threadIdx.x;
  if (i >= count) return;
  const index_t place = index[i];
  for (index_t t = blockIdx.y; t < tokens; t += gridDim.y) {
    to[t * columns + place] = x[t * count + i];
  }
}

}  // namespace qeft::kernel
