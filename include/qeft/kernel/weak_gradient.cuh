// SPDX-License-Identifier: Apache-2.0
// The gradient of the weak columns, dW = dY^T X, and the activations that it needs.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/block/token_columns.cuh"
#include "qeft/core/unroll.hpp"

namespace qeft::kernel {

/// Threads of a block of gather_weak.
inline constexpr int gather_weak_threads = 256;

/// to[t][j] = x[t][weak column j]. A block takes `block_tokens` tokens.
template <class Weak, class Scalar>
__global__ void __launch_bounds__(gather_weak_threads)
    gather_weak(Weak weak, const Scalar* x, index_t in_channels, int tokens, int block_tokens,
                Scalar* to) {
  const index_t first = static_cast<index_t>(blockIdx.x) * block_tokens;
  const int k = static_cast<int>(weak.count());
  const int count = min(block_tokens, tokens - static_cast<int>(first)) * k;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += gather_weak_threads) {
    const int token = i / k;
    to[first * k + i] =
        x[(first + token) * in_channels + weak.weak_column(i - token * k, in_channels)];
  }
}

template <class Scalar>
struct weak_gradient_args {
  block::token_matrix<Scalar> dy;      // (tokens, OC)
  block::token_matrix<Scalar> x_weak;  // (tokens, k)
  int tokens;
  bool accumulate;
  float* dw;  // (OC, k)
};

/// A warp's sums of 16 columns of dY and tuning::weak_gradient_tile of X, as mma leaves them: lane
/// l = 4 g + t has columns g ([.][0], [1]) and g + 8 ([2], [3]) of dY, and 2 t and 2 t + 1 of X.
using weak_gradient_sums = float[tuning::weak_gradient_tile / 8][4];

/// Adds the tokens of a stage, summed up by themselves first.
/// @param column of dY, the warp's first one in the block
template <class Scalar>
__device__ void add_stage(const block::token_columns<Scalar>& dy, int column,
                          const block::token_columns<Scalar>& x, int stage,
                          weak_gradient_sums& sum) {
  using staged = block::token_columns<Scalar>;
  constexpr int tile = tuning::weak_gradient_tile;
  const auto offset = static_cast<std::uint32_t>(stage * staged::stage_offset);
  const std::uint32_t of_dy = dy.a_address(column) + offset;
  const std::uint32_t of_x = x.b_address(0) + offset;
  weak_gradient_sums part = {};
  unroll<tuning::weak_gradient_tokens / 16>([&](auto step) {
    std::uint32_t a[4];
    arch::load_transposed_matrices<staged::template offset<step, 0>>(a, of_dy);
    unroll<tile / 16>([&](auto pair) {
      std::uint32_t b[4];
      arch::load_transposed_matrices<staged::template offset<step, 16 * pair>>(b, of_x);
      arch::mma_16x8x16<Scalar>(part[2 * pair], a, b[0], b[1]);
      arch::mma_16x8x16<Scalar>(part[2 * pair + 1], a, b[2], b[3]);
    });
  });
  for (int t = 0; t < tile / 8; ++t) {
    for (int i = 0; i < 4; ++i) sum[t][i] += part[t][i];
  }
}

inline constexpr int weak_gradient_threads = tuning::weak_gradient_tile / 16 * 32;

/// A block takes tuning::weak_gradient_tile rows (blockIdx.x) and as many weak columns
/// (blockIdx.y), a warp 16 of the rows.
template <class Scalar>
__global__ void __launch_bounds__(weak_gradient_threads)
    weak_gradient(const __grid_constant__ weak_gradient_args<Scalar> args) {
  using staged = block::token_columns<Scalar>;
  constexpr int tile = tuning::weak_gradient_tile;
  constexpr int stage_tokens = tuning::weak_gradient_tokens;
  __shared__ typename staged::shared_storage shared[2];

  const int first_row = static_cast<int>(blockIdx.x) * tile;
  const int first_column = static_cast<int>(blockIdx.y) * tile;
  const staged dy(args.dy, first_row, shared[0]);
  const staged x(args.x_weak, first_column, shared[1]);
  const int warp = arch::warp();
  const auto start = [&](int stage, int token) {
    if (token < args.tokens) {
      dy.start(stage, token, args.tokens - token);
      x.start(stage, token, args.tokens - token);
    }
    arch::commit_copies();
  };

  constexpr int stages = tuning::weak_gradient_stages;
  weak_gradient_sums sum = {};
  for (int stage = 0; stage < stages - 1; ++stage) start(stage, stage * stage_tokens);
  int stage = 0;
  for (int token = 0; token < args.tokens; token += stage_tokens) {
    arch::wait_for_copies<stages - 2>();
    __syncthreads();  // the stage has come, and nobody reads the one before any more
    const int before = (stage + stages - 1) % stages;
    start(before, token + (stages - 1) * stage_tokens);
    add_stage(dy, 16 * warp, x, stage, sum);
    stage = (stage + 1) % stages;
  }

  const int lane = arch::lane();
  for (int t = 0; t < tile / 8; ++t) {
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 16 * warp + lane / 4 + i / 2 * 8;
      const int column = first_column + 8 * t + lane % 4 * 2 + i % 2;
      if (row >= args.dy.columns || column >= args.x_weak.columns) continue;
      float* const to = args.dw + index_t{row} * args.x_weak.columns + column;
      *to = args.accumulate ? *to + sum[t][i] : sum[t][i];
    }
  }
}

}  // namespace qeft::kernel
