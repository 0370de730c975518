// SPDX-License-Identifier: Apache-2.0
// The products of the backward pass: every sum runs in blocks of fixed size, in ascending order,
// and belongs to one task.
#pragma once

#include "qeft/cpu/activation_source.hpp"
#include "qeft/cpu/interleaved.hpp"
#include "qeft/cpu/weight_panel.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

/// What is multiplied at a time: vectors that are interleaved, terms of their sums so that those
/// stay in the second-level cache, and terms so that a panel stays in the first-level cache.
inline constexpr index_t gradient_vectors = 192;
inline constexpr index_t gradient_terms = 1024;
inline constexpr index_t panel_terms = 128;

inline index_t least(index_t a, index_t b) noexcept { return a < b ? a : b; }

/// to(count) = values, or to += values.
template <class Isa>
void store_or_add(const float* values, index_t count, bool add, float* to) {
  index_t i = 0;
  for (; i + Isa::lanes <= count; i += Isa::lanes) {
    const auto value = Isa::load(values + i);
    Isa::store(to + i, add ? Isa::add(Isa::load(to + i), value) : value);
  }
  for (; i < count; ++i) to[i] = add ? to[i] + values[i] : values[i];
}

/// dX = dY W over panels of 32 slots of the kernel's order of input columns.
template <int Bits, class Isa>
class input_gradient_product {
  static_assert(gradient_vectors % Isa::tokens == 0, "pieces of dy are made of whole blocks");

 public:
  input_gradient_product(const tile_layer& w, const run_list& runs, float* dx)
      : w_(w), runs_(runs), dx_(dx), slots_(w.extent.dense + w.extent.weak) {}

  /// Of all tokens. @param dy (tokens, OC)
  void run(const on_host& exec, const float* dy, index_t tokens, bool accumulate) const {
    const index_t rows = w_.extent.out_channels;
    interleaved<Isa> packed(least(tokens, gradient_vectors) * least(rows, gradient_terms));
    for (index_t token = 0; token < tokens; token += gradient_vectors) {
      for (index_t row = 0; row < rows; row += gradient_terms) {
        const float* from = dy + token * rows + row;
        const index_t terms = least(rows - row, gradient_terms);
        packed.resize(least(tokens - token, gradient_vectors), terms);
        packed.for_each_block(
            exec, [&](index_t v) { packed.fill(v, 0, terms, from + v * rows, rows, 1); });
        exec.parallel_for(ceil_div(slots_, tile_columns), 1, [&](index_t panel, index_t end) {
          for (; panel < end; ++panel) {
            add_panel(packed, token, row, terms, panel * tile_columns, accumulate || row > 0);
          }
        });
      }
    }
  }

 private:
  /// The terms of rows [row, row + terms) to the slots from `slot` on.
  void add_panel(const interleaved<Isa>& dy, index_t token, index_t row, index_t terms,
                 index_t slot, bool add) const {
    alignas(64) c_array<float, gradient_vectors * tile_columns> y;
    alignas(64) c_array<float, panel_terms * tile_columns> weights;
    for (index_t i = 0; i < dy.vectors() * tile_columns; ++i) y[i] = 0.0F;
    for (index_t first = 0; first < terms; first += panel_terms) {
      const index_t depth = least(terms - first, panel_terms);
      for (index_t r = 0; r < depth; r += tile_rows) {
        decode_rows<Bits, Isa>(w_, (row + first + r) / tile_rows, slot, weights + r * tile_columns);
      }
      add_product<Isa>(weights, depth, dy, first, y);
    }
    const activation_run* run = runs_.data();
    while (run->slot + run->count <= slot) ++run;
    for (index_t v = 0; v < dy.vectors(); ++v) {
      store(run, slot, y + v * tile_columns, add, dx_ + (token + v) * slots_);
    }
  }

  /// Slots [slot, slot + 32) of a token to its row of dx. @param run that of `slot`
  void store(const activation_run* run, index_t slot, const float* y, bool add, float* row) const {
    const index_t end = least(slot + tile_columns, slots_);
    for (index_t at = slot; at < end; ++run) {
      const index_t here = least(run->slot + run->count, end) - at;
      store_or_add<Isa>(y + (at - slot), here, add, row + run->column + (at - run->slot));
      at += here;
    }
  }

