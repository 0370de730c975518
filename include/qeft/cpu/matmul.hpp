// SPDX-License-Identifier: Apache-2.0
// Products of a quantised layer with activations on the host: gemv for one token, gemm for any
// number.
#pragma once

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/cpu/activations.hpp"
#include "qeft/cpu/group_lanes.hpp"
#include "qeft/thread/dot.hpp"
#include "qeft/thread/group.hpp"

namespace qeft {

namespace cpu::detail {

// Tokens packed at a time: bounds the workspace to about 4 * 192 * IC bytes and keeps a chunk's
// activations in the second-level cache. A multiple of every Isa::tokens.
inline constexpr index_t token_block = 192;

// Row tiles per panel pass of gemv: 64 rows give eight accumulators of AVX2, enough to hide the
// latency of the additions.
inline constexpr int gemv_tiles = 2;

/// y(32) += step * (scale * acc + offset * sum): a chunk of one token.
template <class Isa>
QEFT_ALWAYS_INLINE void accumulate_chunk(const group_lanes& group, const float* acc,
                                         const float* sum, const float* step, float* y) {
  const auto vector_sum = Isa::broadcast(sum);
  const auto vector_step = Isa::broadcast(step);
  for (index_t i = 0; i < tile_rows; i += Isa::lanes) {
    const auto shift = Isa::mul(Isa::load(group.offset + i), vector_sum);
    const auto value = Isa::fma(Isa::load(group.scale + i), Isa::load(acc + i), shift);
    Isa::store(y + i, Isa::fma(vector_step, value, Isa::load(y + i)));
  }
}

/// y(32) += acc(32): a chunk of weak columns.
template <class Isa>
QEFT_ALWAYS_INLINE void accumulate_weak(const float* acc, float* y) {
  for (index_t i = 0; i < tile_rows; i += Isa::lanes) {
    Isa::store(y + i, Isa::add(Isa::load(y + i), Isa::load(acc + i)));
  }
}

/// Writes up to 32 outputs.
template <class Isa, class Y>
void store_rows(Y* y, const float* values, index_t rows) {
  index_t i = 0;
  for (; i + Isa::lanes <= rows; i += Isa::lanes) Isa::store(y + i, Isa::load(values + i));
  for (; i < rows; ++i) y[i] = from_float<Y>(values[i]);
}

/// The product of one layer with one block of packed tokens, by row tiles.
template <class F, class Activation, class Isa>
class tile_product {
 public:
  using view_type = quantized_matrix_view<F, weak_tail<>, layout::simd_tile>;
  using activations = packed_activations<Activation, Isa>;

  tile_product(const view_type& w, const chunk_list& chunks, const activations& x)
      : w_(w), chunks_(chunks), x_(x), tile_stride_(layout::simd_tile::column_tiles(w.extent())) {}

  /// Rows of Tiles tiles of the only token.
  template <int Tiles, class Y>
  void one_token(index_t tile, Y* y) const {
    alignas(64) array<float, Tiles* tile_rows> out = {};
    alignas(64) array<float, Tiles * tile_rows> acc;
    group_lanes group;
    array<const std::uint32_t*, Tiles> codes;
    for (index_t i = 0; i < chunks_.count(); ++i) {
      const auto chunk = chunks_[i];
      for (int t = 0; t < Tiles; ++t) codes[t] = codes_of(tile + t, chunk);
      dot<Tiles>(codes, chunk.column_tiles(), x_.dense(0, chunk.first), acc);
      for (int t = 0; t < Tiles; ++t) {
        load_group<Isa>(w_, tile + t, chunk.group, group);
        accumulate_chunk<Isa>(group, acc + t * tile_rows, x_.sums(0, i), x_.steps(0, i),
                              out + t * tile_rows);
      }
    }
    array<const typename F::scalar_type*, Tiles> weak;
    for (index_t j = 0; j < w_.weak_columns(); j += chunk_list::max_columns) {
      for (int t = 0; t < Tiles; ++t) weak[t] = weak_of(tile + t, j);
      dot_weak<Isa, Tiles>(weak, weak_chunk(j), x_.weak(0, j), acc);
      for (int t = 0; t < Tiles; ++t) {
        accumulate_weak<Isa>(acc + t * tile_rows, out + t * tile_rows);
      }
    }
    for (int t = 0; t < Tiles; ++t) {
      store_rows<Isa>(y + (tile + t) * tile_rows, out + t * tile_rows, rows_of(tile + t));
    }
  }

