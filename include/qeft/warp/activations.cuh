// SPDX-License-Identifier: Apache-2.0
// The activations of a warp's columns, on their way through shared memory.
#pragma once

#include "qeft/arch/copy.cuh"
#include "qeft/arch/mma.cuh"
#include "qeft/core/half.hpp"
#include "qeft/core/unroll.hpp"
#include "qeft/tuning/parts.hpp"

namespace qeft::warp {

/// A matrix of activations in memory, (tokens, columns).
template <class Scalar>
struct token_rows {
  const Scalar* data;  // 16-byte aligned
  int stride;          // elements from one token to the next, a multiple of 8
  int tokens;          // at least 1
};

/// Two stages of tuning::stage_columns columns of up to 8 * TokenTiles tokens in shared memory: one
/// is multiplied while the next one comes. For one warp.
template <class Scalar, int TokenTiles>
class activations {
  static constexpr int columns = tuning::stage_columns;
  /// Bytes from one token to the next: 16 more than both stages take, so that the rows which
  /// load_matrices reads together lie in different banks.
  static constexpr int row_bytes = 2 * columns * 2 + 16;

 public:
  /// Shared memory of a warp, 16-byte aligned.
  QEFT_HOST_DEVICE static constexpr int shared_bytes(int tokens) noexcept {
    return tokens * row_bytes;
  }

  /// @param x      of which columns are taken from the first on
  /// @param shared shared_bytes(x.tokens) of the warp's own
  __device__ activations(const token_rows<Scalar>& x, void* shared) {
    const int lane = static_cast<int>(threadIdx.x % 32U);
    for (int i = 0; i < TokenTiles; ++i) {
      const int token = 8 * i + lane % 8;
      has_token_[i] = token < x.tokens;
      // Eight lanes have a column after another of eight tokens, as the matrices of load_matrices.
      // Where there are fewer tokens, the last one stands in: its results are not stored.
      const int row = has_token_[i] ? token : x.tokens - 1;
      next_[i] = x.data + index_t{row} * x.stride + lane / 8 * 8;
      shared_[i] = arch::shared_address(shared) +
                   static_cast<std::uint32_t>(row * row_bytes + lane / 8 * 16);
    }
  }

  /// Starts to copy the next columns, of which there are `left`, into stage Which; behind them
  /// zeros, up to a multiple of 32 columns, or with Fill to the end of the stage. @pre all lanes
  /// take part and have left the stage
  template <int Which, bool Fill>
  __device__ void start(int left) {
    constexpr int begin = Which * columns * 2;
    for (int i = 0; i < TokenTiles; ++i) {
      if (!has_token_[i]) continue;
      if (left >= columns) {
        unroll<columns / 32>(
            [&](auto c) { arch::copy_async<begin + 64 * c, 64 * c>(shared_[i], next_[i]); });
      } else {
        const int mine = left - static_cast<int>(threadIdx.x % 32U) / 8 * 8;
#pragma unroll 1
        for (int c = 0; c < (Fill ? columns : left); c += 32) {
          const int elements = mine < c ? 0 : mine < c + 8 ? mine - c : 8;
          arch::copy_async(shared_[i] + static_cast<std::uint32_t>(begin + 2 * c), next_[i] + c,
                           2 * elements);
        }
      }
      next_[i] += columns;
    }
  }
  /// Before `start`: no lane reads any more of what is in the stage.
  __device__ void leave() const { __syncwarp(); }
  /// Waits for all stages but the last Pending that were committed.
  template <int Pending>
  __device__ void wait() const {
    arch::wait_for_copies<Pending>();
    __syncwarp();
  }

  /// B operands of the two k-steps at Column of both stages together, for each tile of tokens:
  /// registers 0 and 1 of the first step, 2 and 3 of the second.
  template <int Column>
  __device__ void operands(std::uint32_t (&b)[TokenTiles][4], int offset = 0) const {
    for (int i = 0; i < TokenTiles; ++i) {
      arch::load_matrices<2 * Column>(b[i], shared_[i] + static_cast<std::uint32_t>(2 * offset));
    }
  }

 private:
  bool has_token_[TokenTiles];
  const Scalar* next_[TokenTiles];    // what a lane copies next
  std::uint32_t shared_[TokenTiles];  // where a lane writes and reads its token
};

}  // namespace qeft::warp
