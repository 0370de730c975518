// SPDX-License-Identifier: Apache-2.0
// dX = dY W from the packed layer: what is made of the operands first, and the product.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/block/gradient_rows.cuh"
#include "qeft/thread/activation_order.hpp"
#include "qeft/warp/column_tile.cuh"

namespace qeft::kernel {

/// to[slot] = the input column that stands at `slot` of the kernel's order.
template <class Weak>
__global__ void order_columns(Weak weak, index_t in_channels, std::int32_t* to) {
  const index_t slot = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot < in_channels) {
    to[slot] = static_cast<std::int32_t>(activation_column(weak, slot, in_channels));
  }
}

/// Operands of the product, in memory of the caller's.
template <class Scalar>
struct gradient_operands {
  Scalar* dy;            // (tokens, stride) gradients times the token's factor; behind OC zeros
  int stride;            // a multiple of tuning::row_parts * tuning::round_rows
  float* token_inverse;  // (tokens) 1 / the token's factor, with needs_factors only
  float* group_factors;  // (groups), with needs_factors only
  float* rests;          // (tokens, groups), with scaled zero points only: sums over the rows of
                         // gradient times what a weight has beside s (q - z)
};
template <class View>
struct gradient_operands_args {
  View w;                                // weak_tail over layout::fragment
  const typename View::scalar_type* dy;  // (tokens, OC)
  int tokens;
  gradient_operands<typename View::scalar_type> to;
};

/// Threads of a block of prepare_gradient.
inline constexpr int prepare_threads = 256;

/// The largest `x` of a block of prepare_threads, in all of its threads.
__device__ inline unsigned largest_of_block(unsigned x) {
  constexpr int warps = prepare_threads / 32;
  __shared__ unsigned of_warp[warps];
  const unsigned mine = __reduce_max_sync(0xffffffffU, x);
  if (arch::lane() == 0) of_warp[arch::warp()] = mine;
  __syncthreads();
  unsigned largest = 0;
  for (const unsigned other : of_warp) largest = max(largest, other);
  return largest;
}

/// A block takes one token: its row, and its sums of what scaled zero points leave.
template <class View>
__device__ void prepare_token(const gradient_operands_args<View>& args, int token) {
  using format = typename View::format_type;
  using scalar = typename View::scalar_type;
  using params = warp::group_scales<format>;
  const int thread = static_cast<int>(threadIdx.x);
  const int rows = static_cast<int>(args.w.out_channels);
  const scalar* const from = args.dy + index_t{token} * rows;
  scalar* const to = args.to.dy + index_t{token} * args.to.stride;

  float factor = 1.0F;
  if constexpr (needs_factors<scalar>) {
    unsigned largest = 0;
    for (int n = thread; n < rows; n += prepare_threads) {
      largest = max(largest, from[n].bits & 0x7fffU);
    }
    const scalar of_token{static_cast<std::uint16_t>(largest_of_block(largest))};
    factor = factor_to(gradient_exponent, 126, to_float(of_token));
    if (thread == 0) args.to.token_inverse[token] = 1.0F / factor;
  }
  for (int n = thread; n < args.to.stride; n += prepare_threads) {
    to[n] = n < rows ? from_float<scalar>(to_float(from[n]) * factor) : scalar{};
  }
  if constexpr (format::zero == zero_kind::scaled) {
    const int sets = static_cast<int>(layout::fragment::group_sets(args.w.extent()));
    const int lane = thread % 32;
    for (int set = thread / 32; set < sets; set += prepare_threads / 32) {
      float low = 0.0F;
      float high = 0.0F;
      for (int row = lane / 4; row < rows; row += 16) {
        const index_t at = (index_t{row / 16} * sets + set) * 32 + lane;
        const auto zero = params::parts_of(
            params::floats(reinterpret_cast<const std::uint32_t*>(args.w.scales)[at]),
            params::floats(reinterpret_cast<const std::uint32_t*>(args.w.zeros)[at]));
        low = fmaf(to_float(from[row]), zero.rest.low, low);
        if (row + 8 < rows) high = fmaf(to_float(from[row + 8]), zero.rest.high, high);
      }
      float sum = low + high;
      for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(0xffffffffU, sum, other);
      const int group = 4 * set + lane;
      if (lane < 4 && group < args.w.groups) args.to.rests[token * args.w.groups + group] = sum;
    }
  }
}

