// SPDX-License-Identifier: Apache-2.0
// Inner products of codes and activations rounded to 8 bits: the `int8` activation policy.
#pragma once

#include "qeft/cpu/exact_dot.hpp"

namespace qeft::cpu {

/// Activation policy: the activations of dense columns are rounded, per token and chunk of at most
/// 128 columns of one group, to multiples of max |x| / 127; products are integers. Weak columns,
/// which is where outliers are, stay in FP32. With Gaussian activations the result is off by 0.5 to
/// 0.7 % (norm-wise); with outliers in dense columns by more: then use exact.
struct int8 {
  static constexpr const char* name = "int8";
};

namespace detail {

/// acc(Tiles, 32) = codes * x, as dot_codes.
/// @param x (8 quads of 4 bytes per tile of 32 columns), byte b of quad q being column
/// quad_column(q, b)
template <int Bits, class Isa, int Tiles>
void dot_codes_int8(const std::uint32_t* const* codes, index_t column_tiles, const std::int8_t* x,
                    float* acc) {
  using fields = tile_fields<Bits>;
  constexpr int per_tile = static_cast<int>(tile_rows) / Isa::lanes;
  constexpr index_t tile_words = layout::simd_tile::tile_words<Bits>();

  array<typename Isa::words, Tiles * per_tile> sum;
  unroll<Tiles * per_tile>([&](auto v) QEFT_INLINE_LAMBDA { sum[v] = Isa::zero_words(); });
  for (index_t t = 0; t < column_tiles; ++t, x += tile_columns) {
    unroll<Tiles * per_tile>([&](auto v) QEFT_INLINE_LAMBDA {
      const std::uint32_t* tile = codes[v / per_tile] + t * tile_words;
      const std::uint32_t* row = tile + v % per_tile * Isa::lanes;
      prefetch_part<Isa, v % per_tile, per_tile>(tile, tile_words);
      unroll<fields::halves>([&](auto half) QEFT_INLINE_LAMBDA {
        auto bytes = Isa::zero_sums();
        unroll<fields::quads>([&](auto q) QEFT_INLINE_LAMBDA {
          constexpr int w = fields::quad_word(q);
          const auto word =
              fields::template join<w>(Isa::load(row + fields::low_word(w) * tile_rows),
                                       Isa::load(row + fields::high_word(w) * tile_rows));
          bytes = Isa::multiply_add(bytes, fields::template isolate_quad<q, half>(word),
                                    Isa::broadcast(x + 4 * q));
        });
        const auto products = Isa::widen(bytes);
        sum[v] = sum[v] + (half == 0 ? products : products << 4);
      });
    });
  }
  unroll<Tiles * per_tile>(
      [&](auto v) QEFT_INLINE_LAMBDA { Isa::store(acc + v * Isa::lanes, Isa::to_floats(sum[v])); });
}

/// panel(column_tiles, halves, 8 quads, 32 rows) = the codes of one row tile as words of four
/// bytes.
template <int Bits, class Isa>
void decode_panel_int8(const std::uint32_t* codes, index_t column_tiles, std::uint32_t* panel) {
  using fields = tile_fields<Bits>;
  for (index_t t = 0; t < column_tiles; ++t) {
    prefetch_tile<Isa>(codes, layout::simd_tile::tile_words<Bits>());
    for (index_t row = 0; row < tile_rows; row += Isa::lanes) {
      unroll<fields::quads>([&](auto q) QEFT_INLINE_LAMBDA {
        constexpr int w = fields::quad_word(q);
        const auto word =
            fields::template join<w>(Isa::load(codes + fields::low_word(w) * tile_rows + row),
                                     Isa::load(codes + fields::high_word(w) * tile_rows + row));
        unroll<fields::halves>([&](auto half) QEFT_INLINE_LAMBDA {
          Isa::store(panel + (half * fields::quads + q) * tile_rows + row,
                     fields::template isolate_quad<q, half>(word));
        });
      });
    }
    codes += layout::simd_tile::tile_words<Bits>();
    panel += fields::halves * fields::quads * tile_rows;
  }
}

/// acc(Tokens, 32) = panel * x.
/// @param panel as decode_panel_int8 writes it
/// @param x     (8 * column_tiles quads, Tokens) words of four bytes
template <int Halves, class Isa, int Tokens>
void multiply_panel_int8_block(const std::uint32_t* panel, index_t column_tiles,
                               const std::int8_t* x, float* acc) {
  constexpr int quads = 8;
  for (index_t row = 0; row < tile_rows; row += 2 * Isa::lanes) {
    alignas(64) array<std::uint32_t, 2 * Tokens* Isa::lanes> sum = {};
    const std::uint32_t* w = panel + row;
    const std::int8_t* xt = x;
    for (index_t t = 0; t < column_tiles; ++t, xt += quads * Tokens * 4) {
      for (int half = 0; half < Halves; ++half) {
        array<typename Isa::byte_sums, 2 * Tokens> bytes;
        unroll<2 * Tokens>([&](auto i) QEFT_INLINE_LAMBDA { bytes[i] = Isa::zero_sums(); });
        for (int q = 0; q < quads; ++q, w += tile_rows) {
          const auto w0 = Isa::load(w);
          const auto w1 = Isa::load(w + Isa::lanes);
          unroll<Tokens>([&](auto i) QEFT_INLINE_LAMBDA {
            const auto xq = Isa::broadcast(xt + (q * Tokens + i) * 4);
            bytes[2 * i] = Isa::multiply_add(bytes[2 * i], w0, xq);
            bytes[2 * i + 1] = Isa::multiply_add(bytes[2 * i + 1], w1, xq);
          });
        }
        unroll<2 * Tokens>([&](auto i) QEFT_INLINE_LAMBDA {
          const auto products = Isa::widen(bytes[i]);
          std::uint32_t* s = sum + i * Isa::lanes;
          Isa::store(s, Isa::load(s) + (half == 0 ? products : products << 4));
        });
      }
    }
    unroll<2 * Tokens>([&](auto i) QEFT_INLINE_LAMBDA {
      Isa::store(acc + i / 2 * tile_rows + row + i % 2 * Isa::lanes,
                 Isa::to_floats(Isa::load(sum + i * Isa::lanes)));
    });
  }
}

/// multiply_panel_int8_block of 1 <= tokens <= Isa::tokens tokens.
template <int Halves, class Isa>
void multiply_panel_int8(const std::uint32_t* panel, index_t column_tiles, const std::int8_t* x,
                         index_t tokens, float* acc) {
  unroll<Isa::tokens>([&](auto i) QEFT_INLINE_LAMBDA {
    if (tokens == i + 1) {
      multiply_panel_int8_block<Halves, Isa, i + 1>(panel, column_tiles, x, acc);
    }
  });
}

}  // namespace detail

}  // namespace qeft::cpu