  /// Rows of one tile of all tokens: each chunk is decoded once into a panel that stays in the
  /// first-level cache.
  /// @param y (tokens, OC)
  template <class Y>
  void all_tokens(index_t tile, Y* y) const {
    constexpr int halves = tile_fields<F::bits>::halves;
    alignas(64) array<float, token_block * tile_rows> out;
    alignas(64) array<float, Isa::tokens * tile_rows> acc;
    alignas(64) array<float, chunk_list::max_columns * tile_rows> panel;
    group_lanes group;
    for (index_t i = 0; i < x_.tokens() * tile_rows; ++i) out[i] = 0.0F;

    for (index_t i = 0; i < chunks_.count(); ++i) {
      const auto chunk = chunks_[i];
      load_group<Isa>(w_, tile, chunk.group, group);
      const index_t column_tiles = chunk.column_tiles();
      if constexpr (is_int8) {
        alignas(64) array<std::uint32_t, chunk_list::max_columns * tile_rows / 4 * halves> bytes;
        decode_panel_int8<F::bits, Isa>(codes_of(tile, chunk), column_tiles, bytes);
        for_each_block([&](index_t first, index_t tokens) {
          multiply_panel_int8<halves, Isa>(bytes, column_tiles, x_.dense(first, chunk.first),
                                           tokens, acc);
          accumulate_block(group, acc, first, tokens, i, out);
        });
      } else {
        decode_panel<F::bits, Isa>(codes_of(tile, chunk), column_tiles, panel);
        for_each_block([&](index_t first, index_t tokens) {
          multiply_panel<Isa>(panel, column_tiles * tile_columns, x_.dense(first, chunk.first),
                              tokens, acc);
          accumulate_block(group, acc, first, tokens, i, out);
        });
      }
    }
    for (index_t j = 0; j < w_.weak_columns(); j += chunk_list::max_columns) {
      decode_weak_panel<Isa>(weak_of(tile, j), weak_chunk(j), panel);
      for_each_block([&](index_t first, index_t tokens) {
        multiply_panel<Isa>(panel, weak_chunk(j), x_.weak(first, j), tokens, acc);
        for (index_t t = 0; t < tokens; ++t) {
          accumulate_weak<Isa>(acc + t * tile_rows, out + (first + t) * tile_rows);
        }
      });
    }
    for (index_t t = 0; t < x_.tokens(); ++t) {
      store_rows<Isa>(y + t * w_.out_channels + tile * tile_rows, out + t * tile_rows,
                      rows_of(tile));
    }
  }

 private:
  static constexpr bool is_int8 = std::is_same_v<Activation, int8>;

  template <int Tiles>
  static void dot(const std::uint32_t* const* codes, index_t column_tiles,
                  const typename activations::value_type* x, float* acc) {
    if constexpr (is_int8) {
      dot_codes_int8<F::bits, Isa, Tiles>(codes, column_tiles, x, acc);
    } else {
      dot_codes<F::bits, Isa, Tiles>(codes, column_tiles, x, acc);
    }
  }

  /// body(first token, tokens) for each register block.
  template <class Body>
  void for_each_block(const Body& body) const {
    for (index_t first = 0; first < x_.tokens(); first += Isa::tokens) {
      body(first, x_.block_tokens(first));
    }
  }

  void accumulate_block(const group_lanes& group, const float* acc, index_t first, index_t tokens,
                        index_t chunk, float* out) const {
    const float* sums = x_.sums(first, chunk);
    const float* steps = x_.steps(first, chunk);
    for (index_t t = 0; t < tokens; ++t) {
      accumulate_chunk<Isa>(group, acc + t * tile_rows, sums + t, steps + t,
                            out + (first + t) * tile_rows);
    }
  }

