// SPDX-License-Identifier: Apache-2.0
// The activations that the blocks of a cluster share, on their way through shared memory.
#pragma once

#include <cstddef>

#include "qeft/arch/bulk_copy.cuh"
#include "qeft/arch/index.cuh"
#include "qeft/tuning/few_tokens.hpp"
#include "qeft/warp/activations.cuh"

namespace qeft::block {

/// Two stages of `columns` columns of up to 8 * TokenTiles tokens in shared memory for each warp.
/// Warps of the same number in all blocks of a cluster multiply the same activations, and take
/// turns in copying a stage for all of them, once half of the other stage is read: they wait for
/// each other only if they are more than half a stage apart. Takes the place of warp::activations
/// for warps that make the same calls in all blocks. Compute capability 9.0.
///
/// What is behind the last column of a token up to the next 16 bytes is read too, and may be
/// anything, but must be readable. Clusters have one dimension and 1, 2, 4 or 8 blocks, and blocks
/// at most tuning::most_few_tokens_warps(1) warps. All threads of a block make, finish and destroy
/// one of these, and all warps call `begin`, behind which all blocks have their barriers. These are
/// static: a kernel has one object of a type at a time.
template <class Scalar, int TokenTiles>
class cluster_activations {
  static_assert(TokenTiles <= 4, "a lane copies the columns of a token");

 public:
  /// Of a stage.
  static constexpr int columns = tuning::chunk_columns / TokenTiles;

 private:
  /// As in warp::activations.
  static constexpr int row_bytes = 2 * columns + 16;
  static constexpr int stage_bytes = 8 * TokenTiles * row_bytes;
  struct barriers {
    arch::barrier left;                   // by all blocks: the stage that this block fills next
    alignas(16) arch::barrier filled[2];  // the stages
  };
  static constexpr unsigned to_filled = offsetof(barriers, filled);
  /// From the barrier of one stage to that of the other: a bit of their addresses.
  static constexpr unsigned other_stage = sizeof(arch::barrier);

 public:
  /// Shared memory of a warp, 16-byte aligned; the barriers are static.
  static constexpr int shared_bytes = 2 * stage_bytes;

  /// @param shared shared_bytes of the warp's own, at the same place in all blocks
  explicit __device__ cluster_activations(void* shared) : shared_(static_cast<char*>(shared)) {
    __shared__ barriers of_warps[tuning::most_few_tokens_warps(1)];
    const auto warp = static_cast<unsigned>(arch::warp());
    barriers& mine = of_warps[warp];
    if (arch::lane() == 0) {
      arch::init_barrier(mine.left, arch::cluster_blocks());
      arch::init_barrier(mine.filled[0], 1);
      arch::init_barrier(mine.filled[1], 1);
      arch::publish_barriers();
    }
    arch::arrive_at_cluster();
    barriers_ = arch::kept(arch::shared_address(&mine));
    filled_ = barriers_ + to_filled + other_stage;
    last_block_ = static_cast<unsigned>(arch::cluster_blocks()) - 1U;
    const auto block = static_cast<unsigned>(arch::block_in_cluster());
    turn_ = arch::kept((block - warp) & last_block_);
    after_next_ = arch::kept(warp + 1U);
  }
  cluster_activations(const cluster_activations&) = delete;
  cluster_activations& operator=(const cluster_activations&) = delete;
  /// Nothing more is read: by all threads, before this is destroyed.
  __device__ void finish() const { arch::arrive_at_cluster(); }
  /// No block ends while others copy to it or arrive at its barriers.
  __device__ ~cluster_activations() { arch::wait_for_cluster(); }

  /// What is copied next. @param x of which columns are taken from the first on; tokens behind the
  ///                               last repeat it
  __device__ void take(const warp::token_rows<Scalar>& x) {
    x_ = x;
    for (int i = 0; i < TokenTiles; ++i) {
      const int token = min(8 * i + arch::lane() % 8, x.tokens - 1);
      const auto first = arch::shared_address(shared_ + token * row_bytes + arch::lane() / 8 * 16);
      rows_[i] = arch::kept(2 * first + stage_bytes);
      row_[i] = arch::kept(entered_ % 2 == 0 ? rows_[i] - first : first);
    }
  }

