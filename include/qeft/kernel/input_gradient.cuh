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
    const int lane = arch::lane();
    for (int set = arch::warp(); set < sets; set += prepare_threads / 32) {
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
  const int lane = arch::lane();
  unsigned largest = 0;
  for (index_t at = (arch::warp() * sets + set) * 32 + lane; at < words;
       at += prepare_threads * sets) {
    const std::uint32_t s = reinterpret_cast<const std::uint32_t*>(args.w.scales)[at];
    largest = max(largest, max(s & 0x7fffU, s >> 16U & 0x7fffU));
  }
  for (int other = 4; other < 32; other *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffU, largest, other));
  }
  __shared__ unsigned of_warp[prepare_threads / 32][4];
  if (lane < 4) of_warp[arch::warp()][lane] = largest;
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
  tuning::row_runs runs;
  float* run_sums;  // (runs, tuning::row_parts, tokens, IC) for add_runs, in the kernel's order; or
                    // null
};

/// Stores a column of X, which is at `slot` of the kernel's order, token by token.
template <class View, class X>
class gradient_column {
  static constexpr bool factors = needs_factors<typename View::scalar_type>;

 public:
  __device__ gradient_column(const input_gradient_args<View, X>& args, index_t slot)
      : args_(args),
        column_(args.columns == nullptr ? slot : args.columns[slot]),
        dense_(slot < args.w.dense_columns()),
        group_(dense_ ? args.w.group_of(slot) : 0),
        inverse_(factors && dense_ ? 1.0F / args.of.group_factors[group_] : 1.0F) {}

  /// @param sum without the factors of its operands
  __device__ void operator()(index_t token, float sum) const {
    if constexpr (factors) sum *= args_.of.token_inverse[token] * inverse_;
    if constexpr (View::format_type::zero == zero_kind::scaled) {
      if (dense_) sum += args_.of.rests[token * args_.w.groups + group_];
    }
    args_.dx[token * args_.w.in_channels + column_] = from_float<X>(sum);
  }

 private:
  const input_gradient_args<View, X>& args_;
  index_t column_;
  bool dense_;
  index_t group_;
  float inverse_;
};

/// What a block takes of X, and what it shares.
template <class View>
struct gradient_block {
  static constexpr int steps = warp::dense_columns<View, true>::steps;
  static constexpr int columns = tuning::column_warps * steps * 16;
  static constexpr int tokens = 8 * warp::tokens_beside<steps>;
  static constexpr int threads = tuning::column_warps * tuning::row_parts * 32;
  using rows = block::gradient_rows<typename View::scalar_type, tokens>;
  /// Floats from a token to the next: different banks for the lanes of a warp.
  static constexpr int sums_stride = columns + 4;
  struct shared_storage {
    typename rows::shared_storage rows;
    float sums[tokens][sums_stride];
  };

  int slot;  // the first one of the kernel's order
  int first_token;

  /// Behind the last column of the same kind, dense or weak.
  __device__ int end(const View& w) const {
    return static_cast<int>(slot < w.dense_columns() ? w.dense_columns() : w.in_channels);
  }
  /// of_column(slot)(token, sum) of all sums: a thread has the same column of all its tokens.
  template <class OfColumn>
  __device__ void for_each_sum(const View& w, int all_tokens, const shared_storage& shared,
                               const OfColumn& of_column) const {
    const int mine = static_cast<int>(threadIdx.x) % columns;
    if (slot + mine >= end(w)) return;
    const auto store = of_column(index_t{slot + mine});
    const int count = min(all_tokens - first_token, tokens);
    for (int t = static_cast<int>(threadIdx.x) / columns; t < count; t += threads / columns) {
      store(first_token + t, shared.sums[t][mine]);
    }
  }
};

/// Stores a warp's sums, or adds them. @param to (tokens, Stride)  @param column its first one
template <bool Adds, int Steps, int Stride>
__device__ void put_sums(float (*to)[Stride], int column, const warp::column_sums<Steps>& sum) {
  const int lane = arch::lane();
  for (int s = 0; s < Steps; ++s) {
    for (int t = 0; t < warp::tokens_beside<Steps>; ++t) {
      for (int i = 0; i < 4; ++i) {
        float& at = to[8 * t + lane % 4 * 2 + i % 2][column + lane / 4 + 16 * s + i / 2 * 8];
        at = Adds ? at + sum.of[s][t][i] : sum.of[s][t][i];
      }
    }
  }
}

