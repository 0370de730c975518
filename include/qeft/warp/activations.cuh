// SPDX-License-Identifier: Apache-2.0
// The activations of a warp's columns, on their way through shared memory.
#pragma once

#include "qeft/arch/copy.cuh"
#include "qeft/arch/index.cuh"
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

/// Two stages of `columns` columns of up to 8 * TokenTiles tokens in shared memory: one is
/// multiplied while the next one comes. For one warp.
template <class Scalar, int TokenTiles>
class activations {
 public:
  /// Of a stage.
  static constexpr int columns = tuning::stage_columns / TokenTiles;
  static_assert(columns % 32 == 0);

 private:
  /// Of a token.
  static constexpr int stages_bytes = 2 * columns * 2;
  /// From one token to the next: the rows which load_matrices reads together lie in different
  /// banks.
  static constexpr int row_bytes = stages_bytes + 16;

 public:
  /// Shared memory of a warp, 16-byte aligned.
  static constexpr int shared_bytes = 8 * TokenTiles * row_bytes;

  /// @param shared shared_bytes of the warp's own
  explicit __device__ activations(void* shared)
      : shared_(arch::kept(
            arch::shared_address(shared) +
            static_cast<std::uint32_t>(arch::lane() % 8 * row_bytes + arch::lane() / 8 * 16))) {}

  /// What is copied next. @param x of which columns are taken from the first on; tokens behind the
  ///                               last are zeros
  __device__ void take(const token_rows<Scalar>& x) {
    // Eight lanes have a column after another of eight tokens, as the matrices of load_matrices.
    for (int i = 0; i < TokenTiles; ++i) {
      const int token = 8 * i + arch::lane() % 8;
      bytes_[i] = arch::kept(token < x.tokens ? 16 : 0);
      next_[i] =
          x.data + arch::lane() / 8 * 8 + index_t{min(token, x.tokens - 1)} * index_t{x.stride};
    }
  }

  /// Starts to copy the first of `left` columns, and may go on with the second stage if that has
  /// some, or GoesOn.
  template <bool GoesOn>
  __device__ void begin(int left) {
    start<0>(left);
    arch::commit_copies();
  }
  /// Waits for the next stage, where stages take turns from column 0 on and this one begins at
  /// column Begin. It has the first of `left` columns, or none; behind them there are zeros up to
  /// the next multiple of Read. Meanwhile the one behind it comes if it has columns, or GoesOn. All
  /// lanes take part.
  template <int Begin, int Read, bool GoesOn>
  __device__ void enter(int left) {
    if ((GoesOn && Read > columns) || left > columns) {
      start<(Begin / columns + 1) % 2>(left - columns);
    }
    arch::commit_copies();
    arch::wait_for_copies<1>();
    __syncwarp();
  }
  /// The first half of that stage has been read.
  template <bool GoesOn>
  __device__ void halfway(int) const {}
  /// All of it has been read. All lanes take part.
  __device__ void leave() const { __syncwarp(); }
  /// Nothing more is read.
  __device__ void finish() const {}

  /// B operands of the two k-steps at Column, where stages take turns from column 0 on, and
  /// `offset` columns further in the same stage; for each tile of tokens: registers 0 and 1 of the
  /// first step, 2 and 3 of the second.
  template <int Column>
  __device__ void operands(std::uint32_t (&b)[TokenTiles][4], int offset = 0) const {
    unroll<TokenTiles>([&](auto i) {
      arch::load_matrices<2 * Column % stages_bytes + i * 8 * row_bytes>(
          b[i], shared_ + static_cast<std::uint32_t>(2 * offset));
    });
  }

 private:
  /// Starts to copy the next columns, of which there are `left`, into stage Which; zeros behind
  /// them.
  template <int Which>
  __device__ void start(int left) {
    constexpr int begin = Which * columns * 2;
    if (left >= columns) {
      unroll<TokenTiles>([&](auto i) {
        unroll<columns / 32>([&](auto c) {
          arch::copy_async<begin + i * 8 * row_bytes + 64 * c, 64 * c>(shared_, next_[i],
                                                                       bytes_[i]);
        });
      });
    } else {
      int there = 2 * (left - arch::lane() / 8 * 8);
#pragma unroll 1
      for (std::uint32_t at = 0; at < 2 * columns; at += 64, there -= 64) {
        const int most = max(there, 0);
        unroll<TokenTiles>([&](auto i) {
          arch::copy_async<begin + i * 8 * row_bytes>(shared_ + at, next_[i] + at / 2,
                                                      min(most, bytes_[i]));
        });
      }
    }
    for (auto& next : next_) next += columns;
  }

  int bytes_[TokenTiles];           // that a lane copies at a time: 0 behind the last token
  const Scalar* next_[TokenTiles];  // what it copies next
  std::uint32_t shared_;            // where it writes and reads, of the first tile of tokens
};

}  // namespace qeft::warp
