// SPDX-License-Identifier: Apache-2.0
// Inner products in FP32: the `exact` activation policy, and the weak columns of every policy.
//
// A lane is an output channel. Per output, one accumulator takes the columns in ascending order,
// for one token and for a panel; so a token's result does not depend on its batch.
//
// An activation policy has these members, all about one chunk:
//   value_type, packing         packed activations, and what their form depends on
//   columns_together            columns of one token that lie side by side, then the next token's
//   pack(x ...)                 packs a token's activations
//   dot<Bits, Isa, Tiles>(...)  codes of Tiles row tiles times one token
//   panel<Bits>, decode<Bits, Isa>(...), multiply<Bits, Isa>(...)
//                               the same in two steps, for several tokens
#pragma once

#include "qeft/cpu/chunks.hpp"
#include "qeft/cpu/tile_fields.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu {

namespace detail {

/// acc(Tokens, 32) = panel * x.
/// @param panel (columns, 32) weights
/// @param x     (columns, Tokens) activations
template <class Isa, int Tokens>
void multiply_block(const float* panel, index_t columns, const float* x, float* acc) {
  // Two vectors of rows by up to Isa::tokens tokens fill the register file with accumulators.
  using pair = vectors<Isa, 2>;
  for (index_t row = 0; row < tile_rows; row += pair::lanes) {
    c_array<typename pair::floats, Tokens> sum;
    unroll<Tokens>([&](auto t) QEFT_INLINE_LAMBDA { sum[t] = pair::zero(); });
    const float* w = panel + row;
    const float* xc = x;
    for (index_t c = 0; c < columns; ++c, w += tile_rows, xc += Tokens) {
      const auto weights = pair::load(w);
      unroll<Tokens>([&](auto t) QEFT_INLINE_LAMBDA {
        sum[t] = pair::fma(weights, Isa::broadcast(xc + t), sum[t]);
      });
    }
    unroll<Tokens>([&](auto t)
                       QEFT_INLINE_LAMBDA { pair::store(acc + t * tile_rows + row, sum[t]); });
  }
}

/// multiply_block of 1 <= tokens <= Isa::tokens tokens.
template <class Isa>
void multiply_panel(const float* panel, index_t columns, const float* x, index_t tokens,
                    float* acc) {
  unroll<Isa::tokens>([&](auto i) QEFT_INLINE_LAMBDA {
    if (tokens == i + 1) multiply_block<Isa, i + 1>(panel, columns, x, acc);
  });
}

/// The bits of |x| of the largest of `count` numbers. As integers, so that a NaN is the largest.
inline std::uint32_t largest_magnitude(const float* x, index_t count) {
  std::uint32_t largest = 0;
  for (index_t i = 0; i < count; ++i) {
    const std::uint32_t magnitude = qeft::detail::float_to_bits(x[i]) & 0x7fffffffU;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

}  // namespace detail

/// Activation policy: FP32 arithmetic.
struct exact {
  using value_type = float;
  static constexpr index_t columns_together = 1;

  /// Codes are multiplied where they lie in their words, as code * 2^e; 2^-e is the activation's.
  struct packing {
    float inverse_power[32];  // of column c % 32

    template <int Bits>
    static packing of() {
      packing p{};
      for (int c = 0; c < 32; ++c) {
        p.inverse_power[c] = 1.0F / static_cast<float>(1U << tile_fields<Bits>::exponent(c));
      }
      return p;
    }
  };

  /// One token's activations of a chunk: y += step * (scale * sum of code * x + offset * sum).
  /// @param x   (columns), a multiple of 32, padded with zeros
  /// @param out out[c * stride] = x[c] as `dot` and `multiply` want it
  static void pack(const float* x, index_t columns, const packing& how, float* out, index_t stride,
                   float& sum, float& step) {
    // So that no product with 2^-e underflows where it matters, tiny activations are scaled up.
    const bool tiny = qeft::detail::bits_to_float(detail::largest_magnitude(x, columns)) < 0x1p-60F;
    const float unit = tiny ? 0x1p64F : 1.0F;
    step = tiny ? 0x1p-64F : 1.0F;
    float partial[8] = {};
    for (index_t c = 0; c < columns; c += 8) {
      for (index_t i = 0; i < 8; ++i) partial[i] += x[c + i] * unit;
    }
    sum = ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
          ((partial[1] + partial[5]) + (partial[3] + partial[7]));
    for (index_t c = 0; c < columns; ++c) {
      out[c * stride] = x[c] * unit * how.inverse_power[c % detail::tile_columns];
    }
  }

  /// acc(Tiles, 32) = codes * x over `column_tiles` tiles of 32 columns in each of Tiles row tiles.
  template <int Bits, class Isa, int Tiles>
  static void dot(const std::uint32_t* const* codes, index_t column_tiles, const float* x,
                  float* acc) {
    using namespace detail;
    using fields = tile_fields<Bits>;
    using rows = row_vectors<Isa>;
    constexpr index_t tile_words = layout::simd_tile::tile_words<Bits>();
    // Words that interleave their columns are taken together: columns ascend.
    constexpr int blocks = fields::words / fields::interleave;
    constexpr int block_columns = 32 / blocks;

    c_array<typename rows::floats, Tiles> sum;
    unroll<Tiles>([&](auto i) QEFT_INLINE_LAMBDA { sum[i] = rows::zero(); });
    for (index_t t = 0; t < column_tiles; ++t, x += tile_columns) {
      unroll<blocks>([&](auto block) QEFT_INLINE_LAMBDA {
        c_array<c_array<typename rows::words, Tiles>, fields::interleave> word;
        unroll<Tiles * fields::interleave>([&](auto i) QEFT_INLINE_LAMBDA {
          constexpr int w = block * fields::interleave + i / Tiles;
          const std::uint32_t* tile = codes[i % Tiles] + t * tile_words;
          if constexpr (i < Tiles) prefetch_tile<Isa, block, blocks>(tile, tile_words);
          word[i / Tiles][i % Tiles] =
              fields::template join<w>(rows::load(tile + fields::low_word(w) * tile_rows),
                                       rows::load(tile + fields::high_word(w) * tile_rows));
        });
        unroll<block_columns>([&](auto i) QEFT_INLINE_LAMBDA {
          constexpr int c = block * block_columns + i;
          const auto xc = Isa::broadcast(x + c);
          unroll<Tiles>([&](auto tile) QEFT_INLINE_LAMBDA {
            const auto code = fields::template isolate<c>(word[i % fields::interleave][tile]);
            sum[tile] = rows::fma(rows::to_floats(code), xc, sum[tile]);
          });
        });
      });
    }
    unroll<Tiles>([&](auto i) QEFT_INLINE_LAMBDA { rows::store(acc + i * tile_rows, sum[i]); });
  }

  /// A chunk of one row tile as (columns, 32) floats: codes times 2^e.
  template <int Bits>
  using panel = detail::c_array<float, detail::chunk_list::max_columns * detail::tile_rows>;

  template <int Bits, class Isa>
  static void decode(const std::uint32_t* tile, index_t column_tiles, float* panel) {
    using namespace detail;
    using fields = tile_fields<Bits>;
    using rows = row_vectors<Isa>;
    constexpr index_t tile_words = layout::simd_tile::tile_words<Bits>();
    for (index_t t = 0; t < column_tiles; ++t) {
      prefetch_tile<Isa>(tile, tile_words);
      unroll<fields::words>([&](auto w) QEFT_INLINE_LAMBDA {
        const auto word =
            fields::template join<w>(rows::load(tile + fields::low_word(w) * tile_rows),
                                     rows::load(tile + fields::high_word(w) * tile_rows));
        unroll<fields::per_word>([&](auto f) QEFT_INLINE_LAMBDA {
          constexpr int c = fields::column(w, f);
          rows::store(panel + c * tile_rows, rows::to_floats(fields::template isolate<c>(word)));
        });
      });
      tile += tile_words;
      panel += tile_columns * tile_rows;
    }
  }

  /// acc(tokens, 32) = panel * x for 1 <= tokens <= Isa::tokens.
  template <int Bits, class Isa>
  static void multiply(const float* panel, index_t column_tiles, const float* x, index_t tokens,
                       float* acc) {
    detail::multiply_panel<Isa>(panel, column_tiles * detail::tile_columns, x, tokens, acc);
  }
};

}  // namespace cpu
}  // namespace QEFT_TARGET
}  // namespace qeft
