// SPDX-License-Identifier: Apache-2.0
// Some columns of token after token, on their way through shared memory.
#pragma once

#include "qeft/arch/copy.cuh"
#include "qeft/arch/index.cuh"
#include "qeft/arch/mma.cuh"
#include "qeft/tuning/backward.hpp"

namespace qeft::block {

/// A matrix in memory, (tokens, columns), at any address.
template <class Scalar>
struct token_matrix {
  const Scalar* data;
  int columns;
};

/// Stages of tuning::weak_gradient_tokens tokens and tuning::weak_gradient_tile columns. Tokens and
/// columns that are not there are zeros. All threads of a block copy, in the same calls; any warp
/// reads. Nothing here waits or ends a set of copies: a stage may be read behind
/// arch::wait_for_copies and a barrier of the block, and filled again behind another.
template <class Scalar>
class token_columns {
  static constexpr int tokens = tuning::weak_gradient_tokens;
  static constexpr int columns = tuning::weak_gradient_tile;
  /// 16 more than the columns take, so that what is read together lies in different banks.
  static constexpr int token_bytes = 2 * columns + 16;
  static constexpr int stage_bytes = tokens * token_bytes;

 public:
  struct shared_storage {
    alignas(16) char of[tuning::weak_gradient_stages][stage_bytes];
  };

  __device__ token_columns(const token_matrix<Scalar>& x, int first_column, shared_storage& shared)
      : x_(x.data + first_column),
        stride_(x.columns),
        count_(min(x.columns - first_column, columns)),
        in_pieces_(x.columns % 8 == 0 && reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0),
        shared_(shared) {}

  /// Starts to copy the tokens from `token` on, of which there are `left`, into a stage.
  __device__ void start(int stage, int token, int left) const {
    const Scalar* const from = x_ + index_t{token} * stride_;
    char* const to = shared_.of[stage];
    const int width = in_pieces_ ? 8 : 1;  // columns at a time
    const int across = columns / width;
    for (int i = static_cast<int>(threadIdx.x); i < tokens * across;
         i += static_cast<int>(blockDim.x)) {
      const int row = i / across;
      const int column = i % across * width;
      const bool there = row < left && column < count_;
      const Scalar* const element = from + (there ? index_t{row} * stride_ + column : 0);
      char* const place = to + row * token_bytes + 2 * column;
      if (in_pieces_) {
        arch::copy_row_async(arch::shared_address(place), there ? element : x_, there ? 16 : 0);
      } else {
        *reinterpret_cast<Scalar*>(place) = there ? *element : Scalar{};
      }
    }
  }

  /// Where a lane reads the columns from `column` on as an A operand (rows of it are columns here,
  /// the contraction is over tokens), and as two B operands beside each other; in a stage's 16
  /// first tokens.
  __device__ std::uint32_t a_address(int column) const {
    const int lane = arch::lane();
    return address(lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8);
  }
  __device__ std::uint32_t b_address(int column) const {
    const int lane = arch::lane();
    return address(lane / 8 % 2 * 8 + lane % 8, column + lane / 16 * 8);
  }
  /// From there to the Step-th 16 tokens and `Columns` columns on.
  template <int Step, int Columns>
  static constexpr int offset = Step * 16 * token_bytes + 2 * Columns;
  static constexpr int stage_offset = stage_bytes;

 private:
  __device__ std::uint32_t address(int token, int column) const {
    return arch::shared_address(&shared_) +
           static_cast<std::uint32_t>(token * token_bytes + 2 * column);
  }

  const Scalar* x_;
  int stride_;
  int count_;
  bool in_pieces_;
  shared_storage& shared_;
};

}  // namespace qeft::block