/// Sums up a block's columns and tokens over the rows [row, end) of each part, run after run,
/// without the factors of their operands: into shared.sums, or, Adds, onto what is there.
/// @param make_columns make_columns(slot, row_tile): Columns from there on
/// @param part_done    part_done(part), when shared.sums has what that part has in a run
template <bool Adds, class Columns, class View, class X, class MakeColumns, class PartDone>
__device__ void sum_columns(const input_gradient_args<View, X>& args,
                            const gradient_block<View>& block, int row, int end,
                            const MakeColumns& make_columns,
                            typename gradient_block<View>::shared_storage& shared,
                            const PartDone& part_done) {
  using shape = gradient_block<View>;
  const int warp = arch::uniform_warp();
  const int column = warp % tuning::column_warps * Columns::columns;
  const int part = warp / tuning::column_warps;
  const bool takes_part = block.slot + column < block.end(args.w);
  const int rows = args.of.stride / tuning::row_parts;

  Columns columns = make_columns(block.slot + (takes_part ? column : 0), (part * rows + row) / 16);
  const typename shape::rows dy(args.of.dy + index_t{block.first_token} * args.of.stride, rows,
                                min(args.tokens - block.first_token, shape::tokens), shared.rows);
  const auto stage_of = [](int first) { return first / tuning::chain_rows % 2; };
  dy.start(stage_of(row), row);
  while (row < end) {
    warp::column_sums<Columns::steps> sum;
    const int run_end = min(row + args.runs.rows, end);
    for (; row < run_end; row += tuning::chain_rows) {
      const int stage = stage_of(row);
      arch::wait_for_copies<0>();
      __syncthreads();  // the stage has come, and nobody reads the other one any more
      const int next = row + tuning::chain_rows;
      if (next < end) dy.start(1 - stage, next);
      if (takes_part) {
        const std::uint32_t from = dy.operand_address(stage, part);
        warp::add_rows(
            columns,
            [&](auto& b, int i) { dy.operands(b, from + static_cast<std::uint32_t>(2 * i)); },
            min(end - row, tuning::chain_rows), sum);
      }
    }
    for (int turn = 0; turn < tuning::row_parts; ++turn) {
      if (takes_part && part == turn) put_sums<Adds>(shared.sums, column, sum);
      __syncthreads();
      part_done(turn);
    }
  }
}

/// A block takes gradient_block<View>::columns columns (blockIdx.x), dense or weak, and ::tokens
/// tokens (blockIdx.y). Its warps beside each other take columns, those behind each other rows.
/// @tparam ByRuns whether it takes run blockIdx.z of the rows, whose sums it leaves in run_sums for
///                add_runs; or all of them
template <bool OneGroup, bool ByRuns, class View, class X>
__device__ void input_gradient_block(const input_gradient_args<View, X>& args) {
  extern __shared__ uint4 dynamic_shared[];
  auto& shared = reinterpret_cast<typename gradient_block<View>::shared_storage&>(*dynamic_shared);
  const auto number = static_cast<int>(blockIdx.x);
  const auto dense_columns = static_cast<int>(args.w.dense_columns());
  const bool is_dense = number < args.dense_blocks;
  using shape = gradient_block<View>;
  const shape block{is_dense ? number * shape::columns
                             : dense_columns + (number - args.dense_blocks) * shape::columns,
                    static_cast<int>(blockIdx.y) * shape::tokens};

  const auto sum = [&](int first, int end, const auto& part_done) {
    if (is_dense) {
      using dense = warp::dense_columns<View, OneGroup>;
      sum_columns<!ByRuns, dense>(
          args, block, first, end,
          [&](int slot, int row_tile) {
            return dense(args.w, slot, row_tile, args.of.group_factors);
          },
          shared, part_done);
    } else {
      using weak = warp::weak_columns<View, shape::steps>;
      sum_columns<!ByRuns, weak>(
          args, block, first, end,
          [&](int slot, int row_tile) { return weak(args.w, slot - dense_columns, row_tile); },
          shared, part_done);
    }
  };
  const int rows = args.of.stride / tuning::row_parts;
  if constexpr (ByRuns) {
    const int first = static_cast<int>(blockIdx.z) * args.runs.rows;
    sum(first, min(first + args.runs.rows, rows), [&](int part) {
      const index_t before = (index_t{blockIdx.z} * tuning::row_parts + part) * args.tokens;
      block.for_each_sum(args.w, args.tokens, shared, [&](index_t slot) {
        return [&args, before, slot](index_t token, float of_part) {
          args.run_sums[(before + token) * args.w.in_channels + slot] = of_part;
        };
      });
      __syncthreads();
    });
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < shape::tokens * shape::sums_stride;
         i += shape::threads) {
      (&shared.sums[0][0])[i] = 0.0F;
    }
    sum(0, rows, [](int) {});
    block.for_each_sum(args.w, args.tokens, shared,
                       [&](index_t slot) { return gradient_column<View, X>(args, slot); });
  }
}

template <bool OneGroup, class View, class X>
__global__ void __launch_bounds__(gradient_block<View>::threads, 1)
    input_gradient(const __grid_constant__ input_gradient_args<View, X> args) {
  input_gradient_block<OneGroup, false>(args);
}

/// The same by runs.
template <bool OneGroup, class View, class X>
__global__ void __launch_bounds__(gradient_block<View>::threads, 1)
    input_gradient_by_runs(const __grid_constant__ input_gradient_args<View, X> args) {
  input_gradient_block<OneGroup, true>(args);
}

/// Threads of a block of add_runs.
inline constexpr int add_runs_threads = 256;

/// dX = the sums of runs added in their order, of add_runs_threads columns (blockIdx.x) and token
/// blockIdx.y.
template <class View, class X>
__global__ void __launch_bounds__(add_runs_threads)
    add_runs(const __grid_constant__ input_gradient_args<View, X> args) {
  const index_t columns = args.w.in_channels;
  const index_t slot = static_cast<index_t>(blockIdx.x) * add_runs_threads + threadIdx.x;
  const index_t token = blockIdx.y;
  if (slot >= columns) return;
  float sum = 0.0F;
  for (int i = 0; i < args.runs.count * tuning::row_parts; ++i) {
    sum += args.run_sums[(i * index_t{args.tokens} + token) * columns + slot];
  }
  gradient_column<View, X>(args, slot)(token, sum);
}

}  // namespace qeft::kernel
