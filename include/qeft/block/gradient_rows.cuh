// SPDX-License-Identifier: Apache-2.0
// Gradients of a block's tokens, on their way through shared memory.
#pragma once

#include "qeft/arch/copy.cuh"
#include "qeft/arch/index.cuh"
#include "qeft/arch/mma.cuh"
#include "qeft/core/unroll.hpp"
#include "qeft/tuning/backward.hpp"

namespace qeft::block {

/// Two stages of tuning::chain_rows rows of each part of the rows, and of up to Tokens tokens: one
/// is multiplied while the next one comes. All threads of a block copy, any of its warps reads.
/// Nothing here waits: a stage may be read behind arch::wait_for_copies and a barrier of the block,
/// and filled again behind another barrier.
template <class Scalar, int Tokens>
class gradient_rows {
  static constexpr int rows = tuning::chain_rows;
  /// 16 more than the rows take, so that what load_matrices reads together lies in different banks.
  static constexpr int token_bytes = 2 * rows * tuning::row_parts + 16;
  static constexpr int stage_bytes = Tokens * token_bytes;

 public:
  struct shared_storage {
    alignas(16) char of[2][stage_bytes];
  };

  /// @param dy        (count, tuning::row_parts x part_rows) of the block's tokens, count >= 1;
  ///                  16-byte aligned
  /// @param part_rows a multiple of 8
  __device__ gradient_rows(const Scalar* dy, int part_rows, int count, shared_storage& shared)
      : dy_(dy), part_rows_(part_rows), count_(count), shared_(arch::shared_address(&shared)) {}

  /// Starts to copy the rows from `row` of each part on into a stage, and ends a set of copies.
  /// Where there are fewer tokens, the last one stands in.
  __device__ void start(int stage, int row) const {
    constexpr int pieces = rows / 8;  // of 16 bytes, of a token and part
    const int piece = static_cast<int>(threadIdx.x) % (pieces * tuning::row_parts);
    const int from = row + piece % pieces * 8;
    if (from < part_rows_) {
      const Scalar* const source = dy_ + piece / pieces * part_rows_ + from;
      const std::uint32_t to =
          shared_ + static_cast<std::uint32_t>(stage * stage_bytes + 16 * piece);
      const int stride = part_rows_ * tuning::row_parts;
      for (int token = static_cast<int>(threadIdx.x) / (pieces * tuning::row_parts); token < Tokens;
           token += static_cast<int>(blockDim.x) / (pieces * tuning::row_parts)) {
        arch::copy_row_async(to + static_cast<std::uint32_t>(token * token_bytes),
                             source + index_t{min(token, count_ - 1)} * stride);
      }
    }
    arch::commit_copies();
  }

  /// Where a lane reads the first 16 rows of a part in a stage; what belongs to a row lies 2 bytes
  /// behind that of the one before.
  __device__ std::uint32_t operand_address(int stage, int part) const {
    const int lane = arch::lane();
    return shared_ +
           static_cast<std::uint32_t>(stage * stage_bytes + part * 2 * rows +
                                      (lane / 16 * 8 + lane % 8) * token_bytes + lane / 8 % 2 * 16);
  }
  /// B operands of 16 rows from operand_address on, of all tokens.
  static __device__ void operands(std::uint32_t (&b)[Tokens / 8][2], std::uint32_t address) {
    unroll<Tokens / 16>([&](auto pair) {
      std::uint32_t m[4];
      arch::load_matrices<pair * 16 * token_bytes>(m, address);
      b[2 * pair][0] = m[0];
      b[2 * pair][1] = m[1];
      b[2 * pair + 1][0] = m[2];
      b[2 * pair + 1][1] = m[3];
    });
  }

 private:
  const Scalar* dy_;
  int part_rows_;
  int count_;
  std::uint32_t shared_;
};

}  // namespace qeft::block
