// SPDX-License-Identifier: Apache-2.0
// The product of a layer over simd_tile with any number of tokens.
#pragma once

#include "qeft/cpu/exact.hpp"
#include "qeft/cpu/output.hpp"
#include "qeft/cpu/packed_activations.hpp"
#include "qeft/cpu/tile_layer.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

// Tokens packed at a time: bounds the workspace to about 4 * 192 * IC bytes and keeps a chunk's
// activations in the second-level cache. A multiple of every Isa::tokens.
inline constexpr index_t token_block = 192;

/// Row tiles that gemv takes at once: eight accumulators hide the latency of an addition.
template <class Isa>
inline constexpr int gemv_tiles = Isa::lanes <= 4 ? 1 : Isa::lanes / 4;

/// y(32) += step * (scale * acc + offset * sum): where the parameters of a group reach the sums of
/// a chunk, for one token.
template <class Isa>
QEFT_ALWAYS_INLINE void add_chunk(const group_lanes<Isa>& group, const float* acc, const float* sum,
                                  const float* step, float* y) {
  using rows = row_vectors<Isa>;
  const auto shift = rows::mul(group.offset, Isa::broadcast(sum));
  const auto value = rows::fma(group.scale, rows::load(acc), shift);
  rows::store(y, rows::fma(value, Isa::broadcast(step), rows::load(y)));
}

/// y(32) += acc(32): a chunk of weak columns.
template <class Isa>
QEFT_ALWAYS_INLINE void add_weak_chunk(const float* acc, float* y) {
  using rows = row_vectors<Isa>;
  rows::store(y, rows::add(rows::load(y), rows::load(acc)));
}

/// The product of one layer with packed tokens, by row tiles.
template <int Bits, class Activation, class Isa>
class tile_product {
 public:
  using activations = packed_activations<Activation, Isa>;

  tile_product(const tile_layer& w, const chunk_list& chunks, const activations& x, const output& y)
      : w_(w), chunks_(chunks), x_(x), y_(y) {}

  /// Row tiles [tile, tile + count), count <= Tiles, of the only token, which is number `token`:
  /// codes are taken straight from memory.
  template <int Tiles>
  void gemv(index_t tile, index_t count, index_t token) const {
    alignas(64) c_array<float, Tiles* tile_rows> y = {};
    alignas(64) c_array<float, Tiles * tile_rows> acc;
    c_array<const std::uint32_t*, Tiles> codes;
    c_array<index_t, Tiles> tiles;  // the last one again where there are fewer
    for (index_t t = 0; t < Tiles; ++t) tiles[t] = tile + (t < count ? t : count - 1);

    for (index_t i = 0; i < chunks_.count(); ++i) {
      const auto chunk = chunks_[i];
      for (int t = 0; t < Tiles; ++t) codes[t] = codes_of(tiles[t], chunk);
      Activation::template dot<Bits, Isa, Tiles>(codes, chunk.column_tiles(),
                                                 x_.dense(0, chunk.first), acc);
      for (int t = 0; t < Tiles; ++t) {
        add_chunk<Isa>(load_group<Bits, Isa>(w_, tiles[t], chunk.group), acc + t * tile_rows,
                       x_.sums(0, i), x_.steps(0, i), y + t * tile_rows);
      }
    }
    for (index_t j = 0; j < w_.extent.weak; j += chunk_list::max_columns) {
      dot_weak<Isa, Tiles>(w_, tiles, j, weak_chunk(j), x_.weak(0, j), acc);
      for (int t = 0; t < Tiles; ++t) add_weak_chunk<Isa>(acc + t * tile_rows, y + t * tile_rows);
    }
    for (index_t t = 0; t < count; ++t) store(tiles[t], token, y + t * tile_rows);
  }

