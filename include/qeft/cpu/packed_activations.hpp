// SPDX-License-Identifier: Apache-2.0
// Activations in the form the inner loops read: in the kernel's column order, padded, and packed
// for a register block of tokens.
#pragma once

#include "qeft/core/on_host.hpp"
#include "qeft/cpu/activation_source.hpp"
#include "qeft/cpu/chunks.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

/// The packed activations of up to `tokens` tokens, in blocks of Isa::tokens (the last one
/// smaller).
template <class Activation, class Isa>
class packed_activations {
 public:
  using value_type = typename Activation::value_type;
  using packing = typename Activation::packing;

  packed_activations(const chunk_list& chunks, index_t weak, index_t tokens)
      : chunks_(chunks),
        padded_(round_up(chunks.dense, tile_columns)),
        weak_(weak),
        dense_values_(tokens * padded_),
        weak_values_(tokens * weak_),
        sums_(tokens * chunks.count()),
        steps_(tokens * chunks.count()) {}

  /// Packs tokens [first, first + tokens) of the source.
  void pack(const on_host& exec, const activation_source& source, const packing& how, index_t first,
            index_t tokens) {
    tokens_ = tokens;
    exec.parallel_for(tokens, Isa::tokens, [&](index_t begin, index_t end) {
      for (; begin < end; begin += Isa::tokens) pack_block(source, how, first, begin);
    });
  }

  index_t tokens() const noexcept { return tokens_; }
  /// Tokens of the block that starts at token `first`.
  index_t block_tokens(index_t first) const noexcept {
    return first + Isa::tokens <= tokens_ ? Isa::tokens : tokens_ - first;
  }
  // Of the block that starts at token `first`; the innermost index is the token of the block.
  const value_type* dense(index_t first, index_t column) const noexcept {
    return dense_values_.data() + first * padded_ + column * block_tokens(first);
  }
  const float* weak(index_t first, index_t column) const noexcept {
    return weak_values_.data() + first * weak_ + column * block_tokens(first);
  }
  /// Per token: the sum of the activations of a chunk, in units of its step.
  const float* sums(index_t first, index_t chunk) const noexcept {
    return sums_.data() + first * chunks_.count() + chunk * block_tokens(first);
  }
  /// Per token: what one unit of the chunk's packed activations stands for.
  const float* steps(index_t first, index_t chunk) const noexcept {
    return steps_.data() + first * chunks_.count() + chunk * block_tokens(first);
  }

 private:
  static constexpr index_t max_columns = chunk_list::max_columns;

  /// Packs the block that starts at token `block`. A chunk of all its tokens before the next chunk:
  /// their values lie side by side.
  void pack_block(const activation_source& source, const packing& how, index_t first,
                  index_t block) {
    const index_t stride = block_tokens(block);
    activation_source::reader token[Isa::tokens];
    for (index_t t = 0; t < stride; ++t) token[t] = {source, first + block + t};

    value_type* out = dense_values_.data() + block * padded_;
    for (index_t i = 0; i < chunks_.count(); ++i) {
      const auto chunk = chunks_[i];
      const index_t at = block * chunks_.count() + i * stride;
      for (index_t t = 0; t < stride; ++t) {
        alignas(64) float x[max_columns] = {};
        token[t].read(chunk.columns, x);
        Activation::pack(x, round_up(chunk.columns, tile_columns), how,
                         out + chunk.first * stride + t * Activation::columns_together, stride,
                         sums_.data()[at + t], steps_.data()[at + t]);
      }
    }
    float* weak = weak_values_.data() + block * weak_;
    for (index_t j = 0; j < weak_; j += max_columns) {
      const index_t columns = weak_ - j < max_columns ? weak_ - j : max_columns;
      for (index_t t = 0; t < stride; ++t) {
        float x[max_columns];
        token[t].read(columns, x);
        for (index_t c = 0; c < columns; ++c) weak[(j + c) * stride + t] = x[c];
      }
    }
  }

  chunk_list chunks_;
  index_t padded_;  // dense columns in whole tiles
  index_t weak_;
  index_t tokens_ = 0;
  scratch<value_type> dense_values_;
  scratch<float> weak_values_;
  scratch<float> sums_;
  scratch<float> steps_;
};

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
