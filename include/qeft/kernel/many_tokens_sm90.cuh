// SPDX-License-Identifier: Apache-2.0
// Y = X W^T for many tokens on compute capability 9.0: the tensor cores are what is short.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/block/dense_product.cuh"
#include "qeft/block/weak_product.cuh"
#include "qeft/kernel/product_args.cuh"

namespace qeft::kernel {

/// Columns cut into parts that are summed up by themselves.
struct column_parts {
  int count;
  int columns;  // of each but the last one
  int end;

  /// body(first, last) of one after another.
  template <class Body>
  __device__ void for_each(const Body& body) const {
    for (int i = 0; i < count; ++i) body(i * columns, min((i + 1) * columns, end));
  }
};

/// Dynamic shared memory of a block; it is placed at the next multiple of its alignment.
template <class Scalar, int Tokens>
struct many_tokens_shared {
  typename block::activation_ring<Scalar, Tokens>::shared_storage activations;
  typename block::output_tile<Tokens>::shared_storage
      outputs[tuning::many_tokens_sm90::multiplying];

  static constexpr int bytes() {
    return static_cast<int>(sizeof(many_tokens_shared) + alignof(many_tokens_shared) - 16);
  }
};

/// A product, and its activations as the tensor memory accelerator reads them.
template <class View, class Y, class Epilogue>
struct many_tokens_sm90_product {
  CUtensorMap dense_x;  // of args.dense_x, (tokens, IC - k), if there are any
  CUtensorMap weak_x;   // of args.weak_x, (tokens, k), if there are any
  product_args<View, Y, Epilogue> args;
};

/// A block takes 128 rows of a layer and Tokens tokens, and then others (tuning::many_tokens_sm90
/// says which): a thread copies activations, two warpgroups multiply. Code that is not made for
/// sm_90a only traps, and has no static shared memory: device::detail::is_sm90a_code tells
/// them apart.
/// @param layers row_blocks are those of a cluster
template <int Tokens, index_t GroupColumns, int Layers, class View, class Y, class Epilogue>
__global__ void __launch_bounds__(tuning::many_tokens_sm90::threads, 1) many_tokens_sm90(
    const __grid_constant__ product_layers<Layers, many_tokens_sm90_product<View, Y, Epilogue>>
        layers) {
#if QEFT_DEVICE_SM90A
  using tune = tuning::many_tokens_sm90;
  using scalar = typename View::scalar_type;
  using ring = block::activation_ring<scalar, Tokens>;
  using storage = many_tokens_shared<scalar, Tokens>;
  __shared__ typename ring::barriers barriers;
  extern __shared__ uint4 shared[];
  auto& mine = arch::aligned<storage>(shared);

  const auto& first = layers.of[0].args;  // of which the others have the columns and tokens
  const column_parts dense{first.parts.dense, first.parts.dense_columns,
                           static_cast<int>(first.w.dense_columns())};
  const column_parts weak{first.parts.weak, first.parts.weak_columns,
                          static_cast<int>(first.w.weak_columns())};
  // body(product, the cluster's block of its rows, first token)
  const auto for_each_place = [&](const auto& body) {
    const int blocks = arch::cluster_blocks();
    const int tokens = (first.tokens + Tokens - 1) / Tokens;
    const int clusters = static_cast<int>(gridDim.x) / blocks;
    int rows = 0;
    for (const int of_layer : layers.row_blocks) rows += of_layer;
    for (int i = static_cast<int>(blockIdx.x) / blocks; i < rows * tokens; i += clusters) {
      const tune::place at = tune::place_of(i, rows, tokens);
      const auto in = layers.find(at.row);
      body(layers.of[in.layer], in.row_block, at.token * Tokens);
    }
  };
  const int warp = arch::uniform_warp();
  ring x(mine.activations, barriers);

  if (threadIdx.x == 0) {
    if (dense.count > 0) arch::prefetch(layers.of[0].dense_x);
    if (weak.count > 0) arch::prefetch(layers.of[0].weak_x);
    ring::init(barriers, 4 * tune::multiplying);
  }
  arch::sync_cluster();
  if (warp < 4) {
    arch::give_registers<tune::copying_registers>();
    const auto fill = [&](const CUtensorMap& from, const column_parts& parts, int token) {
      parts.for_each([&](int first, int last) {
        for (int column = first; column < last; column += tune::stage_columns) {
          x.fill(from, token, column);
        }
      });
    };
    if (threadIdx.x == 0) {
      for_each_place([&](const auto& of, int, int token) {
        fill(of.dense_x, dense, token);
        fill(of.weak_x, weak, token);
      });
    }
  } else {
    arch::take_registers<tune::multiplying_registers>();
    const int warpgroup = warp / 4 - 1;
    block::output_tile<Tokens> outputs(mine.outputs[warpgroup]);
    for_each_place([&](const auto& of, int row_block, int token) {
      const auto& args = of.args;
      const auto channels = static_cast<int>(args.w.out_channels);
      const int channel =
          (row_block * arch::cluster_blocks() + arch::block_in_cluster()) * tune::rows +
          64 * warpgroup;
      const int row_tile = min(channel / 16 + warp % 4, (channels - 1) / 16);
      bool starts = true;
      const auto add = [&](auto& product, const column_parts& parts) {
        parts.for_each([&](int first, int last) {
          block::warpgroup_sums<Tokens> sum;
          product.add(first, last, x, sum);
          outputs.add(sum, starts);
          starts = false;
        });
      };
      const block::weak_product<View, Tokens> of_weak(args.w, row_tile);
      if (dense.count > 0) {
        block::dense_product<View, Tokens, GroupColumns> of_dense(args.w, row_tile);
        add(of_dense, dense);
      }
      add(of_weak, weak);
      outputs.store(1 + warpgroup, channel, channels, token, args.tokens, args.epilogue, args.y);
    });
  }
  arch::sync_cluster();  // no block ends while others arrive at its barriers
#else
  __trap();
#endif
}

}  // namespace qeft::kernel