  /// One row tile of all tokens, the first of which is number `token`: each chunk is decoded once
  /// into a panel that stays in the first-level cache.
  void gemm(index_t tile, index_t token) const {
    alignas(64) c_array<float, token_block * tile_rows> y;
    alignas(64) c_array<float, Isa::tokens * tile_rows> acc;
    for (index_t i = 0; i < x_.tokens() * tile_rows; ++i) y[i] = 0.0F;

    for (index_t i = 0; i < chunks_.count(); ++i) {
      const auto chunk = chunks_[i];
      alignas(64) typename Activation::template panel<Bits> panel;
      Activation::template decode<Bits, Isa>(codes_of(tile, chunk), chunk.column_tiles(), panel);
      const auto group = load_group<Bits, Isa>(w_, tile, chunk.group);
      for_each_block([&](index_t first, index_t tokens) {
        Activation::template multiply<Bits, Isa>(panel, chunk.column_tiles(),
                                                 x_.dense(first, chunk.first), tokens, acc);
        for (index_t t = 0; t < tokens; ++t) {
          add_chunk<Isa>(group, acc + t * tile_rows, x_.sums(first, i) + t, x_.steps(first, i) + t,
                         y + (first + t) * tile_rows);
        }
      });
    }
    for (index_t j = 0; j < w_.extent.weak; j += chunk_list::max_columns) {
      alignas(64) c_array<float, chunk_list::max_columns * tile_rows> panel;
      decode_weak<Isa>(w_, tile, j, weak_chunk(j), panel);
      for_each_block([&](index_t first, index_t tokens) {
        multiply_panel<Isa>(panel, weak_chunk(j), x_.weak(first, j), tokens, acc);
        for (index_t t = 0; t < tokens; ++t) {
          add_weak_chunk<Isa>(acc + t * tile_rows, y + (first + t) * tile_rows);
        }
      });
    }
    for (index_t t = 0; t < x_.tokens(); ++t) store(tile, token + t, y + t * tile_rows);
  }

 private:
  /// body(first token, tokens) for each register block.
  template <class Body>
  void for_each_block(const Body& body) const {
    for (index_t first = 0; first < x_.tokens(); first += Isa::tokens) {
      body(first, x_.block_tokens(first));
    }
  }
  const std::uint32_t* codes_of(index_t tile, const chunk_list::chunk& chunk) const {
    const index_t column_tile =
        tile * layout::simd_tile::column_tiles(w_.extent) + chunk.first / tile_columns;
    return w_.codes + column_tile * layout::simd_tile::tile_words<Bits>();
  }
  index_t weak_chunk(index_t j) const {
    const index_t left = w_.extent.weak - j;
    return left < chunk_list::max_columns ? left : chunk_list::max_columns;
  }
  void store(index_t tile, index_t token, float* y) const {
    const index_t left = w_.extent.out_channels - tile * tile_rows;
    y_.store(token, tile * tile_rows, y, left < tile_rows ? left : tile_rows);
  }

  const tile_layer& w_;
  const chunk_list& chunks_;
  const activations& x_;
  const output& y_;
};

/// y(tokens, OC) = x(tokens, IC) times the layer transposed.
/// @tparam Batch whether there may be more than one token; without it, half as much is compiled
template <bool Batch, int Bits, class Activation, class Isa>
void multiply(const on_host& exec, const tile_layer& w, const activation_source& source,
              index_t tokens, const output& y) {
  const chunk_list chunks{w.extent.dense, w.columns_per_group};
  const auto packing = Activation::packing::template of<Bits>();
  packed_activations<Activation, Isa> x(chunks, w.extent.weak,
                                        tokens < token_block ? tokens : token_block);
  const tile_product<Bits, Activation, Isa> product(w, chunks, x, y);

  for (index_t first = 0; first < tokens; first += token_block) {
    const index_t count = tokens - first < token_block ? tokens - first : token_block;
    x.pack(exec, source, packing, first, count);
    if (!Batch || count == 1) {
      constexpr int tiles = gemv_tiles<Isa>;
      exec.parallel_for(w.tiles(), tiles, [&](index_t tile, index_t end) {
        for (; tile < end; tile += tiles) {
          product.template gemv<tiles>(tile, end - tile < tiles ? end - tile : tiles, first);
        }
      });
    } else if constexpr (Batch) {
      exec.parallel_for(w.tiles(), 1, [&](index_t tile, index_t end) {
        for (; tile < end; ++tile) product.gemm(tile, first);
      });
    }
  }
}

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
