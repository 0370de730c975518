// SPDX-License-Identifier: Apache-2.0
// Activations on their way through shared memory, for all blocks of a cluster.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/arch/tensor_map.cuh"
#include "qeft/arch/wgmma.cuh"
#include "qeft/tuning/many_tokens_sm90.hpp"

namespace qeft::block {

/// Stages of some columns of Tokens tokens (tuning::many_tokens_sm90). One thread of each block of
/// a cluster fills them, one after another, with a part of the columns for all blocks; warps of all
/// blocks multiply them in the same order. Each thread that takes part has a ring of its own.
template <class Scalar, int Tokens>
class activation_ring {
  static constexpr int stages = tuning::many_tokens_sm90::stages;
  /// A tile: rows of 128 bytes, as the tensor map's box.
  static constexpr int tile_columns = 64;
  static constexpr int tiles = tuning::many_tokens_sm90::stage_columns / tile_columns;
  using tile = Scalar[Tokens][tile_columns];

 public:
  /// 1024-byte aligned, at the same place in all blocks of a cluster.
  struct shared_storage {
    alignas(1024) tile of[stages][tiles];
  };
  /// In shared memory too.
  struct barriers {
    arch::barrier filled[stages];
    arch::barrier left[stages];
  };
  /// The box of a tensor map over (tokens, columns) with a swizzle of 128 bytes.
  static constexpr unsigned box_columns = tile_columns;
  static constexpr unsigned box_tokens = Tokens;

  /// By one thread, before arch::sync_cluster. @param warps of a block that multiply
  static __device__ void init(barriers& b, int warps) {
    for (int i = 0; i < stages; ++i) {
      arch::init_barrier(b.filled[i], 1);
      arch::init_barrier(b.left[i], warps * arch::cluster_blocks());
    }
    arch::publish_barriers();
  }
  __device__ activation_ring(shared_storage& shared, barriers& b)
      : shared_(shared), barriers_(b), blocks_(arch::cluster_blocks()) {}

  /// Starts to fill the next stage with the columns from `column` on of the tokens from `token` on,
  /// once all have left it. By one thread of each block of the cluster, with the same arguments.
  __device__ void fill(const CUtensorMap& x, int token, int column) {
    arch::wait_for_phase(barriers_.left[stage_], phase_ ^ 1U);
    arch::barrier& filled = barriers_.filled[stage_];
    arch::arrive_and_expect(filled, static_cast<int>(sizeof(shared_.of[0])));
    for (int i = arch::block_in_cluster(); i < tiles; i += blocks_) {
      arch::copy_box_async(shared_.of[stage_][i], x, token, column + i * tile_columns, filled,
                           (1U << static_cast<unsigned>(blocks_)) - 1U);
    }
    advance();
  }

  /// Waits for the next stage; the B operand of its first k-step, whose columns are tokens.
  __device__ std::uint64_t wait() const {
    arch::wait_for_phase(barriers_.filled[stage_], phase_);
    return arch::swizzled_operand(shared_.of[stage_]);
  }
  /// Bytes from that operand to the one of k-step `step`.
  static __device__ constexpr int operand_offset(int step) {
    constexpr int steps = tile_columns / 16;
    return step / steps * static_cast<int>(sizeof(tile)) + step % steps * 32;
  }
  /// This warp has multiplied the stage. @pre all lanes take part
  __device__ void leave() {
    const int lane = arch::lane();
    if (lane < blocks_) arch::arrive_in_block(barriers_.left[stage_], lane);
    advance();
  }

 private:
  __device__ void advance() {
    if (++stage_ < stages) return;
    stage_ = 0;
    phase_ ^= 1U;
  }

  shared_storage& shared_;
  barriers& barriers_;
  int blocks_;
  int stage_ = 0;
  unsigned phase_ = 0;
};

}  // namespace qeft::block