/// A block takes four groups: the factors of their scales.
template <class View>
__device__ void prepare_groups(const gradient_operands_args<View>& args, int set) {
  using fragment = layout::fragment;
  using scalar = typename View::scalar_type;
  const index_t sets = fragment::group_sets(args.w.extent());
  const index_t words = fragment::row_tiles(args.w.extent()) * sets * fragment::lanes;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  unsigned largest = 0;
  for (index_t at = (thread / 32 * sets + set) * 32 + lane; at < words;
       at += prepare_threads * sets) {
    const std::uint32_t s = reinterpret_cast<const std::uint32_t*>(args.w.scales)[at];
    largest = max(largest, max(s & 0x7fffU, s >> 16U & 0x7fffU));
  }
  for (int other = 4; other < 32; other *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffU, largest, other));
  }
  __shared__ unsigned of_warp[prepare_threads / 32][4];
  if (lane < 4) of_warp[thread / 32][lane] = largest;
  __syncthreads();
  const int group = 4 * set + thread;
  if (thread >= 4 || group >= args.w.groups) return;
  for (const auto& other : of_warp) largest = max(largest, other[thread]);
  args.to.group_factors[group] =
      factor_to(scale_exponent, 15, to_float(scalar{static_cast<std::uint16_t>(largest)}));
}

/// Blocks take one token each and, with needs_factors, those behind them four groups each.
template <class View>
__global__ void __launch_bounds__(prepare_threads)
    prepare_gradient(const __grid_constant__ gradient_operands_args<View> args) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < args.tokens) {
    prepare_token(args, block);
  } else if constexpr (needs_factors<typename View::scalar_type>) {
    prepare_groups(args, block - args.tokens);
  }
}

template <class View, class X>
struct input_gradient_args {
  View w;  // weak_tail over layout::fragment
  gradient_operands<typename View::scalar_type> of;
  int tokens;
  int dense_blocks;             // blocks in x that take dense columns; the others take weak ones
  const std::int32_t* columns;  // (IC) by order_columns; null: the order is that of X
  X* dx;                        // (tokens, IC)
};

/// What a block takes of X, and where it has its sums in shared memory.
template <class View>
struct gradient_block {
  static constexpr int steps = warp::dense_columns<View, true>::steps;
  static constexpr int columns = tuning::column_warps * steps * 16;
  static constexpr int tokens = 8 * warp::tokens_beside<steps>;
  static constexpr int threads = tuning::column_warps * tuning::row_parts * 32;
  using rows = block::gradient_rows<typename View::scalar_type, tokens>;
  /// Floats from a token to the next: different banks for the lanes of a warp.
  static constexpr int sums_stride = columns + 4;
  union shared_storage {
    typename rows::shared_storage rows;
    float sums[tokens][sums_stride];
  };

  bool dense;  // or weak
  int first;   // column
  int column_count;
  int first_token;
  int token_count;
};