  const std::uint32_t* codes_of(index_t tile, const chunk_list::chunk& chunk) const {
    return w_.codes + (tile * tile_stride_ + chunk.first / tile_columns) *
                          layout::simd_tile::tile_words<F::bits>();
  }
  const typename F::scalar_type* weak_of(index_t tile, index_t j) const {
    return w_.weak_values + layout::simd_tile::weak_index(w_.extent(), tile * tile_rows, j);
  }
  index_t weak_chunk(index_t j) const {
    const index_t left = w_.weak_columns() - j;
    return left < chunk_list::max_columns ? left : chunk_list::max_columns;
  }
  index_t rows_of(index_t tile) const {
    const index_t left = w_.out_channels - tile * tile_rows;
    return left < tile_rows ? left : tile_rows;
  }

  const view_type& w_;
  const chunk_list& chunks_;
  const activations& x_;
  index_t tile_stride_;
};

/// The product over simd_tile, whatever the weak policy and the type of the activations were.
template <class F, class Activation, class Isa, class Y>
void multiply(const on_host& exec,
              const quantized_matrix_view<F, weak_tail<>, layout::simd_tile>& w,
              const activation_source& source, index_t tokens, Y* y) {
  const chunk_list chunks{w.dense_columns(), w.group_size()};
  const index_t tiles = ceil_div(w.out_channels, tile_rows);
  const packing how = make_packing<F::bits>();
  packed_activations<Activation, Isa> x(chunks, w.weak_columns(),
                                        tokens < token_block ? tokens : token_block);
  const tile_product<F, Activation, Isa> product(w, chunks, x);

  for (index_t first = 0; first < tokens; first += token_block) {
    const index_t count = tokens - first < token_block ? tokens - first : token_block;
    Y* out = y + first * w.out_channels;
    x.pack(exec, source, how, first, count);
    if (count == 1) {
      exec.parallel_for(tiles, gemv_tiles, [&](index_t begin, index_t end) {
        index_t tile = begin;
        for (; tile + gemv_tiles <= end; tile += gemv_tiles) {
          product.template one_token<gemv_tiles>(tile, out);
        }
        for (; tile < end; ++tile) product.template one_token<1>(tile, out);
      });
    } else {
      exec.parallel_for(tiles, 1, [&](index_t begin, index_t end) {
        for (index_t tile = begin; tile < end; ++tile) product.all_tokens(tile, out);
      });
    }
  }
}

/// The stored bytes of every weak policy are those of weak_tail.
template <class F, class W>
quantized_matrix_view<F, weak_tail<>, layout::simd_tile> as_tail(
    const quantized_matrix_view<F, W, layout::simd_tile>& w) {
  return {w.out_channels, w.in_channels, w.run_time_group, {{w.weak_columns()}},
          w.codes,        w.scales,      w.zeros,          w.weak_values};
}

template <class T>
inline constexpr bool is_activation_scalar_v =
    std::is_same_v<T, float> || std::is_same_v<T, half_bits> || std::is_same_v<T, bf16_bits>;

inline status check_operands(index_t tokens, const void* x, const void* y) {
  if (tokens < 0) {
    return {errc::invalid_argument,
            "gemm: tokens is " + std::to_string(tokens) + ", but must not be negative"};
  }
  if (tokens > 0 && (x == nullptr || y == nullptr)) {
    return {errc::invalid_argument, std::string("gemm: ") + (x == nullptr ? "x" : "y") +
                                        " is null, but there are " + std::to_string(tokens) +
                                        " tokens"};
  }
  return {};
}

}  // namespace cpu::detail

/// Whether gemm would accept these operands, and why not.
template <class F, class W, class L, class X, class Y>
status supports_gemm(const quantized_matrix_view<F, W, L>& w, const X* x, index_t tokens,
                     const Y* y) {
  if (w.out_channels < 1 || w.in_channels < 1 || w.dense_columns() < 0) {
    return {errc::invalid_argument,
            "gemm: w is " + std::to_string(w.out_channels) + " x " + std::to_string(w.in_channels) +
                " with " + std::to_string(w.weak_columns()) +
                " weak columns, but must have at least one row and column and at most in_channels "
                "weak columns"};
  }
  const bool no_codes = w.dense_columns() > 0 && (w.codes == nullptr || w.scales == nullptr);
  const bool no_weak = w.weak_columns() > 0 && w.weak_values == nullptr;
  if (no_codes || no_weak) {
    return {errc::invalid_argument, std::string("gemm: w has no ") +
                                        (no_codes ? "codes or scales" : "weak values") +
                                        "; make the view with quantized_matrix::view"};
  }
  return cpu::detail::check_operands(tokens, x, y);
}

/// Y = X W^T (METHOD section 5), accumulated in FP32. A token's result depends neither on the other
/// tokens, nor on their number, nor on the number of threads.
///
/// @param exec       executor; blocks until done
/// @param w          OC x IC layer. Over layout::simd_tile by vector kernels; over any other layout
/// by
///                   the definition, slowly, and with exact activations only
/// @param x          (tokens, IC) row-major, finite; float, half_bits or bf16_bits
/// @param tokens     >= 0
/// @param y          (tokens, OC) row-major, must not overlap x; float, half_bits or bf16_bits
/// @param activation cpu::exact: FP32 arithmetic. cpu::int8: see there
/// @param isa        instruction set, one of cpu::isa that is compiled in
/// @return what supports_gemm says; on failure y is untouched. May throw std::bad_alloc: the packed
///         activations of up to 192 tokens are allocated per call
template <class F, class W, class L, class X, class Y, class Activation = cpu::exact,
          class Isa = cpu::native_isa>
status gemm(const on_host& exec, const quantized_matrix_view<F, W, L>& w, const X* x,
            index_t tokens, Y* y, Activation activation = {}, [[maybe_unused]] Isa isa = {}) {
  static_assert(cpu::detail::is_activation_scalar_v<X> && cpu::detail::is_activation_scalar_v<Y>,
                "qeft::gemm: X and Y must be float, qeft::half_bits or qeft::bf16_bits");
  static_assert(std::is_same_v<L, layout::simd_tile> || std::is_same_v<Activation, cpu::exact>,
                "qeft::gemm: the int8 activation policy needs layout::simd_tile");
  static_cast<void>(activation);
  if (status s = supports_gemm(w, x, tokens, y); !s.ok()) return s;
  if constexpr (std::is_same_v<L, layout::simd_tile>) {
    const auto source = cpu::detail::make_source<Isa>(x, w.weak, w.in_channels);
    cpu::detail::multiply<F, Activation, Isa>(exec, cpu::detail::as_tail(w), source, tokens, y);
  } else {
    exec.parallel_for(w.out_channels, 1, [&](index_t begin, index_t end) {
      for (index_t n = begin; n < end; ++n) {
        for (index_t t = 0; t < tokens; ++t) {
          y[t * w.out_channels + n] =
              from_float<Y>(row_dot(w, n, x + t * w.in_channels, serial_group{}));
        }
      }
    });
  }
  return {};
}

/// y = W x: gemm of one token. @param x (IC) @param y (OC)
template <class F, class W, class L, class X, class Y, class Activation = cpu::exact,
          class Isa = cpu::native_isa>
status gemv(const on_host& exec, const quantized_matrix_view<F, W, L>& w, const X* x, Y* y,
            Activation activation = {}, Isa isa = {}) {
  return gemm(exec, w, x, 1, y, activation, isa);
}

/// gemm for a layer whose format is known at run time, out of Formats. A format that is not built
/// in is errc::unsupported.
template <class Formats = default_formats, class L, class X, class Y, class Activation = cpu::exact,
          class Isa = cpu::native_isa>
status gemm(const on_host& exec, const quantized_matrix<L>& w, const X* x, index_t tokens, Y* y,
            Activation activation = {}, Isa isa = {}) {
  status result;
  try {
    w.template visit<Formats>([&](const auto& view) {
      static_cast<void>(result = gemm(exec, view, x, tokens, y, activation, isa));
    });
  } catch (const error& e) {
    return {e.code(), e.what()};
  }
  return result;
}

/// gemv for a layer whose format is known at run time, out of Formats.
template <class Formats = default_formats, class L, class X, class Y, class Activation = cpu::exact,
          class Isa = cpu::native_isa>
status gemv(const on_host& exec, const quantized_matrix<L>& w, const X* x, Y* y,
            Activation activation = {}, Isa isa = {}) {
  return gemm<Formats>(exec, w, x, 1, y, activation, isa);
}

}  // namespace qeft
