// SPDX-License-Identifier: Apache-2.0
// Inner products in FP32: the `exact` activation policy, and the weak columns of every policy.
//
// A lane is an output channel. Per output, one accumulator takes the columns in ascending order,
// both in the one-token form and in the panel form; so a token's result does not depend on its
// batch.
#pragma once

#include "qeft/cpu/simd.hpp"
#include "qeft/thread/dequantize.hpp"

namespace qeft::cpu {

/// Activation policy: FP32 arithmetic.
struct exact {
  static constexpr const char* name = "exact";
};

namespace detail {

inline constexpr index_t tile_rows = layout::simd_tile::rows;
inline constexpr index_t tile_columns = layout::simd_tile::columns;

// Codes stream from memory once; asking for them this far ahead is worth up to 1.5x on machines
// whose prefetchers stop at page boundaries.
inline constexpr index_t prefetch_bytes = 3072;

/// Asks for part `Part` of `Parts` of a tile. A burst of requests would stall the loads that
/// follow.
template <class Isa, int Part, int Parts>
QEFT_ALWAYS_INLINE void prefetch_part(const std::uint32_t* tile, index_t words) {
  const auto* ahead = reinterpret_cast<const char*>(tile) + prefetch_bytes;
  const index_t lines = 4 * words / 64;
  for (index_t line = lines * Part / Parts; line < lines * (Part + 1) / Parts; ++line) {
    Isa::prefetch(ahead + 64 * line);
  }
}

template <class Isa>
QEFT_ALWAYS_INLINE void prefetch_tile(const std::uint32_t* tile, index_t words) {
  prefetch_part<Isa, 0, 1>(tile, words);
}

/// acc(Tiles, 32) = codes * x over `column_tiles` tiles of 32 columns in each of Tiles row tiles.
/// @param x (32 * column_tiles) activations, multiplied by 2^-exponent(c % 32)
template <int Bits, class Isa, int Tiles>
void dot_codes(const std::uint32_t* const* codes, index_t column_tiles, const float* x,
               float* acc) {
  using fields = tile_fields<Bits>;
  constexpr int per_tile = static_cast<int>(tile_rows) / Isa::lanes;
  constexpr int vectors = Tiles * per_tile;
  constexpr index_t tile_words = layout::simd_tile::tile_words<Bits>();

  array<typename Isa::floats, vectors> sum;
  unroll<vectors>([&](auto v) QEFT_INLINE_LAMBDA { sum[v] = Isa::zero(); });
  for (index_t t = 0; t < column_tiles; ++t, x += tile_columns) {
    // Words that interleave their columns (3 bits) are taken in pairs.
    constexpr int block = Bits == 3 ? 2 : 1;
    constexpr int blocks = fields::words / block;
    unroll<blocks>([&](auto b) QEFT_INLINE_LAMBDA {
      for (int i = 0; i < Tiles; ++i) {
        prefetch_part<Isa, b, blocks>(codes[i] + t * tile_words, tile_words);
      }
      array<array<typename Isa::words, vectors>, block> word;
      unroll<block>([&](auto i) QEFT_INLINE_LAMBDA {
        unroll<vectors>([&](auto v) QEFT_INLINE_LAMBDA {
          const std::uint32_t* row =
              codes[v / per_tile] + t * tile_words + v % per_tile * Isa::lanes;
          constexpr int w = b * block + i;
          word[i][v] = fields::template join<w>(Isa::load(row + fields::low_word(w) * tile_rows),
                                                Isa::load(row + fields::high_word(w) * tile_rows));
        });
      });
      constexpr int block_columns = block * fields::per_word;
      unroll<block_columns>([&](auto i) QEFT_INLINE_LAMBDA {
        constexpr int column = b * block_columns + i;
        const auto xc = Isa::broadcast(x + column);
        unroll<vectors>([&](auto v) QEFT_INLINE_LAMBDA {
          const auto code =
              fields::template isolate<column>(word[fields::locate(column).word % block][v]);
          sum[v] = Isa::fma(Isa::to_floats(code), xc, sum[v]);
        });
      });
    });
  }
  unroll<vectors>([&](auto v) QEFT_INLINE_LAMBDA { Isa::store(acc + v * Isa::lanes, sum[v]); });
}

/// acc(Tiles, 32) = weak values * x over `columns` columns.
template <class Isa, int Tiles, class Scalar>
void dot_weak(const Scalar* const* values, index_t columns, const float* x, float* acc) {
  constexpr int per_tile = static_cast<int>(tile_rows) / Isa::lanes;
  constexpr int vectors = Tiles * per_tile;

  array<typename Isa::floats, vectors> sum;
  unroll<vectors>([&](auto v) QEFT_INLINE_LAMBDA { sum[v] = Isa::zero(); });
  for (index_t c = 0; c < columns; ++c) {
    const auto xc = Isa::broadcast(x + c);
    for (int i = 0; i < Tiles; ++i) Isa::prefetch(values[i] + c * tile_rows + prefetch_bytes / 2);
    unroll<vectors>([&](auto v) QEFT_INLINE_LAMBDA {
      const auto w = Isa::load(values[v / per_tile] + c * tile_rows + v % per_tile * Isa::lanes);
      sum[v] = Isa::fma(w, xc, sum[v]);
    });
  }
  unroll<vectors>([&](auto v) QEFT_INLINE_LAMBDA { Isa::store(acc + v * Isa::lanes, sum[v]); });
}

/// panel(32 * column_tiles, 32 rows) = the codes of one row tile, times 2^exponent(c % 32).
template <int Bits, class Isa>
void decode_panel(const std::uint32_t* codes, index_t column_tiles, float* panel) {
  using fields = tile_fields<Bits>;
  for (index_t t = 0; t < column_tiles; ++t) {
    prefetch_tile<Isa>(codes, layout::simd_tile::tile_words<Bits>());
    for (index_t row = 0; row < tile_rows; row += Isa::lanes) {
      unroll<fields::words>([&](auto w) QEFT_INLINE_LAMBDA {
        const auto word =
            fields::template join<w>(Isa::load(codes + fields::low_word(w) * tile_rows + row),
                                     Isa::load(codes + fields::high_word(w) * tile_rows + row));
        unroll<fields::per_word>([&](auto f) QEFT_INLINE_LAMBDA {
          constexpr int column = fields::column(w, f);
          Isa::store(panel + column * tile_rows + row,
                     Isa::to_floats(fields::template isolate<column>(word)));
        });
      });
    }
    codes += layout::simd_tile::tile_words<Bits>();
    panel += tile_columns * tile_rows;
  }
}

/// panel(columns, 32 rows) = the weak values of one row tile.
template <class Isa, class Scalar>
void decode_weak_panel(const Scalar* values, index_t columns, float* panel) {
  for (index_t i = 0; i < columns * tile_rows; i += Isa::lanes) {
    Isa::store(panel + i, Isa::load(values + i));
  }
}

/// acc(Tokens, 32) = panel * x.
/// @param panel (columns, 32) weights
/// @param x     (columns, Tokens) activations
template <class Isa, int Tokens>
void multiply_panel_block(const float* panel, index_t columns, const float* x, float* acc) {
  // Two vectors of rows by up to Isa::tokens tokens fill the register file with accumulators.
  for (index_t row = 0; row < tile_rows; row += 2 * Isa::lanes) {
    array<array<typename Isa::floats, Tokens>, 2> sum;
    unroll<Tokens>([&](auto t) QEFT_INLINE_LAMBDA { sum[0][t] = sum[1][t] = Isa::zero(); });
    const float* w = panel + row;
    const float* xc = x;
    for (index_t c = 0; c < columns; ++c, w += tile_rows, xc += Tokens) {
      const auto w0 = Isa::load(w);
      const auto w1 = Isa::load(w + Isa::lanes);
      unroll<Tokens>([&](auto t) QEFT_INLINE_LAMBDA {
        const auto xt = Isa::broadcast(xc + t);
        sum[0][t] = Isa::fma(w0, xt, sum[0][t]);
        sum[1][t] = Isa::fma(w1, xt, sum[1][t]);
      });
    }
    unroll<Tokens>([&](auto t) QEFT_INLINE_LAMBDA {
      Isa::store(acc + t * tile_rows + row, sum[0][t]);
      Isa::store(acc + t * tile_rows + row + Isa::lanes, sum[1][t]);
    });
  }
}

/// multiply_panel_block of 1 <= tokens <= Isa::tokens tokens.
template <class Isa>
void multiply_panel(const float* panel, index_t columns, const float* x, index_t tokens,
                    float* acc) {
  unroll<Isa::tokens>([&](auto i) QEFT_INLINE_LAMBDA {
    if (tokens == i + 1) multiply_panel_block<Isa, i + 1>(panel, columns, x, acc);
  });
}

}  // namespace detail

}  // namespace qeft::cpu
