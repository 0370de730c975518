// SPDX-License-Identifier: Apache-2.0
// Y = X W^T for few tokens: up to 16 the codes are read once, and all that matters is how fast.
#pragma once

#include "qeft/thread/epilogue.hpp"
#include "qeft/tuning/few_tokens.hpp"
#include "qeft/warp/part_product.cuh"

namespace qeft::kernel {

/// What a launch is about, passed by value.
template <class View, class Y, class Epilogue>
struct few_tokens_args {
  View w;                                     // weak_tail over layout::fragment
  const typename View::scalar_type* dense_x;  // (tokens, IC - k), 16-byte aligned
  const typename View::scalar_type* weak_x;   // (tokens, k), 16-byte aligned
  int stride;                                 // of both, a multiple of 8
  int tokens;
  Y* y;  // (tokens, OC)
  Epilogue epilogue;
  tuning::parts parts;
};

/// Shared memory of a block.
QEFT_HOST_DEVICE constexpr int few_tokens_shared_bytes(int parts, int warps, int tokens,
                                                       int row_tiles) noexcept {
  using activations = warp::activations<half_bits, 1>;
  return warps * activations::shared_bytes(tokens) +
         parts * tokens * row_tiles * 16 * static_cast<int>(sizeof(float));
}
/// The most that a launch takes.
constexpr int most_few_tokens_shared_bytes(int row_tiles, int token_tiles) noexcept {
  int most = 0;
  for (int parts = 1; parts <= 2 * tuning::most_parts; ++parts) {
    const int bytes =
        few_tokens_shared_bytes(parts, tuning::warps_for(parts), 8 * token_tiles, row_tiles);
    if (bytes > most) most = bytes;
  }
  return most;
}

/// A block takes RowTiles x 16 rows (blockIdx.x) and 8 * TokenTiles tokens (blockIdx.y). Its warps
/// take the parts of the columns in turn; then the sums of the parts are added in their order.
template <int RowTiles, int TokenTiles, index_t GroupColumns, class View, class Y, class Epilogue>
__global__ void __launch_bounds__(32 * tuning::few_tokens_warps, TokenTiles == 1 ? 2 : 1)
    few_tokens(const __grid_constant__ few_tokens_args<View, Y, Epilogue> args) {
  using product = warp::part_product<View, RowTiles, TokenTiles, GroupColumns>;
  using scalar = typename View::scalar_type;
  using activations = warp::activations<scalar, TokenTiles>;
  constexpr int rows = RowTiles * 16;
  extern __shared__ uint4 shared[];

  const tuning::parts& parts = args.parts;
  const int first_token = static_cast<int>(blockIdx.y) * 8 * TokenTiles;
  const int tokens = min(args.tokens - first_token, 8 * TokenTiles);
  const int warps = static_cast<int>(blockDim.x / 32U);
  // From one lane, so that the compiler knows it to be the same in all.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x / 32U), 0);
  const int lane = static_cast<int>(threadIdx.x % 32U);
  const int most_tokens = min(args.tokens, 8 * TokenTiles);
  char* const mine =
      reinterpret_cast<char*>(shared) + warp * activations::shared_bytes(most_tokens);
  float* const part_sums = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) +
                                                    warps * activations::shared_bytes(most_tokens));

  const auto x_of = [&](const scalar* x) {
    return activations(warp::token_rows<scalar>{x + static_cast<index_t>(first_token) * args.stride,
                                                args.stride, tokens},
                       mine);
  };
  const product of(args.w, static_cast<int>(blockIdx.x) * RowTiles);
  for (int part = warp; part < parts.count(); part += warps) {
    typename product::result sum;
    if (part < parts.dense) {
      const int first = part * parts.dense_columns;
      const int last = min(first + parts.dense_columns, static_cast<int>(args.w.dense_columns()));
      activations x = x_of(args.dense_x + first);
      of.add_dense(first, last, x, sum);
    } else {
      const int first = (part - parts.dense) * parts.weak_columns;
      const int last = min(first + parts.weak_columns, static_cast<int>(args.w.weak_columns()));
      activations x = x_of(args.weak_x + first);
      of.add_weak(first, last, x, sum);
    }
    const int token = lane % 4 * 2;
    float* const to = part_sums + (part * tokens + token) * rows + lane / 4;
    for (int t = 0; t < TokenTiles; ++t) {
      for (int i = 0; i < 2; ++i) {
        if (8 * t + token + i >= tokens) continue;
        for (int r = 0; r < RowTiles; ++r) {
          to[(8 * t + i) * rows + 16 * r] = sum.of[r][t][i];
          to[(8 * t + i) * rows + 16 * r + 8] = sum.of[r][t][2 + i];
        }
      }
    }
    __syncwarp();
  }
  __syncthreads();

  const int outputs = tokens * rows;
  for (int i = static_cast<int>(threadIdx.x); i < outputs; i += static_cast<int>(blockDim.x)) {
    const int channel = static_cast<int>(blockIdx.x) * rows + i % rows;
    if (channel >= args.w.out_channels) continue;
    const float* from = part_sums + i;
    float sum = 0.0F;
    for (int part = 0; part < parts.count(); ++part, from += outputs) sum += *from;
    const int token = first_token + i / rows;
    args.y[index_t{token} * args.w.out_channels + epilogue::destination(args.epilogue, channel)] =
        from_float<Y>(args.epilogue(sum, token, channel));
  }
}

}  // namespace qeft::kernel
