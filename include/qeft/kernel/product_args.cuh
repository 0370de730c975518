// SPDX-License-Identifier: Apache-2.0
// What kernels of products are about.
#pragma once

#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/thread/epilogue.hpp"
#include "qeft/tuning/parts.hpp"

namespace qeft::kernel {

/// Y = X W^T, passed by value. Of a token's dense and of its weak columns, 16 bytes at a time are
/// read up to the end: what is behind them there may be anything, but must be readable.
template <class View, class Y, class Epilogue>
struct product_args {
  View w;                                     // weak_tail over layout::fragment
  const typename View::scalar_type* dense_x;  // (tokens, IC - k), 16-byte aligned
  const typename View::scalar_type* weak_x;   // (tokens, k), 16-byte aligned
  int stride;                                 // of both, a multiple of 8
  int tokens;
  Y* y;  // (tokens, OC)
  Epilogue epilogue;
  tuning::parts parts;
  int parts_each = 1;          // that a warp of few_tokens takes in a row
  float* part_sums = nullptr;  // (parts, tokens, OC) of many_tokens, for add_parts; or null
};

/// Layers that share a launch, at most.
inline constexpr int most_layers = 4;

/// Products of layers of the same IC, k and group size in one launch, whose blocks of rows follow
/// each other.
/// @tparam Product product_args, or what holds them
template <int Layers, class Product>
struct product_layers {
  Product of[Layers];
  int row_blocks[Layers];  // of each layer; behind the last one 0

  struct place {
    int layer;
    int row_block;  // of that layer
  };
  /// Where a block of rows of all layers is.
  __device__ place find(int row_block) const {
    int layer = 0;
    if constexpr (Layers > 1) {
      while (row_block >= row_blocks[layer]) row_block -= row_blocks[layer++];
    }
    return {layer, row_block};
  }
};

}  // namespace qeft::kernel
