// SPDX-License-Identifier: Apache-2.0
// What the choice of weak columns does between sorts and scans.
#pragma once

#include "qeft/core/half.hpp"

namespace qeft::kernel {

inline constexpr int selection_threads = 128;

/// Number of this thread, for kernels with a thread per element.
__device__ inline index_t element() {
  return static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

/// sum[j] += x[t][j]^2, token after token. A thread takes a column; squares are exact in double.
template <class X>
__global__ void add_column_squares(const X* __restrict__ x, index_t tokens, index_t columns,
                                   double* sum) {
  const index_t j = element();
  if (j >= columns) return;
  double s = sum[j];
#pragma unroll 16
  for (index_t t = 0; t < tokens; ++t) {
    const auto v = static_cast<double>(to_float(x[t * columns + j]));
    s = fma(v, v, s);
  }
  sum[j] = s;
}

/// out[j] = factor * x[j]
template <class T>
__global__ void scale(const T* x, index_t count, T factor, T* out) {
  const index_t j = element();
  if (j < count) out[j] = x[j] * factor;
}

/// numbers[j] = j
template <class Index>
__global__ void number(Index* numbers, index_t count) {
  const index_t j = element();
  if (j < count) numbers[j] = static_cast<Index>(j);
}

/// How columns are chosen: from each of value_heads runs of head_dim columns as many as `chosen`,
/// and the same ones in `repeats` copies of the run.
struct head_choice {
  index_t value_heads;
  index_t repeats;
  index_t head_dim;
  index_t chosen;

  __device__ index_t shared_columns() const { return value_heads * head_dim; }
};

/// to[v][c] = the sum of s[v][r][c] over r, in order.
template <class T>
__global__ void add_repeats(head_choice heads, const T* s, T* to) {
  const index_t i = element();
  if (i >= heads.shared_columns()) return;
  const index_t v = i / heads.head_dim;
  T sum = 0;
  for (index_t r = 0; r < heads.repeats; ++r) {
    sum += s[(v * heads.repeats + r) * heads.head_dim + i % heads.head_dim];
  }
  to[i] = sum;
}

/// Sets is_chosen (0 or 1) of every column. @param order columns of each run, the best ones first
template <class Index>
__global__ void mark_chosen(head_choice heads, const Index* order, Index* is_chosen) {
  const index_t i = element();
  if (i >= heads.shared_columns()) return;
  const index_t v = i / heads.head_dim;
  const index_t channel = order[i] - v * heads.head_dim;
  for (index_t r = 0; r < heads.repeats; ++r) {
    is_chosen[(v * heads.repeats + r) * heads.head_dim + channel] =
        i % heads.head_dim < heads.chosen ? 1 : 0;
  }
}

/// Sets is_chosen of the columns in a list. @param is_chosen zeros before
template <class Index>
__global__ void mark_listed(const Index* list, index_t count, Index* is_chosen) {
  const index_t j = element();
  if (j < count) is_chosen[list[j]] = 1;
}

/// Lists the chosen columns in ascending order.
/// @param before chosen columns in front of each column
template <class Index>
__global__ void list_columns(const Index* is_chosen, const Index* before, index_t columns,
                             Index* chosen) {
  const index_t j = element();
  if (j < columns && is_chosen[j] != 0) chosen[before[j]] = static_cast<Index>(j);
}

/// source[i] = the column that moves to i where those of each head that are not chosen come first,
/// then those that are, both in order.
/// @param before   chosen columns in front of each column
/// @param head_dim columns of a head  @param head_chosen of them
template <class Index>
__global__ void order_chosen_last(const Index* is_chosen, const Index* before, index_t columns,
                                  index_t head_dim, index_t head_chosen, Index* source) {
  const index_t j = element();
  if (j >= columns) return;
  const index_t head = j / head_dim;
  const index_t before_in_head = before[j] - head * head_chosen;
  source[is_chosen[j] != 0 ? (head + 1) * head_dim - head_chosen + before_in_head
                           : j - before_in_head] = static_cast<Index>(j);
}

/// *mean = the mean of x, summed up in order. For one block.
template <class T>
__global__ void mean_in_order(const T* x, index_t count, T* mean) {
  constexpr int staged = 1024;
  __shared__ T part[staged];
  T sum = 0;
  for (index_t first = 0; first < count; first += staged) {
    const int here = static_cast<int>(min(count - first, index_t{staged}));
    for (int i = static_cast<int>(threadIdx.x); i < here; i += static_cast<int>(blockDim.x)) {
      part[i] = x[first + i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < here; ++i) sum += part[i];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *mean = sum / static_cast<T>(count);
}

/// sum[j] += x[j] / *mean, where is_chosen says so, or everywhere when that is null. Nothing is
/// added when the mean is 0.
template <class T, class Index>
__global__ void add_in_means(const T* x, const T* mean, const Index* is_chosen, index_t count,
                             T* sum) {
  const index_t j = element();
  if (j >= count || *mean == 0) return;
  if (is_chosen == nullptr || is_chosen[j] != 0) sum[j] += x[j] / *mean;
}

}  // namespace qeft::kernel
