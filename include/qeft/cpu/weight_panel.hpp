// SPDX-License-Identifier: Apache-2.0
// Weights as FP32 numbers, a tile of 32 rows and 32 columns at a time: what dequantize says, bit
// for bit.
#pragma once

#include "qeft/cpu/tile_fields.hpp"
#include "qeft/cpu/tile_layer.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

/// columns(32, 32 rows) = scale * code + offset of a tile of codes.
template <int Bits, class Isa>
void decode_tile(const std::uint32_t* tile, const group_lanes<Isa>& group, float* columns) {
  using fields = tile_fields<Bits>;
  using rows = row_vectors<Isa>;
  prefetch_tile<Isa>(tile, layout::simd_tile::tile_words<Bits>());
  unroll<fields::words>([&](auto w) QEFT_INLINE_LAMBDA {
    const auto word = fields::template join<w>(rows::load(tile + fields::low_word(w) * tile_rows),
                                               rows::load(tile + fields::high_word(w) * tile_rows));
    unroll<fields::per_word>([&](auto f) QEFT_INLINE_LAMBDA {
      constexpr int c = fields::column(w, f);
      const auto code = fields::template isolate<c>(word) >> fields::exponent(c);
      rows::store(columns + c * tile_rows,
                  rows::fma(rows::to_floats(code), group.scale, group.offset));
    });
  });
}

/// The codes of row tile `tile` and column tile `column_tile`.
template <int Bits>
const std::uint32_t* codes_of_tile(const tile_layer& w, index_t tile, index_t column_tile) {
  return w.codes + (tile * layout::simd_tile::column_tiles(w.extent) + column_tile) *
                       layout::simd_tile::tile_words<Bits>();
}

/// panel(32 rows, 32) = weights of row tile `tile` and slots [slot, slot + 32) of the kernel's
/// order of input columns. Columns of the panel without a slot hold any numbers.
/// @param slot a multiple of 32
template <int Bits, class Isa>
void decode_rows(const tile_layer& w, index_t tile, index_t slot, float* panel) {
  alignas(64) c_array<float, tile_columns * tile_rows> columns;
  const index_t dense = w.extent.dense;
  if (slot < dense) {
    decode_tile<Bits, Isa>(codes_of_tile<Bits>(w, tile, slot / tile_columns),
                           load_group<Bits, Isa>(w, tile, slot / w.columns_per_group), columns);
  }
  const index_t first_weak = slot < dense ? dense : slot;
  const index_t end =
      slot + tile_columns < dense + w.extent.weak ? slot + tile_columns : dense + w.extent.weak;
  if (first_weak < end) {
    decode_weak<Isa>(w, tile, first_weak - dense, end - first_weak,
                     columns + (first_weak - slot) * tile_rows);
  }
  for (index_t c = 0; c < tile_columns; c += Isa::lanes) {
    for (index_t r = 0; r < tile_rows; r += Isa::lanes) {
      Isa::transpose(columns + c * tile_rows + r, tile_rows, panel + r * tile_columns + c,
                     tile_columns);
    }
  }
}

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
