// SPDX-License-Identifier: Apache-2.0
// Y = X W^T for many tokens, with mma.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/block/activations.cuh"
#include "qeft/kernel/product_args.cuh"
#include "qeft/tuning/many_tokens.hpp"
#include "qeft/warp/part_product.cuh"

namespace qeft::kernel {

/// What a block shares: activations, then sums on their way to memory.
template <class Scalar, int TokenWarps>
struct many_tokens_block {
  static constexpr int tokens = tuning::many_block_tokens(TokenWarps);
  /// Floats from a token to the next: different banks for the lanes of a warp.
  static constexpr int sums_stride = tuning::many_block_rows + 4;
  using activations =
      block::activations<Scalar, tuning::many_token_tiles, tuning::many_row_warps, TokenWarps>;
  union shared_storage {
    typename activations::shared_storage activations;
    float sums[tokens][sums_stride];
  };
};

/// A block takes tuning::many_block_rows rows of a layer (blockIdx.x, layer after layer) and
/// TokenWarps x 32 tokens (blockIdx.y), and all parts of the columns one after the other; or, if
/// there are part_sums, part blockIdx.z alone, whose sums it leaves there for add_parts. Sums are
/// those of few_tokens, bit for bit.
template <int TokenWarps, index_t GroupColumns, int Layers, class View, class Y, class Epilogue>
__global__ void __launch_bounds__(32 * tuning::many_row_warps * TokenWarps, 2 / TokenWarps)
    many_tokens(
        const __grid_constant__ product_layers<Layers, product_args<View, Y, Epilogue>> layers) {
  constexpr int row_tiles = tuning::many_row_tiles;
  constexpr int token_tiles = tuning::many_token_tiles;
  constexpr int rows = tuning::many_block_rows;
  using product = warp::part_product<View, row_tiles, token_tiles, GroupColumns>;
  using scalar = typename View::scalar_type;
  using shape = many_tokens_block<scalar, TokenWarps>;
  extern __shared__ uint4 dynamic_shared[];
  auto& shared = reinterpret_cast<typename shape::shared_storage&>(*dynamic_shared);

  const auto at = layers.find(static_cast<int>(blockIdx.x));
  const auto& args = layers.of[at.layer];
  const int first_row = at.row_block * rows;
  const int first_token = static_cast<int>(blockIdx.y) * shape::tokens;
  const int tokens = min(args.tokens - first_token, shape::tokens);
  const int warp = arch::uniform_warp();
  const int row_warp = warp % tuning::many_row_warps;
  const int token_warp = warp / tuning::many_row_warps;
  const product of(args.w, first_row / 16 + row_warp * row_tiles);
  const index_t x_at = index_t{first_token} * args.stride;

  typename product::result sum;
  const int first_part = static_cast<int>(blockIdx.z);
  of.for_each_part(
      args.parts, first_part, args.part_sums == nullptr ? args.parts.count() : first_part + 1,
      args.dense_x + x_at, args.weak_x + x_at,
      [&](const scalar* x) {
        return typename shape::activations({x, args.stride, tokens}, shared.activations);
      },
      [&](const typename product::result& part_sum) { sum += part_sum; });

  // Token after token in shared memory, so that stores are contiguous.
  sum.store(&shared.sums[token_warp * token_tiles * 8][row_warp * row_tiles * 16],
            shape::sums_stride);
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) % rows;
  const int channel = first_row + row;
  if (channel >= args.w.out_channels) return;
  for (int t = static_cast<int>(threadIdx.x) / rows; t < tokens; t += TokenWarps) {
    const float value = shared.sums[t][row];
    const index_t token = first_token + t;
    if (args.part_sums != nullptr) {
      args.part_sums[(first_part * index_t{args.tokens} + token) * args.w.out_channels + channel] =
          value;
    } else {
      args.y[token * args.w.out_channels + epilogue::destination(args.epilogue, channel)] =
          from_float<Y>(args.epilogue(value, token, channel));
    }
  }
}

/// Threads of a block of add_parts.
inline constexpr int add_parts_threads = 256;

/// Y = the parts' sums added in their order, of add_parts_threads channels of a layer (blockIdx.x,
/// layer after layer) and token blockIdx.y.
template <int Layers, class View, class Y, class Epilogue>
__global__ void __launch_bounds__(add_parts_threads) add_parts(
    const __grid_constant__ product_layers<Layers, product_args<View, Y, Epilogue>> layers) {
  const auto at = layers.find(static_cast<int>(blockIdx.x));
  const auto& args = layers.of[at.layer];
  const index_t channels = args.w.out_channels;
  const index_t channel = index_t{at.row_block} * add_parts_threads + threadIdx.x;
  const index_t token = blockIdx.y;
  if (channel >= channels) return;
  float sum = 0.0F;
  for (int part = 0; part < args.parts.count(); ++part) {
    sum += args.part_sums[(part * index_t{args.tokens} + token) * channels + channel];
  }
  args.y[token * channels + epilogue::destination(args.epilogue, channel)] =
      from_float<Y>(args.epilogue(sum, token, channel));
}

}  // namespace qeft::kernel