/// The sums of a block, without the factors of their operands, into shared.sums.
/// @param make_columns make_columns(first, row_tile): Columns from there on
template <class Columns, class View, class Operands, class MakeColumns>
__device__ void sum_columns(const gradient_block<View>& block, const Operands& of,
                            const MakeColumns& make_columns,
                            typename gradient_block<View>::shared_storage& shared) {
  using shape = gradient_block<View>;
  const int warp = arch::uniform_warp();
  const int column = warp % tuning::column_warps * Columns::columns;
  const int part = warp / tuning::column_warps;
  const bool takes_part = column < block.column_count;
  const int rows = of.stride / tuning::row_parts;

  Columns columns = make_columns(block.first + (takes_part ? column : 0), part * rows / 16);
  warp::column_sums<Columns::steps> sum;
  const typename shape::rows dy(of.dy + index_t{block.first_token} * of.stride, rows,
                                block.token_count, shared.rows);
  dy.start(0, 0);
  int stage = 0;
  for (int row = 0; row < rows; row += tuning::chain_rows, stage = 1 - stage) {
    arch::wait_for_copies<0>();
    __syncthreads();  // the stage has come, and nobody reads the other one any more
    dy.start(1 - stage, row + tuning::chain_rows);
    if (takes_part) {
      const std::uint32_t from = dy.operand_address(stage, part);
      warp::add_rows(
          columns,
          [&](auto& b, int i) { dy.operands(b, from + static_cast<std::uint32_t>(2 * i)); },
          min(rows - row, tuning::chain_rows), sum);
    }
  }
  __syncthreads();
  const int lane = arch::lane();
  float* const to = &shared.sums[lane % 4 * 2][column + lane / 4];
  for (int turn = 0; turn < tuning::row_parts; ++turn) {
    if (takes_part && part == turn) {
      for (int s = 0; s < Columns::steps; ++s) {
        for (int t = 0; t < shape::tokens / 8; ++t) {
          for (int i = 0; i < 4; ++i) {
            float& at = to[(8 * t + i % 2) * shape::sums_stride + 16 * s + i / 2 * 8];
            at = turn == 0 ? sum.of[s][t][i] : at + sum.of[s][t][i];
          }
        }
      }
    }
    __syncthreads();
  }
}

/// Stores the sums of a block: a thread has the same column of all its tokens.
template <class View, class X>
__device__ void store_gradient(const input_gradient_args<View, X>& args,
                               const gradient_block<View>& block,
                               const typename gradient_block<View>::shared_storage& shared) {
  using shape = gradient_block<View>;
  constexpr bool factors = needs_factors<typename View::scalar_type>;
  const int thread = static_cast<int>(threadIdx.x);
  const int mine = thread % shape::columns;
  if (mine >= block.column_count) return;
  const index_t slot = block.first + mine + (block.dense ? 0 : args.w.dense_columns());
  const index_t column = args.columns == nullptr ? slot : args.columns[slot];
  const index_t group = block.dense ? args.w.group_of(slot) : 0;
  const float group_inverse = factors && block.dense ? 1.0F / args.of.group_factors[group] : 1.0F;
  for (int t = thread / shape::columns; t < block.token_count;
       t += shape::threads / shape::columns) {
    const index_t token = block.first_token + t;
    float sum = shared.sums[t][mine];
    if constexpr (factors) sum *= args.of.token_inverse[token] * group_inverse;
    if constexpr (View::format_type::zero == zero_kind::scaled) {
      if (block.dense) sum += args.of.rests[token * args.w.groups + group];
    }
    args.dx[token * args.w.in_channels + column] = from_float<X>(sum);
  }
}

/// A block takes gradient_block<View>::columns columns (blockIdx.x), dense or weak, and ::tokens
/// tokens (blockIdx.y). Its warps beside each other take columns, those behind each other rows.
template <bool OneGroup, class View, class X>
__global__ void __launch_bounds__(gradient_block<View>::threads, 1)
    input_gradient(const __grid_constant__ input_gradient_args<View, X> args) {
  extern __shared__ uint4 dynamic_shared[];
  auto& shared = reinterpret_cast<typename gradient_block<View>::shared_storage&>(*dynamic_shared);
  gradient_block<View> block{};
  const int number = static_cast<int>(blockIdx.x);
  block.dense = number < args.dense_blocks;
  block.first = (block.dense ? number : number - args.dense_blocks) * block.columns;
  const index_t columns = block.dense ? args.w.dense_columns() : args.w.weak_columns();
  block.column_count = min(static_cast<int>(columns) - block.first, block.columns);
  block.first_token = static_cast<int>(blockIdx.y) * block.tokens;
  block.token_count = min(args.tokens - block.first_token, block.tokens);

  if (block.dense) {
    using dense = warp::dense_columns<View, OneGroup>;
    sum_columns<dense>(
        block, args.of,
        [&](int first, int row_tile) {
          return dense(args.w, first, row_tile, args.of.group_factors);
        },
        shared);
  } else {
    using weak = warp::weak_columns<View, gradient_block<View>::steps>;
    sum_columns<weak>(
        block, args.of, [&](int first, int row_tile) { return weak(args.w, first, row_tile); },
        shared);
  }
  store_gradient(args, block, shared);
}

}  // namespace qeft::kernel
