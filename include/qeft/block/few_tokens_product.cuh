// SPDX-License-Identifier: Apache-2.0
// What a block contributes to Y = X W^T for few tokens: some rows of W, all of its columns.
#pragma once

#include "qeft/tuning/few_tokens.hpp"
#include "qeft/warp/part_product.cuh"

namespace qeft::block {

/// Activations of a block's tokens, dense and weak columns apart. Of either, 16 bytes at a time are
/// read up to the end of a token's columns: what is behind them there may be anything, but must be
/// readable.
template <class Scalar>
struct few_tokens_x {
  const Scalar* dense;  // (tokens, IC - k), 16-byte aligned
  const Scalar* weak;   // (tokens, k), 16-byte aligned
  int stride;           // elements from one token to the next in both, a multiple of 8
  int tokens;           // 1 to 8 * TokenTiles
};

/// The product of RowTiles x 16 rows of a layer over layout::fragment with up to 8 * TokenTiles
/// tokens. Its warps take the parts of the columns; the sums of the parts meet in shared memory,
/// where they are added in their order. Products of several layers of the same shape and
/// activations can be kept side by side.
///
///     const product p(shared, parts, parts_each);  // all threads of the block
///     p.multiply(w, row_tile, x);
///     p.meet();
///     for (unsigned at = threadIdx.x; at < product::places; at += blockDim.x) {
///       const auto sums = p.sums(at);  // of rows product::row(at, i) and token product::token(at)
///     }
///
/// Blocks have one dimension, of whole warps: tuning::plan_warps says how many. Parameters are
/// those of warp::part_product, and
/// @tparam Activations of a warp, on their way: warp::activations or cluster_activations
template <class View, int RowTiles, int TokenTiles, index_t GroupColumns,
          class Activations = warp::activations<typename View::scalar_type, TokenTiles>>
class few_tokens_product {
  using scalar = typename View::scalar_type;
  using warp_product = warp::part_product<View, RowTiles, TokenTiles, GroupColumns>;

 public:
  static constexpr int rows = 16 * RowTiles;
  static constexpr int most_tokens = 8 * TokenTiles;
  /// Rows of a token that are added together.
  static constexpr int rows_together = 2 * RowTiles;
  static constexpr unsigned places = rows * most_tokens / rows_together;
  struct alignas(rows_together * sizeof(float)) values {
    float of[rows_together];
  };

  /// Shared memory of a block, 16-byte aligned.
  /// @param parts    their number  @param products that are kept
  QEFT_HOST_DEVICE static constexpr int shared_bytes(int parts, int warps,
                                                     int products = 1) noexcept {
    return products * parts * static_cast<int>(places * sizeof(values)) +
           warps * Activations::shared_bytes;
  }

  /// @param shared     shared_bytes that nobody else uses as long as this does
  /// @param parts      tuning::make_parts of the layer
  /// @param parts_each what tuning::plan_warps says; so many in a row a warp takes
  /// @param products   that are kept
  __device__ few_tokens_product(void* shared, const tuning::parts& parts, int parts_each,
                                int products = 1)
      : parts_(parts),
        parts_each_(parts_each),
        sums_(static_cast<values*>(shared)),
        warp_(arch::uniform_warp()),
        staged_(static_cast<char*>(shared) + shared_bytes(parts.count(), warp_, products)) {}

  /// Multiplies rows from 16 * row_tile on; those behind the last one are anything. All threads of
  /// the block take part; once they have met, `sums` has the results.
  /// @param which of the products that are kept, from 0 on
  __device__ void multiply(const View& w, int row_tile, const few_tokens_x<scalar>& x,
                           int which = 0) const {
    const int part = warp_ * parts_each_;
    values* to = first_sum(which) + static_cast<unsigned>(part) * places + arch::lane();
    warp_product(w, row_tile)
        .for_each_part(
            parts_, part, min(part + parts_each_, parts_.count()), x.dense, x.weak,
            [&](const scalar* first) -> Activations& {
              staged_.take({first, x.stride, x.tokens});
              return staged_;
            },
            [&](const typename warp_product::result& sum) {
              put(to, sum);
              to += places;
            });
  }

  /// Between the last `multiply` and `sums`: __syncthreads, and what else Activations need.
  __device__ void meet() const {
    staged_.finish();
    __syncthreads();
  }

  /// Token that place `at` is about, 0 <= at < places; there may be fewer.
  static __device__ constexpr int token(unsigned at) {
    return static_cast<int>(at / 64U * 8U + at % 4U * 2U + at % 64U / 32U);
  }
  /// Row of its i-th sum, 0 <= i < rows_together, counted from the first row of the block.
  static __device__ constexpr int row(unsigned at, int i) {
    return static_cast<int>(at % 32U / 4U) + 8 * i;
  }
  /// The results of place `at`, with which any thread may go on.
  __device__ values sums(unsigned at, int which = 0) const {
    values sum = {};
    const values* from = first_sum(which) + at;
    for (int part = 0; part < parts_.count(); ++part, from += places) {
      const values of_part = *from;
      for (int i = 0; i < rows_together; ++i) sum.of[i] += of_part.of[i];
    }
    return sum;
  }

 private:
  __device__ values* first_sum(int which) const {
    return sums_ + static_cast<unsigned>(which * parts_.count()) * places;
  }
  static __device__ void put(values* to, const typename warp_product::result& sum) {
    for (int t = 0; t < TokenTiles; ++t) {
      for (int i = 0; i < 2; ++i) {
        values v;
        for (int r = 0; r < rows_together; ++r) v.of[r] = sum.of[r / 2][t][r % 2 * 2 + i];
        to[(2 * t + i) * 32] = v;
      }
    }
  }

  tuning::parts parts_;
  int parts_each_;
  values* sums_;  // (products, parts, places)
  int warp_;
  mutable Activations staged_;  // of this warp
};

}  // namespace qeft::block
