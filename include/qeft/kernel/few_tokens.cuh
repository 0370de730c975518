// SPDX-License-Identifier: Apache-2.0
// Y = X W^T for few tokens: up to 16 the codes are read once, and all that matters is how fast.
#pragma once

#include "qeft/block/cluster_activations.cuh"
#include "qeft/block/few_tokens_product.cuh"
#include "qeft/kernel/product_args.cuh"

namespace qeft::kernel {

/// The product of a block in a cluster, and of any other. Where code is made for sm_90a kernels use
/// the former, which has static shared memory: device::detail::is_sm90a_code tells them apart.
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

/// A block takes RowTiles x 16 rows of a layer (blockIdx.x, layer after layer) and 8 * TokenTiles
/// tokens (blockIdx.y). Blocks of a cluster have the same activations.
template <int RowTiles, int TokenTiles, index_t GroupColumns, int Layers, class View, class Y,
          class Epilogue>
__global__ void __launch_bounds__(32 * tuning::most_few_tokens_warps(RowTiles), 1) few_tokens(
    const __grid_constant__ product_layers<Layers, product_args<View, Y, Epilogue>> layers) {
  using product = product_of_block<View, RowTiles, TokenTiles, GroupColumns>;
  extern __shared__ uint4 shared[];

  const auto at = layers.find(static_cast<int>(blockIdx.x));
  const auto& args = layers.of[at.layer];
  const int first_token = static_cast<int>(blockIdx.y) * product::most_tokens;
  const int tokens = min(args.tokens - first_token, product::most_tokens);
  const index_t x_at = index_t{first_token} * index_t{args.stride};
  const product of(shared, args.parts, args.parts_each);
  of.multiply(args.w, at.row_block * RowTiles,
              {args.dense_x + x_at, args.weak_x + x_at, args.stride, tokens});
  of.meet();

  const auto out_channels = static_cast<int>(args.w.out_channels);
  for (unsigned i = threadIdx.x; i < product::places; i += blockDim.x) {
    const int token = product::token(i);
    if (token >= tokens) continue;
    const auto sums = of.sums(i);
    Y* const y = args.y + index_t{first_token + token} * index_t{out_channels};
    const int channel = at.row_block * product::rows + product::row(i, 0);
    for (int r = 0; r < product::rows_together; ++r) {
      const int more = product::row(0, r);
      if (more >= out_channels - channel) continue;
      y[epilogue::destination(args.epilogue, channel + more)] =
          from_float<Y>(args.epilogue(sums.of[r], first_token + token, channel + more));
    }
  }
}

}  // namespace qeft::kernel
