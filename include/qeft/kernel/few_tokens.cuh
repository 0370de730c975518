// SPDX-License-Identifier: Apache-2.0
// Y = X W^T for few tokens: up to 16 the codes are read once, and all that matters is how fast.
#pragma once

#include "qeft/block/cluster_activations.cuh"
#include "qeft/block/few_tokens_product.cuh"
#include "qeft/kernel/product_args.cuh"

namespace qeft::kernel {

/// The product of a block in a cluster, and of any other. Where code is made for sm_90a kernels use
/// the former, which has static shared memory: device::detail::runs_in_clusters tells them apart.
template <class View, int RowTiles, int TokenTiles, index_t GroupColumns>
using product_in_cluster =
    block::few_tokens_product<View, RowTiles, TokenTiles, GroupColumns,
                              block::cluster_activations<typename View::scalar_type, TokenTiles>>;
#if QEFT_DEVICE_SM90A
template <class View, int RowTiles, int TokenTiles, index_t GroupColumns>
using product_of_block = product_in_cluster<View, RowTiles, TokenTiles, GroupColumns>;
#else
template <class View, int RowTiles, int TokenTiles, index_t GroupColumns>
using product_of_block = block::few_tokens_product<View, RowTiles, TokenTiles, GroupColumns>;
#endif

/// Rows from row_block * RowTiles * 16 on, and 8 * TokenTiles tokens (blockIdx.y). All threads of a
/// block take part, with all of its shared memory. Blocks of a cluster have the same activations.
template <int RowTiles, int TokenTiles, index_t GroupColumns, class View, class Y, class Epilogue>
__device__ void few_tokens_block(const product_args<View, Y, Epilogue>& args, int row_block) {
  using product = product_of_block<View, RowTiles, TokenTiles, GroupColumns>;
  extern __shared__ uint4 shared[];

  const int first_token = static_cast<int>(blockIdx.y) * product::most_tokens;
  const int tokens = min(args.tokens - first_token, product::most_tokens);
  const index_t x_at = index_t{first_token} * index_t{args.stride};
  const product of(shared, args.parts, args.parts_each);
  of.multiply(args.w, row_block * RowTiles,
              {args.dense_x + x_at, args.weak_x + x_at, args.stride, tokens});
  of.meet();

  const auto out_channels = static_cast<int>(args.w.out_channels);
  for (unsigned at = threadIdx.x; at < product::places; at += blockDim.x) {
    const int token = product::token(at);
    if (token >= tokens) continue;
    const auto sums = of.sums(at);
    Y* const y = args.y + index_t{first_token + token} * index_t{out_channels};
    const int channel = row_block * product::rows + product::row(at, 0);
    for (int i = 0; i < product::rows_together; ++i) {
      const int more = product::row(0, i);
      if (more >= out_channels - channel) continue;
      y[epilogue::destination(args.epilogue, channel + more)] =
          from_float<Y>(args.epilogue(sums.of[i], first_token + token, channel + more));
    }
  }
}

/// One layer, of which blockIdx.x counts the blocks of rows.
template <int RowTiles, int TokenTiles, index_t GroupColumns, class View, class Y, class Epilogue>
__global__ void __launch_bounds__(32 * tuning::most_few_tokens_warps(RowTiles), 1)
    few_tokens(const __grid_constant__ product_args<View, Y, Epilogue> args) {
  few_tokens_block<RowTiles, TokenTiles, GroupColumns>(args, static_cast<int>(blockIdx.x));
}

/// Several layers, whose blocks of rows follow each other in blockIdx.x.
template <int RowTiles, int TokenTiles, index_t GroupColumns, class View, class Y, class Epilogue>
__global__ void
__launch_bounds__(32 * tuning::most_few_tokens_warps(RowTiles), 1) few_tokens_of_layers(
    const __grid_constant__ product_layers<most_layers, product_args<View, Y, Epilogue>> layers) {
  const auto at = layers.find(static_cast<int>(blockIdx.x));
  few_tokens_block<RowTiles, TokenTiles, GroupColumns>(layers.of[at.layer], at.row_block);
}

}  // namespace qeft::kernel
