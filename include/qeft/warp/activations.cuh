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

  /// @param shared shared_bytes(x.tokens) of the warp's own
  __device__ activations(const token_rows<Scalar>& x, void* shared) {
    const int lane = static_cast<int>(threadIdx.x % 32U);
    for (int i = 0; i < TokenTiles; ++i) {
      const int token = 8 * i + lane % 8;
      from_[i] = token < x.tokens ? x.data + index_t{token} * x.stride : nullptr;
      // 8 columns of 8 tokens are a matrix of the lanes 8 i .. 8 i + 7. Where there are fewer tokens,
      // the last one stands in: its results are not stored.
      shared_[i] = arch::shared_address(shared) +
                   static_cast<std::uint32_t>(
                       (token < x.tokens ? token : x.tokens - 1) * row_bytes + lane / 8 * 16);
    }
  }

  /// Starts to copy columns of stage Which from `first` on, up to `last`; behind them zeros, up to a
  /// multiple of 32 columns, or with Fill to the end of the stage. @pre first is a multiple of 8, all
  /// lanes take part and have left what was in the stage
  template <int Which, bool Fill>
  __device__ void start(int first, int last) const {
    constexpr int begin = Which * columns * 2;
    const int mine = static_cast<int>(threadIdx.x % 32U) / 8 * 8;
    for (int i = 0; i < TokenTiles; ++i) {
      if (from_[i] == nullptr) continue;
      const Scalar* from = from_[i] + first + mine;
      if (first + columns <= last) {
        unroll<columns / 32>(
            [&](auto c) { arch::copy_async<begin + 64 * c, 64 * c>(shared_[i], from); });
        continue;
      }
      const int end = Fill ? columns : last - first;
#pragma unroll 1
      for (int c = 0; c < end; c += 32) {
        const int left = last - (first + mine + c);
        const int elements = left < 0 ? 0 : left < 8 ? left : 8;
        arch::copy_async(shared_[i] + static_cast<std::uint32_t>(begin + 2 * c),
                         left > 0 ? from + c : from_[i], 2 * elements);
      }
    }
  }
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
  const Scalar* from_[TokenTiles];    // the token of a lane in memory, or null
  std::uint32_t shared_[TokenTiles];  // where a lane writes and reads the token
};

}  // namespace qeft::warp