  /// As in warp::activations.
  template <bool GoesOn>
  __device__ void begin(int left) {
    if (started_ == 0) arch::wait_for_cluster();
    columns_ = left;
    first_stage_ = started_;
    start();
    if (GoesOn || left > columns) start();
  }
  template <int Begin, int Read, bool GoesOn>
  __device__ void enter(int left) {
    filled_ ^= other_stage;
    arch::wait_for_phase(filled_, entered_ / 2 % 2);
    __syncwarp();
    ++entered_;
    for (int i = 0; i < TokenTiles; ++i) row_[i] = arch::kept(rows_[i] - row_[i]);
    if (left < columns) clear_behind<Read>(max(left, 0));
  }
  template <bool GoesOn>
  __device__ void halfway(int left) {
    if ((GoesOn || left > columns) && started_ == entered_) start();
  }
  __device__ void leave() const {
    __syncwarp();
    if (arch::lane() != 0) return;
    arch::arrive_in_block(barriers_, static_cast<int>((entered_ + after_next_) & last_block_));
  }

  template <int Column>
  __device__ void operands(std::uint32_t (&b)[TokenTiles][4], int offset = 0) const {
    unroll<TokenTiles>([&](auto i) {
      arch::load_matrices<2 * (Column % columns)>(b[i],
                                                  row_[i] + static_cast<std::uint32_t>(2 * offset));
    });
  }

 private:
  /// Starts to fill the next stage, in all blocks if it is this one's turn.
  __device__ void start() {
    if ((started_ & last_block_) == turn_) copy(started_);
    ++started_;
  }
  __device__ void copy(unsigned stage) const {
    const int first = static_cast<int>(stage - first_stage_) * columns;
    const int bytes = 2 * max(min(columns, (columns_ - first + 7) & ~7), 0);
    const std::uint32_t filled = barriers_ + to_filled + stage % 2 * other_stage;
    if (stage >= 2 && last_block_ > 0) {  // else nobody has entered it, or this warp has left it
      const unsigned blocks = last_block_ + 1;
      arch::wait_for_phase(barriers_, ((stage - 2) & blocks) == 0 ? 0 : 1);
    }
    if (arch::lane() <= static_cast<int>(last_block_)) {
      arch::arrive_and_expect_in_block(filled, arch::lane(), x_.tokens * bytes);
    }
    if (arch::lane() < x_.tokens && bytes > 0) {
      arch::copy_to_blocks_async(
          arch::shared_address(shared_ + stage % 2 * stage_bytes + arch::lane() * row_bytes),
          x_.data + first + index_t{arch::lane()} * index_t{x_.stride}, bytes, filled,
          (2U << last_block_) - 1U);
    }
    __syncwarp();
  }
  /// Zeros behind the last column of the stage that is read, up to the next multiple of Read.
  template <int Read>
  __device__ void clear_behind(int last) const {
    const int end = Read > columns ? columns : ceil_quotient(last, Read) * Read;
    if (last == end) return;
    char* row = shared_ + (entered_ + 1) % 2 * stage_bytes;
    for (int token = 0; token < x_.tokens; ++token, row += row_bytes) {
#pragma unroll 1
      for (int column = last / 2 * 2 + 2 * arch::lane(); column < end; column += 64) {
        auto* const pair = reinterpret_cast<std::uint32_t*>(row + 2 * column);
        *pair = column < last ? *pair & 0xffffU : 0U;
      }
    }
    arch::fence_bulk_copies();
    __syncwarp();
  }

  char* shared_;
  std::uint32_t barriers_;
  unsigned last_block_;  // of the cluster: a mask, too
  unsigned turn_;        // this block fills stages that are as much modulo the number of blocks
  unsigned after_next_;  // behind entered_: the stage after the next one, and whose turn that is
  warp::token_rows<Scalar> x_;
  int columns_;                     // of x_
  unsigned first_stage_;            // of these
  unsigned started_ = 0;            // stages that are filled, or being filled
  unsigned entered_ = 0;            // stages
  std::uint32_t filled_;            // barrier of the stage that is read
  std::uint32_t row_[TokenTiles];   // that a lane reads there
  std::uint32_t rows_[TokenTiles];  // the sum of that and of the one in the other stage
};

}  // namespace qeft::block