  const tile_layer& w_;
  const run_list& runs_;
  float* dx_;  // (tokens, IC)
  index_t slots_;
};

/// panel(count, 32) = columns [column, column + 32) of rows of a (rows, columns) matrix; zeros
/// beyond the last column.
template <class Isa>
void load_panel(const float* from, index_t count, index_t columns, index_t column, float* panel) {
  using lanes = row_vectors<Isa>;
  const index_t here = least(columns - column, tile_rows);
  for (index_t i = 0; i < count; ++i, panel += tile_rows) {
    const float* row = from + i * columns + column;
    if (here == tile_rows) {
      lanes::store(panel, lanes::load(row));
    } else {
      for (index_t r = 0; r < tile_rows; ++r) panel[r] = r < here ? row[r] : 0.0F;
    }
  }
}

/// dW(OC, k) = dY^T X_weak, by tiles of 32 output channels.
template <class Isa>
class weak_gradient_product {
  static_assert(gradient_vectors % Isa::tokens == 0 && gradient_vectors % Isa::lanes == 0,
                "pieces of x_weak are made of whole blocks, and padded to whole vectors");

 public:
  weak_gradient_product(index_t out_channels, index_t k, float* dw)
      : out_channels_(out_channels), k_(k), dw_(dw) {}

  /// Of all tokens. @param dy (tokens, OC) @param x_weak (tokens, k)
  void run(const on_host& exec, const float* dy, const float* x_weak, index_t tokens,
           bool accumulate) const {
    interleaved<Isa> packed(least(k_, gradient_vectors) * least(tokens, gradient_terms));
    for (index_t column = 0; column < k_; column += gradient_vectors) {
      index_t token = 0;
      do {  // once if there are no tokens
        const float* from = x_weak + token * k_ + column;
        const index_t terms = least(tokens - token, gradient_terms);
        packed.resize(least(k_ - column, gradient_vectors), terms);
        packed.for_each_block(exec, [&](index_t v) { packed.fill(v, 0, terms, from + v, 1, k_); });
        exec.parallel_for(ceil_div(out_channels_, tile_rows), 1, [&](index_t tile, index_t end) {
          for (; tile < end; ++tile) {
            add_tile(packed, dy + token * out_channels_, terms, tile, column,
                     accumulate || token > 0);
          }
        });
        token += gradient_terms;
      } while (token < tokens);
    }
  }

 private:
  /// The terms of some tokens to the columns from `column` on.
  void add_tile(const interleaved<Isa>& x, const float* dy, index_t terms, index_t tile,
                index_t column, bool add) const {
    alignas(64) c_array<float, gradient_vectors * tile_rows> y;
    alignas(64) c_array<float, panel_terms * tile_rows> panel;
    const index_t padded = round_up(x.vectors(), Isa::lanes);
    for (index_t i = 0; i < padded * tile_rows; ++i) y[i] = 0.0F;
    for (index_t first = 0; first < terms; first += panel_terms) {
      const index_t depth = least(terms - first, panel_terms);
      load_panel<Isa>(dy + first * out_channels_, depth, out_channels_, tile * tile_rows, panel);
      add_product<Isa>(panel, depth, x, first, y);
    }
    const index_t rows = least(out_channels_ - tile * tile_rows, tile_rows);
    for (index_t r = 0; r < rows; r += Isa::lanes) {
      alignas(64) c_array<float, gradient_vectors * Isa::lanes> of_rows;
      for (index_t v = 0; v < padded; v += Isa::lanes) {
        Isa::transpose(y + v * tile_rows + r, tile_rows, of_rows + v, gradient_vectors);
      }
      for (index_t i = 0; i < least(rows - r, Isa::lanes); ++i) {
        store_or_add<Isa>(of_rows + i * gradient_vectors, x.vectors(), add,
                          dw_ + (tile * tile_rows + r + i) * k_ + column);
      }
    }
  }

  index_t out_channels_;
  index_t k_;
  float* dw_;  // (OC, k)
};

