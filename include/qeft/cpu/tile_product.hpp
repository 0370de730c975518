// SPDX-License-Identifier: Apache-2.0
// The product of a layer over simd_tile with any number of tokens.
#pragma once

#include "qeft/cpu/activations.hpp"
#include "qeft/cpu/tile_layer.hpp"

namespace qeft::cpu::detail {

// Tokens packed at a time: bounds the workspace to about 4 * 192 * IC bytes and keeps a chunk's
// activations in the second-level cache. A multiple of every Isa::tokens.
inline constexpr index_t token_block = 192;

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

/// The product of one layer with one block of packed tokens, by row tiles.
template <int Bits, class Activation, class Isa>
class tile_product {
 public:
  using activations = packed_activations<Activation, Isa>;

  tile_product(const tile_layer<Isa>& layer, const chunk_list& chunks, const activations& x)
      : layer_(layer),
        chunks_(chunks),
        x_(x),
        tile_words_(ceil_div(layer.dense, tile_columns) * layout::simd_tile::tile_words<Bits>()) {}

  /// Rows of Tiles tiles of the only token, codes taken straight from memory.
  template <int Tiles>
  void one_token(index_t tile, const output_rows& y, index_t offset) const {
    alignas(64) array<float, Tiles* tile_rows> out = {};
    alignas(64) array<float, Tiles * tile_rows> acc;
    group_lanes group;
    array<const std::uint32_t*, Tiles> codes;
    for (index_t i = 0; i < chunks_.count(); ++i) {
      const auto chunk = chunks_[i];
      for (int t = 0; t < Tiles; ++t) codes[t] = codes_of(tile + t, chunk);
      if constexpr (is_int8) {
        dot_codes_int8<Bits, Isa, Tiles>(codes, chunk.column_tiles(), x_.dense(0, chunk.first),
                                         acc);
      } else {
        dot_codes<Bits, Isa, Tiles>(codes, chunk.column_tiles(), x_.dense(0, chunk.first), acc);
      }
      for (int t = 0; t < Tiles; ++t) {
        layer_.load_group(tile + t, chunk.group, group);
        accumulate_chunk<Isa>(group, acc + t * tile_rows, x_.sums(0, i), x_.steps(0, i),
                              out + t * tile_rows);
      }
    }
    for (index_t j = 0; j < layer_.weak; j += chunk_list::max_columns) {
      layer_.template dot_weak<Tiles>(tile, j, weak_chunk(j), x_.weak(0, j), acc);
      for (int t = 0; t < Tiles; ++t) {
        accumulate_weak<Isa>(acc + t * tile_rows, out + t * tile_rows);
      }
    }
    for (int t = 0; t < Tiles; ++t) {
      y.store(y.y, offset + (tile + t) * tile_rows, out + t * tile_rows, rows_of(tile + t));
    }
  }

  /// Rows of one tile of all tokens: each chunk is decoded once into a panel that stays in the
  /// first-level cache.
  void all_tokens(index_t tile, const output_rows& y, index_t offset) const {
    constexpr index_t max_columns = chunk_list::max_columns;
    alignas(64) array<float, token_block * tile_rows> out;
    alignas(64) array<float, Isa::tokens * tile_rows> acc;
    alignas(64) array<float, max_columns * tile_rows> panel;
    group_lanes group;
    for (index_t i = 0; i < x_.tokens() * tile_rows; ++i) out[i] = 0.0F;

    for (index_t i = 0; i < chunks_.count(); ++i) {
      const auto chunk = chunks_[i];
      const index_t column_tiles = chunk.column_tiles();
      layer_.load_group(tile, chunk.group, group);
      if constexpr (is_int8) {
        constexpr int halves = tile_fields<Bits>::halves;
        alignas(64) array<std::uint32_t, max_columns * tile_rows / 4 * halves> bytes;
        decode_panel_int8<Bits, Isa>(codes_of(tile, chunk), column_tiles, bytes);
        for_each_block([&](index_t first, index_t tokens) {
          multiply_panel_int8<halves, Isa>(bytes, column_tiles, x_.dense(first, chunk.first),
                                           tokens, acc);
          accumulate_block(group, acc, first, tokens, i, out);
        });
      } else {
        decode_panel<Bits, Isa>(codes_of(tile, chunk), column_tiles, panel);
        for_each_block([&](index_t first, index_t tokens) {
          multiply_panel<Isa>(panel, column_tiles * tile_columns, x_.dense(first, chunk.first),
                              tokens, acc);
          accumulate_block(group, acc, first, tokens, i, out);
        });
      }
    }
    for (index_t j = 0; j < layer_.weak; j += max_columns) {
      layer_.decode_weak(tile, j, weak_chunk(j), panel);
      for_each_block([&](index_t first, index_t tokens) {
        multiply_panel<Isa>(panel, weak_chunk(j), x_.weak(first, j), tokens, acc);
        for (index_t t = 0; t < tokens; ++t) {
          accumulate_weak<Isa>(acc + t * tile_rows, out + (first + t) * tile_rows);
        }
      });
    }
    for (index_t t = 0; t < x_.tokens(); ++t) {
      y.store(y.y, offset + t * layer_.out_channels + tile * tile_rows, out + t * tile_rows,
              rows_of(tile));
    }
  }

 private:
  static constexpr bool is_int8 = std::is_same_v<Activation, int8>;

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
    return layer_.codes + tile * tile_words_ +
           chunk.first / tile_columns * layout::simd_tile::tile_words<Bits>();
  }
  index_t weak_chunk(index_t j) const {
    const index_t left = layer_.weak - j;
    return left < chunk_list::max_columns ? left : chunk_list::max_columns;
  }
  index_t rows_of(index_t tile) const {
    const index_t left = layer_.out_channels - tile * tile_rows;
    return left < tile_rows ? left : tile_rows;
  }

  const tile_layer<Isa>& layer_;
  const chunk_list& chunks_;
  const activations& x_;
  index_t tile_words_;  // codes of one row tile
};

/// y(tokens, OC) = x(tokens, IC) times the layer transposed.
template <int Bits, class Activation, class Isa>
void multiply(const on_host& exec, const tile_layer<Isa>& layer, const activation_source& source,
              index_t tokens, const output_rows& y) {
  const chunk_list chunks{layer.dense, layer.group_size};
  const packing how = make_packing<Bits>();
  packed_activations<Activation, Isa> x(chunks, layer.weak,
                                        tokens < token_block ? tokens : token_block);
  const tile_product<Bits, Activation, Isa> product(layer, chunks, x);
  constexpr int tiles_at_once = gemv_tiles<Isa>;

  for (index_t first = 0; first < tokens; first += token_block) {
    const index_t count = tokens - first < token_block ? tokens - first : token_block;
    const index_t offset = first * layer.out_channels;
    x.pack(exec, source, how, first, count);
    if (count == 1) {
      exec.parallel_for(layer.tiles(), tiles_at_once, [&](index_t begin, index_t end) {
        index_t tile = begin;
        for (; tile + tiles_at_once <= end; tile += tiles_at_once) {
          product.template one_token<tiles_at_once>(tile, y, offset);
        }
        for (; tile < end; ++tile) product.template one_token<1>(tile, y, offset);
      });
    } else {
      exec.parallel_for(layer.tiles(), 1, [&](index_t begin, index_t end) {
        for (index_t tile = begin; tile < end; ++tile) product.all_tokens(tile, y, offset);
      });
    }
  }
}

}  // namespace qeft::cpu::detail
