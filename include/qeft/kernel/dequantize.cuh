// SPDX-License-Identifier: Apache-2.0
// W out of its packed form, for what needs a plain matrix.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/block/weight_tile.cuh"

namespace qeft::kernel {

inline constexpr int dequantize_threads = 128;
/// Columns of a block: as many as take 1 KiB.
template <class Y>
inline constexpr int dequantize_columns = 1024 / static_cast<int>(sizeof(Y));

/// A block takes 16 rows and dequantize_columns<Y> columns, block after block of the same rows.
/// @param w   over layout::fragment
/// @param out (OC, IC) row-major
template <class View, class Y>
__global__ void __launch_bounds__(dequantize_threads)
    dequantize(const __grid_constant__ View w, Y* out) {
  constexpr int columns = dequantize_columns<Y>;
  using tile_type = block::weight_tile<View, Y, columns>;
  constexpr int together = tile_type::together;
  __shared__ typename tile_type::shared_storage shared;

  const index_t blocks = ceil_quotient(w.in_channels, columns);
  const index_t row_tile = quotient(blockIdx.x, blocks);
  const index_t first_column = (blockIdx.x - row_tile * blocks) * columns;
  const index_t first = row_tile * tile_type::rows * w.in_channels + first_column;
  // Rows lie in shared memory as they do in `out`, so that both are read and written by 16 bytes.
  const auto address = reinterpret_cast<std::uintptr_t>(out + first) / sizeof(Y);
  tile_type tile(w, row_tile, first_column,
                 {static_cast<int>(address % together), static_cast<int>(w.in_channels % together)},
                 shared);
  tile.fill();

  const int lane = arch::lane();
  const index_t rows = w.out_channels - row_tile * tile_type::rows;
  for (int r = arch::warp(); r < tile_type::rows && r < rows; r += dequantize_threads / 32) {
    const int begin = tile.shift(r);
    const int end = begin + tile.columns();
    const Y* const from = shared.weights[r];
    Y* const to = out + (first + r * w.in_channels - begin);
    for (int c = lane * together; c < end; c += 32 * together) {
      if (c >= begin && c + together <= end) {
        *reinterpret_cast<uint4*>(to + c) = *reinterpret_cast<const uint4*>(from + c);
        continue;
      }
      for (int i = c; i < c + together; ++i) {
        if (i >= begin && i < end) to[i] = from[i];
      }
    }
  }
}

}  // namespace qeft::kernel
