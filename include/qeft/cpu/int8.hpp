// SPDX-License-Identifier: Apache-2.0
// Inner products of codes and activations rounded to 8 bits: the `int8` activation policy.
#pragma once

#include <limits>

#include "qeft/cpu/exact.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu {

namespace detail {

/// acc(Tokens, 32) = panel * x.
/// @param panel as int8::decode writes it
/// @param x     (8 * column_tiles quads, Tokens) words of four bytes
template <int Halves, class Isa, int Tokens>
void multiply_int8_block(const std::uint32_t* panel, index_t column_tiles, const std::int8_t* x,
                         float* acc) {
  using pair = vectors<Isa, 2>;
  constexpr int quads = 8;
  for (index_t row = 0; row < tile_rows; row += pair::lanes) {
    alignas(64) c_array<std::uint32_t, Tokens* pair::lanes> sum = {};
    const std::uint32_t* w = panel + row;
    const std::int8_t* xt = x;
    for (index_t t = 0; t < column_tiles; ++t, xt += quads * Tokens * 4) {
      for (int half = 0; half < Halves; ++half) {
        c_array<typename pair::byte_sums, Tokens> bytes;
        unroll<Tokens>([&](auto i) QEFT_INLINE_LAMBDA { bytes[i] = pair::zero_sums(); });
        for (int q = 0; q < quads; ++q, w += tile_rows) {
          const auto weights = pair::load(w);
          unroll<Tokens>([&](auto i) QEFT_INLINE_LAMBDA {
            bytes[i] =
                pair::multiply_add(bytes[i], weights, Isa::broadcast(xt + (q * Tokens + i) * 4));
          });
        }
        unroll<Tokens>([&](auto i) QEFT_INLINE_LAMBDA {
          const auto products = pair::widen(bytes[i]);
          std::uint32_t* s = sum + i * pair::lanes;
          pair::store(s, pair::load(s) + (half == 0 ? products : products << 4));
        });
      }
    }
    unroll<Tokens>([&](auto i) QEFT_INLINE_LAMBDA {
      pair::store(acc + i * tile_rows + row, pair::to_floats(pair::load(sum + i * pair::lanes)));
    });
  }
}

}  // namespace detail

/// Activation policy: the activations of dense columns are rounded, per token and chunk of at most
/// 128 columns of one group, to multiples of max |x| / 127; products are integers. Weak columns,
/// which is where outliers are, stay in FP32.
///
/// An output is off by at most the sum over chunks of max |x| / 254 times the sum of |w| (and by
/// the rounding errors of FP32). On average by much less: with Gaussian activations by 0.6 %
/// (norm-wise) in chunks of 128 columns and 0.5 % in groups of 32, whatever the code width. An
/// outlier in a dense column makes the step of its chunk as much larger: then use exact.
struct int8 {
  using value_type = std::int8_t;
  static constexpr index_t columns_together = 4;

  /// Four activations to a word, in the order of the codes that isolate_quad finds side by side.
  struct packing {
    std::uint8_t column[32];  // of byte 4 * q + b

    template <int Bits>
    static packing of() {
      packing p{};
      for (int i = 0; i < 32; ++i) {
        p.column[i] = static_cast<std::uint8_t>(tile_fields<Bits>::quad_column(i / 4, i % 4));
      }
      return p;
    }
  };

  /// As exact::pack; quad q is at out[4 * q * stride] and behind it, and `step` is what one unit
  /// stands for.
  static void pack(const float* x, index_t columns, const packing& how, std::int8_t* out,
                   index_t stride, float& sum, float& step) {
    using detail::tile_columns;
    // A NaN reaches the step, hence every output.
    step = qeft::detail::bits_to_float(detail::largest_magnitude(x, columns)) / 127.0F;
    // Below the normal range the reciprocal may overflow: such chunks count as zero.
    const float inverse = step >= std::numeric_limits<float>::min() ? 1.0F / step : 0.0F;

    // Adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low bits.
    std::int32_t rounded[detail::chunk_list::max_columns];
    std::int32_t total = 0;
    for (index_t c = 0; c < columns; ++c) {
      const std::uint32_t bits = qeft::detail::float_to_bits(x[c] * inverse + 12582912.0F);
      rounded[c] = static_cast<std::int8_t>(bits & 0xffU);
      total += rounded[c];
    }
    sum = static_cast<float>(total);
    for (index_t c = 0; c < columns; c += tile_columns) {
      for (index_t i = 0; i < tile_columns; ++i) {
        out[(c + i) / 4 * 4 * stride + i % 4] =
            static_cast<std::int8_t>(rounded[c + how.column[i]]);
      }
    }
  }

