// SPDX-License-Identifier: Apache-2.0
// Activations in the form the inner loops read: in the kernel's column order, padded, and packed
// for a register block of tokens.
#pragma once

#include <limits>

#include "qeft/core/host_buffer.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/cpu/int8_dot.hpp"
#include "qeft/thread/activation_index.hpp"

namespace qeft::cpu::detail {

/// The dense columns, cut into chunks: pieces of one group of at most 128 columns. What a panel
/// holds, what int8 scales together, and what is summed before scale and zero point apply.
struct chunk_list {
  static constexpr index_t max_columns = 128;

  struct chunk {
    index_t group;
    index_t first;    // dense column, a multiple of 32
    index_t columns;  // 1 .. max_columns
    index_t column_tiles() const noexcept { return ceil_div(columns, tile_columns); }
  };

  index_t dense;       // columns
  index_t group_size;  // columns; at least 1

  index_t per_group() const noexcept { return ceil_div(group_size, max_columns); }
  index_t count() const noexcept {
    const index_t full_groups = dense / group_size;
    return full_groups * per_group() + ceil_div(dense % group_size, max_columns);
  }
  chunk operator[](index_t i) const noexcept {
    const index_t group = i / per_group();
    const index_t first = group * group_size + i % per_group() * max_columns;
    index_t end = first + max_columns;
    if (end > (group + 1) * group_size) end = (group + 1) * group_size;
    if (end > dense) end = dense;
    return {group, first, end - first};
  }
};

/// How a code width wants its activations: constants of tile_fields<Bits>, as a table so that
/// packing is compiled once for all widths.
struct packing {
  float scale[32];               // exact: 2^-exponent(column)
  std::uint8_t quad_column[32];  // int8: column of byte 4 * q + b
};

template <int Bits>
inline packing make_packing() {
  packing p{};
  for (int c = 0; c < 32; ++c) {
    p.scale[c] = 1.0F / static_cast<float>(1U << tile_fields<Bits>::exponent(c));
    p.quad_column[c] = static_cast<std::uint8_t>(tile_fields<Bits>::quad_column(c / 4, c % 4));
  }
  return p;
}

/// Calls body(column, slot, count) for runs that cover every column once and keep neighbours
/// together: activation_column(slot + i) == column + i for i < count. Runs may be empty.
template <class Weak, class Body>
void for_each_activation_run(const Weak& weak, index_t in_channels, const Body& body) {
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

/// Where the activations of a call come from: any element type and weak policy behind one
/// signature.
struct activation_source {
  const void* x;     // (tokens, IC)
  const void* weak;  // the weak policy
  index_t in_channels;
  /// row(IC) = activations of a token, dense columns first, then the weak ones.
  void (*gather)(const activation_source&, index_t token, float* row);
};

template <class Isa, class Weak, class X>
void gather_activations(const activation_source& source, index_t token, float* row) {
  const X* x = static_cast<const X*>(source.x) + token * source.in_channels;
  for_each_activation_run(*static_cast<const Weak*>(source.weak), source.in_channels,
                          [&](index_t column, index_t slot, index_t count) {
                            index_t i = 0;
                            for (; i + Isa::lanes <= count; i += Isa::lanes) {
                              Isa::store(row + slot + i, Isa::load(x + column + i));
                            }
                            for (; i < count; ++i) row[slot + i] = to_float(x[column + i]);
                          });
}

/// @pre `weak` outlives the source
template <class Isa, class Weak, class X>
activation_source make_source(const X* x, const Weak& weak, index_t in_channels) {
  return {x, &weak, in_channels, &gather_activations<Isa, Weak, X>};
}

/// The packed activations of up to `tokens` tokens, in blocks of Isa::tokens (the last one
/// smaller).
template <class Activation, class Isa>
class packed_activations {
 public:
  using value_type = std::conditional_t<std::is_same_v<Activation, int8>, std::int8_t, float>;

  packed_activations(const chunk_list& chunks, index_t weak, index_t tokens)
      : chunks_(chunks),
        padded_(round_up(chunks.dense, tile_columns)),
        weak_(weak),
        dense_values_(static_cast<std::size_t>(tokens * padded_)),
        weak_values_(static_cast<std::size_t>(tokens * weak_)),
        sums_(static_cast<std::size_t>(tokens * chunks.count())),
        steps_(sums_.size()) {}

  /// Packs tokens [first, first + tokens) of the source.
  void pack(const on_host& exec, const activation_source& source, const packing& how, index_t first,
            index_t tokens) {
    tokens_ = tokens;
    exec.parallel_for(tokens, Isa::tokens, [&](index_t begin, index_t end) {
      host_buffer<float> row(static_cast<std::size_t>(source.in_channels));
      for (index_t token = begin; token < end; ++token) {
        source.gather(source, first + token, row.data());
        pack_token(row.data(), how, token);
      }
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
  void pack_token(const float* row, const packing& how, index_t token) {
    const index_t block = token / Isa::tokens * Isa::tokens;
    const index_t stride = block_tokens(block);
    const index_t lane = token - block;

    float* weak_out = weak_values_.data() + block * weak_ + lane;
    for (index_t j = 0; j < weak_; ++j) weak_out[j * stride] = row[chunks_.dense + j];

    value_type* out = dense_values_.data() + block * padded_;
    const index_t base = block * chunks_.count() + lane;
    for (index_t i = 0; i < chunks_.count(); ++i) {
      const auto chunk = chunks_[i];
      alignas(64) float x[chunk_list::max_columns] = {};
      for (index_t c = 0; c < chunk.columns; ++c) x[c] = row[chunk.first + c];
      const auto index = static_cast<std::size_t>(base + i * stride);
      pack_chunk(x, round_up(chunk.columns, tile_columns), how, out + chunk.first * stride, stride,
                 lane, sums_[index], steps_[index]);
    }
  }

  /// A chunk of one token, zero-padded to whole column tiles.
  static void pack_chunk(const float* x, index_t columns, const packing& how, float* out,
                         index_t stride, index_t lane, float& sum, float& step) {
    float partial[8] = {};
    for (index_t c = 0; c < columns; c += 8) {
      for (index_t i = 0; i < 8; ++i) partial[i] += x[c + i];
    }
    sum = ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
          ((partial[1] + partial[5]) + (partial[3] + partial[7]));
    step = 1.0F;
    for (index_t c = 0; c < columns; ++c) out[c * stride + lane] = x[c] * how.scale[c % 32];
  }

  static void pack_chunk(const float* x, index_t columns, const packing& how, std::int8_t* out,
                         index_t stride, index_t lane, float& sum, float& step) {
    // As integers, so that a NaN is the largest of all and reaches the step, hence every output.
    std::uint32_t largest = 0;
    for (index_t c = 0; c < columns; ++c) {
      const std::uint32_t magnitude = qeft::detail::float_to_bits(x[c]) & 0x7fffffffU;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float max = qeft::detail::bits_to_float(largest);
    step = max / 127.0F;
    // Below the normal range the reciprocal may overflow: such chunks count as zero.
    const float inverse = step >= std::numeric_limits<float>::min() ? 1.0F / step : 0.0F;

    // Adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low bits.
    std::int32_t rounded[chunk_list::max_columns];
    std::int32_t total = 0;
    for (index_t c = 0; c < columns; ++c) {
      const std::uint32_t bits = qeft::detail::float_to_bits(x[c] * inverse + 12582912.0F);
      rounded[c] = static_cast<std::int8_t>(bits & 0xffU);
      total += rounded[c];
    }
    sum = static_cast<float>(total);
    for (index_t c = 0; c < columns; c += tile_columns) {
      for (index_t i = 0; i < tile_columns; ++i) {
        const index_t quad = (c + i) / 4;
        out[(quad * stride + lane) * 4 + i % 4] =
            static_cast<std::int8_t>(rounded[c + how.quad_column[i]]);
      }
    }
  }

  chunk_list chunks_;
  index_t padded_;
  index_t weak_;
  index_t tokens_ = 0;
  host_buffer<value_type> dense_values_;
  host_buffer<float> weak_values_;
  host_buffer<float> sums_;
  host_buffer<float> steps_;
};

}  // namespace qeft::cpu::detail
