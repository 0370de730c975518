// SPDX-License-Identifier: Apache-2.0
// Y = X W^T for many tokens, with mma.
#pragma once

#include "qeft/block/activations.cuh"
#include "qeft/kernel/product_args.cuh"
#include "qeft/tuning/many_tokens.hpp"
#include "qeft/warp/part_product.cuh"

namespace qeft::kernel {

/// A block takes tuning::many_block_rows rows (blockIdx.x) and TokenWarps x 32 tokens (blockIdx.y),
/// and all parts of the columns one after the other; or, if there are part_sums, part blockIdx.z
/// alone, whose sums it leaves there for add_parts. Sums are those of few_tokens, bit for bit.
/// @param part_sums (parts, tokens, OC) or null
template <int TokenWarps, index_t GroupColumns, class View, class Y, class Epilogue>
__global__ void __launch_bounds__(32 * tuning::many_row_warps * TokenWarps, 2 / TokenWarps)
    many_tokens(const __grid_constant__ product_args<View, Y, Epilogue> args, float* part_sums) {
  constexpr int row_tiles = tuning::many_row_tiles;
  constexpr int token_tiles = tuning::many_token_tiles;
  constexpr int rows = tuning::many_block_rows;
  constexpr int most_tokens = tuning::many_block_tokens(TokenWarps);
  using product = warp::part_product<View, row_tiles, token_tiles, GroupColumns>;
  using scalar = typename View::scalar_type;
  using activations = block::activations<scalar, token_tiles, tuning::many_row_warps, TokenWarps>;
  extern __shared__ uint4 shared[];

  const int first_token = static_cast<int>(blockIdx.y) * most_tokens;
  const int tokens = min(args.tokens - first_token, most_tokens);
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x / 32U), 0);
  const int row_warp = warp % tuning::many_row_warps;
  const int token_warp = warp / tuning::many_row_warps;
  const product of(args.w, static_cast<int>(blockIdx.x) * (rows / 16) + row_warp * row_tiles);
  const index_t x_at = index_t{first_token} * args.stride;

  typename product::result sum;
  const int first_part = static_cast<int>(blockIdx.z);
  of.for_each_part(
      args.parts, first_part, part_sums == nullptr ? args.parts.count() : first_part + 1,
      args.dense_x + x_at, args.weak_x + x_at,
      [&](const scalar* x) {
        return activations({x, args.stride, tokens}, shared);
      },
      [&](const typename product::result& part_sum) { sum += part_sum; });

  // Token after token in shared memory, so that stores are contiguous.
  float* const tile = reinterpret_cast<float*>(shared);
  constexpr int tile_stride = rows + 4;  // tokens of a lane's neighbours in other banks
  sum.store(tile + (token_warp * token_tiles * 8) * tile_stride + row_warp * row_tiles * 16,
            tile_stride);
  __syncthreads();
  const int channel = static_cast<int>(blockIdx.x) * rows + static_cast<int>(threadIdx.x) % rows;
  if (channel >= args.w.out_channels) return;
  for (int t = static_cast<int>(threadIdx.x) / rows; t < tokens; t += TokenWarps) {
    const float value = tile[t * tile_stride + static_cast<int>(threadIdx.x) % rows];
    const index_t token = first_token + t;
    if (part_sums != nullptr) {
      const index_t row = first_part * index_t{args.tokens} + token;
      part_sums[row * args.w.out_channels + channel] = value;
    } else {
      args.y[token * args.w.out_channels + epilogue::destination(args.epilogue, channel)] =
          from_float<Y>(args.epilogue(value, token, channel));
    }
  }
}

/// Y = the parts' sums added in their order, of token blockIdx.y.
/// @param part_sums (parts, tokens, OC)
template <class View, class Y, class Epilogue>
__global__ void add_parts(const __grid_constant__ product_args<View, Y, Epilogue> args,
                          const float* part_sums) {
  const index_t channels = args.w.out_channels;
  const index_t channel = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const index_t token = blockIdx.y;
  if (channel >= channels) return;
  float sum = 0.0F;
  for (int part = 0; part < args.parts.count(); ++part) {
    sum += part_sums[(part * index_t{args.tokens} + token) * channels + channel];
  }
  args.y[token * channels + epilogue::destination(args.epilogue, channel)] =
      from_float<Y>(args.epilogue(sum, token, channel));
}

}  // namespace qeft::kernel
