// SPDX-License-Identifier: Apache-2.0
// Causal attention over cached keys and values, in FP32.
#pragma once

#include "qeft/core/host_buffer.hpp"
#include "qeft/core/on_host.hpp"

namespace qeft_llm {

/// Keys and values of one block for the tokens seen so far.
///
/// 32 keys lie side by side, values one after another: then both products of attention run over
/// vectors of 32 numbers without a sum across lanes.
class block_cache {
 public:
  static constexpr qeft::index_t lanes = 32;

  block_cache() = default;
  /// Room for `capacity` tokens of `heads` key/value heads.
  block_cache(qeft::index_t heads, qeft::index_t head_dim, qeft::index_t capacity);

  qeft::index_t heads() const noexcept { return heads_; }
  qeft::index_t head_dim() const noexcept { return head_dim_; }
  qeft::index_t capacity() const noexcept { return capacity_; }
  /// Floats from one value to the next.
  qeft::index_t value_stride() const noexcept { return value_stride_; }

  /// @param keys, values of the token at `position`, (heads, head_dim)
  void store(qeft::index_t position, const float* keys, const float* values) noexcept;

  /// The keys of positions 32 * block to 32 * block + 31, (head_dim, 32).
  const float* keys(qeft::index_t head, qeft::index_t block) const noexcept {
    return keys_.data() + (head * blocks_ + block) * head_dim_ * lanes;
  }
  /// (capacity, value_stride), with zeros from head_dim on.
  const float* values(qeft::index_t head) const noexcept {
    return values_.data() + head * capacity_ * value_stride_;
  }

 private:
  qeft::index_t heads_ = 0;
  qeft::index_t head_dim_ = 0;
  qeft::index_t capacity_ = 0;
  qeft::index_t blocks_ = 0;
  qeft::index_t value_stride_ = 0;
  qeft::host_buffer<float> keys_;    // (heads, blocks, head_dim, 32)
  qeft::host_buffer<float> values_;  // (heads, capacity, value_stride)
};

/// out[t, h] = sum_s softmax_s(q[t, h] . key_s / sqrt(head_dim)) value_s over the positions s that
/// token t, at position first + t, may see: itself and those before it, or the last `window` of
/// them when window > 0. `heads` / cache.heads() query heads in a row share a key/value head.
///
/// A token's result depends neither on the other tokens of the call nor on the number of threads.
/// @param q, out (tokens, heads, head_dim)
/// @pre the cache holds positions [0, first + tokens)
void causal_attention(const qeft::on_host& exec, const block_cache& cache, qeft::index_t heads,
                      const float* q, qeft::index_t tokens, qeft::index_t first,
                      qeft::index_t window, float* out);

/// Sizes of attention over a whole sequence.
struct attention_shape {
  qeft::index_t tokens;
  qeft::index_t heads;        // of q
  qeft::index_t value_heads;  // of k and v; divides heads
  qeft::index_t head_dim;
  qeft::index_t window;  // as in causal_attention
};

/// What causal_attention reads and makes of a sequence whose first token is its first, and the
/// gradient of that: q, out (tokens, heads, head_dim), k, v (tokens, value_heads, head_dim).
///
/// The weights of attention are computed again, some tokens at a time. dq, dk and dv are
/// overwritten; they do not depend on the number of threads.
void causal_attention_gradient(const qeft::on_host& exec, const attention_shape& shape,
                               const float* q, const float* k, const float* v, const float* dout,
                               float* dq, float* dk, float* dv);

}  // namespace qeft_llm
