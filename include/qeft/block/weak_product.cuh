// SPDX-License-Identifier: Apache-2.0
// What a warpgroup contributes to Y = X W^T: 64 rows of W, the weak columns, many tokens. For
// compute capability 9.0 alone.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/block/activation_ring.cuh"
#include "qeft/block/output_tile.cuh"
#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/core/unroll.hpp"
#include "qeft/layout/fragment.hpp"
#include "qeft/tuning/parts.hpp"

namespace qeft::block {

/// The product of 64 rows over layout::fragment with weak columns. Each warp has a tile of 16 rows.
/// Sums are formed as warp::part_product forms them, product after product. All threads of the
/// warpgroup take part in every call.
/// @tparam View   quantized_matrix_view<Format, weak_tail<...>, layout::fragment, device_memory>
/// @tparam Tokens 64 or 128
template <class View, int Tokens>
class weak_product {
  using scalar = typename View::scalar_type;
  using fragment = layout::fragment;
  using ring = activation_ring<scalar, Tokens>;
  using sums = warpgroup_sums<Tokens>;
  static constexpr int step_columns = fragment::step_columns;
  static constexpr int stage_columns = tuning::many_tokens_sm90::stage_columns;
  static constexpr int stage_steps = stage_columns / step_columns;
  /// Of a k-step.
  static constexpr int step_words = fragment::lanes * 4;

 public:
  /// @param row_tile the tile of 16 rows of this warp
  __device__ weak_product(const View& w, int row_tile)
      : columns_(static_cast<int>(w.weak_columns())),
        words_(reinterpret_cast<const std::uint32_t*>(w.weak_values) +
               row_tile * fragment::weak_steps(w.extent()) * step_words) {
    prefetch(0);
  }

  /// Adds the columns [first, last): x has stages of columns from `first` on.
  /// @pre first is a multiple of 16, and so is last unless the columns end there, which zeros
  ///      follow then
  __device__ void add(int first, int last, ring& x, sums& sum) const {
    sums of_two_stages;
    for (int at = first; at < last; at += stage_columns) {
      prefetch(at + stage_columns);
      std::uint32_t a[stage_steps][4] = {};
      const std::uint32_t* words = words_ + at / step_columns * step_words + arch::lane() * 4;
      unroll<stage_steps>([&](auto i) {
        if (at + i * step_columns < last) arch::load_once<4, i * step_words>(a[i], words);
      });
      const bool goes_on = (at - first) % tuning::stage_columns != 0;
      const std::uint64_t tokens = x.wait();
      unroll<stage_steps / 2>([&](auto i) {
        if (at + 2 * i * step_columns >= last) return;
        multiply<2 * i>(a, tokens, i > 0 || goes_on, of_two_stages);
      });
      arch::wait_for_products(of_two_stages.of);
      x.leave();
      const int next = at + stage_columns;
      if (next < last && (next - first) % tuning::stage_columns != 0) continue;
      for (int t = 0; t < Tokens / 8; ++t) {
        for (int i = 0; i < 4; ++i) sum.of[t][i] += of_two_stages.of[t][i];
      }
    }
  }

 private:
  /// Asks for a stage: each lane for one line of 128 bytes, a quarter of a k-step.
  __device__ void prefetch(int column) const {
    static_assert(stage_steps * step_words * 4 == 32 * 128);
    const int step = column / step_columns + arch::lane() / 4;
    if (step * step_columns >= columns_) return;
    arch::prefetch(words_ + step * step_words + arch::lane() % 4 * 32);
  }
  /// Starts to add k-steps Step and Step + 1.
  template <int Step>
  static __device__ void multiply(const std::uint32_t (&a)[stage_steps][4], std::uint64_t tokens,
                                  bool adds, sums& sum) {
    std::uint32_t pair[2][4];
    unroll<8>([&](auto i) { pair[i / 4][i % 4] = a[Step + i / 4][i % 4]; });
    arch::fence_products(pair);
    unroll<2>([&](auto i) {
      arch::multiply_64x16<scalar>(
          sum.of, pair[i], arch::advanced<ring::operand_offset(Step + i)>(tokens), i > 0 || adds);
    });
    arch::commit_products();
  }

  int columns_;
  const std::uint32_t* words_;  // of the tile of rows
};

}  // namespace qeft::block