  /// acc(Tiles, 32) = codes * x over `column_tiles` tiles of 32 columns in each of Tiles row tiles.
  template <int Bits, class Isa, int Tiles>
  static void dot(const std::uint32_t* const* codes, index_t column_tiles, const std::int8_t* x,
                  float* acc) {
    using namespace detail;
    using fields = tile_fields<Bits>;
    using rows = row_vectors<Isa>;
    constexpr index_t tile_words = layout::simd_tile::tile_words<Bits>();

    c_array<typename rows::words, Tiles> sum;
    unroll<Tiles>([&](auto i) QEFT_INLINE_LAMBDA { sum[i] = rows::zero_words(); });
    for (index_t t = 0; t < column_tiles; ++t, x += tile_columns) {
      unroll<Tiles>([&](auto i) QEFT_INLINE_LAMBDA {
        const std::uint32_t* tile = codes[i] + t * tile_words;
        unroll<fields::halves>([&](auto half) QEFT_INLINE_LAMBDA {
          auto bytes = rows::zero_sums();
          unroll<fields::quads>([&](auto q) QEFT_INLINE_LAMBDA {
            constexpr int w = fields::quad_word(q);
            if constexpr (half == 0) prefetch_tile<Isa, q, fields::quads>(tile, tile_words);
            const auto word =
                fields::template join<w>(rows::load(tile + fields::low_word(w) * tile_rows),
                                         rows::load(tile + fields::high_word(w) * tile_rows));
            bytes = rows::multiply_add(bytes, fields::template isolate_quad<q, half>(word),
                                       Isa::broadcast(x + 4 * q));
          });
          const auto products = rows::widen(bytes);
          sum[i] = sum[i] + (half == 0 ? products : products << 4);
        });
      });
    }
    unroll<Tiles>([&](auto i) QEFT_INLINE_LAMBDA {
      rows::store(acc + i * tile_rows, rows::to_floats(sum[i]));
    });
  }

  /// A chunk of one row tile as (column tiles, halves, 8 quads, 32) words of four bytes.
  template <int Bits>
  using panel = detail::c_array<std::uint32_t, detail::chunk_list::max_columns / 4 *
                                                   tile_fields<Bits>::halves * detail::tile_rows>;

  template <int Bits, class Isa>
  static void decode(const std::uint32_t* tile, index_t column_tiles, std::uint32_t* panel) {
    using namespace detail;
    using fields = tile_fields<Bits>;
    using rows = row_vectors<Isa>;
    constexpr index_t tile_words = layout::simd_tile::tile_words<Bits>();
    for (index_t t = 0; t < column_tiles; ++t) {
      prefetch_tile<Isa>(tile, tile_words);
      unroll<fields::quads>([&](auto q) QEFT_INLINE_LAMBDA {
        constexpr int w = fields::quad_word(q);
        const auto word =
            fields::template join<w>(rows::load(tile + fields::low_word(w) * tile_rows),
                                     rows::load(tile + fields::high_word(w) * tile_rows));
        unroll<fields::halves>([&](auto half) QEFT_INLINE_LAMBDA {
          rows::store(panel + (half * fields::quads + q) * tile_rows,
                      fields::template isolate_quad<q, half>(word));
        });
      });
      tile += tile_words;
      panel += fields::halves * fields::quads * tile_rows;
    }
  }

  /// acc(tokens, 32) = panel * x for 1 <= tokens <= Isa::tokens.
  template <int Bits, class Isa>
  static void multiply(const std::uint32_t* panel, index_t column_tiles, const std::int8_t* x,
                       index_t tokens, float* acc) {
    constexpr int halves = tile_fields<Bits>::halves;
    detail::unroll<Isa::tokens>([&](auto i) QEFT_INLINE_LAMBDA {
      if (tokens == i + 1) {
        detail::multiply_int8_block<halves, Isa, i + 1>(panel, column_tiles, x, acc);
      }
    });
  }
};

}  // namespace cpu
}  // namespace QEFT_TARGET
}  // namespace qeft
