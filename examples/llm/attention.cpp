// SPDX-License-Identifier: Apache-2.0
#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementwise.hpp"
#include "qeft/cpu/simd.hpp"

namespace qeft_llm {

using qeft::index_t;

namespace {

constexpr index_t lanes = block_cache::lanes;

// Tokens per task: enough to keep keys and values in cache between them, few enough to share out.
constexpr index_t task_tokens = 16;

// Queries at a time: they share every load of a key or value, and their sums fit in registers.
constexpr int max_rows = qeft::cpu::native_isa::lanes == 16 ? 4 : 2;

/// sum[r][l] = sum_i a[r][i] * b[i * stride + l], in ascending i.
template <std::size_t Rows>
void product(const float* const* a, index_t depth, const float* b, index_t stride,
             float (*sum)[lanes]) noexcept {
  float acc[static_cast<std::size_t>(Rows)][lanes] = {};
  for (index_t i = 0; i < depth; ++i) {
    for (std::size_t r = 0; r < Rows; ++r) {
      const float x = a[r][i];
      for (index_t l = 0; l < lanes; ++l) acc[r][l] += x * b[i * stride + l];
    }
  }
  std::memcpy(sum, acc, sizeof acc);
}

/// A query, the positions it sees, and where its result goes.
struct query {
  const float* q;
  index_t begin;
  index_t end;
  float* out;
};

/// @param weights room for Rows * ceil(last end / 32) * 32 floats
template <std::size_t Rows>
void attend_rows(const block_cache& cache, index_t head, const query* rows, float* weights) {
  const index_t dim = cache.head_dim();
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  const index_t end = rows[Rows - 1].end;  // of later queries, no smaller than of earlier ones
  const index_t first_block = rows[0].begin / lanes;
  const index_t stride = qeft::round_up(end, lanes);
  float sum[static_cast<std::size_t>(Rows)][lanes];

  const float* operand[static_cast<std::size_t>(Rows)];
  for (std::size_t r = 0; r < Rows; ++r) operand[r] = rows[r].q;
  for (index_t block = first_block; block * lanes < end; ++block) {
    product<Rows>(operand, dim, cache.keys(head, block), lanes, sum);
    for (std::size_t r = 0; r < Rows; ++r) {
      float* to = weights + static_cast<index_t>(r) * stride + block * lanes;
      for (index_t l = 0; l < lanes; ++l) to[l] = sum[r][l] * scale;
    }
  }
  // What a query does not see gets weight zero, which leaves its sums as they are.
  const index_t begin = first_block * lanes;
  for (std::size_t r = 0; r < Rows; ++r) {
    float* w = weights + static_cast<index_t>(r) * stride;
    std::fill(w + begin, w + rows[r].begin, 0.0F);
    softmax(w + rows[r].begin, rows[r].end - rows[r].begin);
    std::fill(w + rows[r].end, w + end, 0.0F);
    operand[r] = w + begin;
  }
  const float* values = cache.values(head) + begin * cache.value_stride();
  for (index_t d = 0; d < dim; d += lanes) {
    product<Rows>(operand, end - begin, values + d, cache.value_stride(), sum);
    const auto bytes = static_cast<std::size_t>(std::min(lanes, dim - d)) * sizeof(float);
    for (std::size_t r = 0; r < Rows; ++r) std::memcpy(rows[r].out + d, sum[r], bytes);
  }
}

}  // namespace

block_cache::block_cache(index_t heads, index_t head_dim, index_t capacity)
    : heads_(heads),
      head_dim_(head_dim),
      capacity_(capacity),
      blocks_(qeft::ceil_div(capacity, lanes)),
      value_stride_(qeft::round_up(head_dim, lanes)),
      keys_(static_cast<std::size_t>(heads * blocks_ * head_dim * lanes)),
      values_(static_cast<std::size_t>(heads * capacity * value_stride_)) {}

void block_cache::store(index_t position, const float* keys, const float* values) noexcept {
  for (index_t h = 0; h < heads_; ++h) {
    float* column =
        keys_.data() + (h * blocks_ + position / lanes) * head_dim_ * lanes + position % lanes;
    for (index_t d = 0; d < head_dim_; ++d) column[d * lanes] = keys[h * head_dim_ + d];
    std::memcpy(values_.data() + (h * capacity_ + position) * value_stride_, values + h * head_dim_,
                static_cast<std::size_t>(head_dim_) * sizeof(float));
  }
}

void causal_attention(const qeft::on_host& exec, const block_cache& cache, index_t heads,
                      const float* q, index_t tokens, index_t first, index_t window, float* out) {
  const index_t dim = cache.head_dim();
  const index_t group = heads / cache.heads();
  const index_t token_blocks = qeft::ceil_div(tokens, task_tokens);
  exec.parallel_for(cache.heads() * token_blocks, 1, [&](index_t task, index_t last_task) {
    qeft::host_buffer<float> weights(
        static_cast<std::size_t>(max_rows * qeft::round_up(first + tokens, lanes)));
    for (; task < last_task; ++task) {
      const index_t head = task % cache.heads();
      const index_t begin = task / cache.heads() * task_tokens;
      const index_t end = std::min(begin + task_tokens, tokens);
      const auto row = [&](index_t i) {
        const index_t t = begin + i / group;
        const index_t at = (t * heads + head * group + i % group) * dim;
        const index_t seen = first + t + 1;
        return query{q + at, window > 0 ? std::max<index_t>(0, seen - window) : 0, seen, out + at};
      };
      const index_t rows = (end - begin) * group;
      index_t i = 0;
      for (; i + max_rows <= rows; i += max_rows) {
        query several[max_rows];
        for (int r = 0; r < max_rows; ++r) several[r] = row(i + r);
        attend_rows<max_rows>(cache, head, several, weights.data());
      }
      for (; i < rows; ++i) {
        const query one = row(i);
        attend_rows<1>(cache, head, &one, weights.data());
      }
    }
  });
}

}  // namespace qeft_llm