/// The gradient of the scales, by tiles of 32 output channels.
template <int Bits, class Isa>
class scale_gradient_product {
 public:
  scale_gradient_product(const tile_layer& w, const run_list& runs, float* dscales)
      : w_(w), chunks_{w.extent.dense, w.columns_per_group}, runs_(runs), dscales_(dscales) {}

  /// Of all tokens. @param dy (tokens, OC) @param x (tokens, IC)
  void run(const on_host& exec, const float* dy, const float* x, index_t tokens,
           bool accumulate) const {
    if (w_.extent.groups == 0) return;
    const index_t in_channels = w_.extent.dense + w_.extent.weak;
    interleaved<Isa> packed(least(tokens, gradient_vectors) * w_.extent.dense);
    index_t token = 0;
    do {  // once if there are no tokens
      packed.resize(least(tokens - token, gradient_vectors), w_.extent.dense);
      packed.for_each_block(exec, [&](index_t v) {
        const float* from = x + (token + v) * in_channels;
        const activation_run* run = runs_.data();
        for (index_t slot = 0; slot < w_.extent.dense; slot += run->count, ++run) {
          packed.fill(v, slot, run->count, from + run->column, in_channels, 1);
        }
      });
      exec.parallel_for(w_.tiles(), 1, [&](index_t tile, index_t end) {
        for (; tile < end; ++tile) {
          add_tile(packed, dy + token * w_.extent.out_channels, tile, accumulate || token > 0);
        }
      });
      token += gradient_vectors;
    } while (token < tokens);
  }

 private:
  void add_tile(const interleaved<Isa>& x, const float* dy, index_t tile, bool add) const {
    alignas(64) c_array<float, gradient_vectors * tile_rows> of_tile;
    load_panel<Isa>(dy, x.vectors(), w_.extent.out_channels, tile * tile_rows, of_tile);
    alignas(64) c_array<float, tile_rows> sum = {};
    for (index_t i = 0; i < chunks_.count(); ++i) {
      const auto chunk = chunks_[i];
      add_chunk(x, of_tile, tile, chunk, sum);
      if (i + 1 < chunks_.count() && chunks_[i + 1].group == chunk.group) continue;
      store(tile, chunk.group, sum, add);
      for (float& s : sum) s = 0.0F;
    }
  }

  /// sum(32) += over tokens dy (x . (q - z)).
  void add_chunk(const interleaved<Isa>& x, const float* dy, index_t tile,
                 const chunk_list::chunk& chunk, float* sum) const {
    using rows = row_vectors<Isa>;
    alignas(64) c_array<float, chunk_list::max_columns * tile_rows> codes;
    alignas(64) c_array<float, Isa::tokens * tile_rows> product;
    const float one = 1.0F;
    const group_lanes<Isa> group{rows::broadcast(&one),
                                 w_.zero == zero_kind::scaled
                                     ? rows::zero()
                                     : load_minus_zeros<Bits, Isa>(w_, tile, chunk.group)};
    for (index_t c = 0; c < chunk.column_tiles(); ++c) {
      decode_tile<Bits, Isa>(codes_of_tile<Bits>(w_, tile, chunk.first / tile_columns + c), group,
                             codes + c * tile_columns * tile_rows);
    }
    auto total = rows::load(sum);
    for (index_t v = 0; v < x.vectors(); v += Isa::tokens) {
      const index_t tokens = x.block_vectors(v);
      multiply_panel<Isa>(codes, chunk.columns, x.at(v, chunk.first), tokens, product);
      for (index_t t = 0; t < tokens; ++t) {
        total = rows::fma(rows::load(product + t * tile_rows), rows::load(dy + (v + t) * tile_rows),
                          total);
      }
    }
    rows::store(sum, total);
  }

  void store(index_t tile, index_t group, const float* sum, bool add) const {
    const index_t first = tile * tile_rows;
    const index_t rows = least(w_.extent.out_channels - first, tile_rows);
    for (index_t r = 0; r < rows; ++r) {
      float& to = dscales_[(first + r) * w_.extent.groups + group];
      to = add ? to + sum[r] : sum[r];
    }
  }

  const tile_layer& w_;
  chunk_list chunks_;
  const run_list& runs_;
  float* dscales_;  // (OC, groups)
};

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
