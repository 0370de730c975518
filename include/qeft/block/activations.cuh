// SPDX-License-Identifier: Apache-2.0
// The activations that the warps of a block share, on their way through shared memory.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/warp/activations.cuh"

namespace qeft::block {

/// Two stages of tuning::stage_columns columns of TokenWarps x TokenTiles x 8 tokens in shared
/// memory: one is multiplied while the next one comes. All threads of a block of
/// RowWarps x TokenWarps warps copy, and must make the same calls; those of warp w multiply the
/// w / RowWarps-th TokenTiles x 8 tokens. Takes the place of warp::activations in
/// warp::part_product.
template <class Scalar, int TokenTiles, int RowWarps, int TokenWarps>
class activations {
 public:
  /// Of a stage.
  static constexpr int columns = tuning::stage_columns;

 private:
  static constexpr int warps = RowWarps * TokenWarps;
  static constexpr int rows = TokenWarps * TokenTiles * 8;
  /// As in warp::activations.
  static constexpr int row_bytes = 2 * columns * 2 + 16;
  static_assert(columns == 32 * 8, "a warp copies a row of a stage, 16 bytes per lane");
  static_assert(rows % warps == 0);

 public:
  struct shared_storage {
    alignas(16) char of[rows][row_bytes];
  };

  /// @param x tokens from the block's first one on, of which columns are taken from the first on;
  ///          behind the last token zeros stand in
  __device__ activations(const warp::token_rows<Scalar>& x, shared_storage& shared)
      : stride_(x.stride), tokens_(x.tokens < rows ? x.tokens : rows) {
    const int lane = arch::lane();
    const int warp = arch::warp();
    next_ = x.data + index_t{warp} * x.stride + lane * 8;
    const std::uint32_t begin = arch::shared_address(&shared);
    written_ = begin + static_cast<std::uint32_t>(warp * row_bytes + lane * 16);
    const int row = warp / RowWarps * TokenTiles * 8 + lane % 8;
    read_ = begin + static_cast<std::uint32_t>(row * row_bytes + lane / 8 * 16);
  }

  /// As in warp::activations, by all threads of the block.
  template <bool GoesOn>
  __device__ void begin(int left) {
    start<0>(left);
    arch::commit_copies();
  }
  template <int Begin, int Read, bool GoesOn>
  __device__ void enter(int left) {
    if ((GoesOn && Read > columns) || left > columns) {
      start<(Begin / columns + 1) % 2>(left - columns);
    }
    arch::commit_copies();
    arch::wait_for_copies<1>();
    __syncthreads();
  }
  template <bool GoesOn>
  __device__ void halfway(int) const {}
  __device__ void leave() const { __syncthreads(); }

  /// As in warp::activations, of this warp's tokens.
  template <int Column>
  __device__ void operands(std::uint32_t (&b)[TokenTiles][4], int offset = 0) const {
    unroll<TokenTiles>([&](auto i) {
      arch::load_matrices<2 * Column + i * 8 * row_bytes>(
          b[i], read_ + static_cast<std::uint32_t>(2 * offset));
    });
  }

 private:
  /// Starts to copy the next columns, of which there are `left`, into stage Which; zeros behind
  /// them.
  template <int Which>
  __device__ void start(int left) {
    constexpr int begin = Which * columns * 2;
    if (left >= columns && tokens_ == rows) {
      unroll<rows / warps>([&](auto i) {
        arch::copy_row_async<begin + i * warps * row_bytes>(written_, next_ + i * warps * stride_);
      });
    } else {
      const int lane = arch::lane();
      const int elements = min(max(left - lane * 8, 0), 8);
#pragma unroll 1
      for (int row = arch::warp(), i = 0; row < rows; row += warps, ++i) {
        arch::copy_row_async(written_ + static_cast<std::uint32_t>(begin + i * warps * row_bytes),
                             next_ + i * warps * stride_, row < tokens_ ? 2 * elements : 0);
      }
    }
    next_ += columns;
  }

  index_t stride_;
  int tokens_;
  const Scalar* next_;     // what a thread copies next, of the first row of its warp
  std::uint32_t written_;  // where it does
  std::uint32_t read_;     // where a lane reads a token
};

}  // namespace qeft::block
