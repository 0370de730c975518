// SPDX-License-Identifier: Apache-2.0
// What a warpgroup contributes to Y = X W^T: 64 rows of W, the dense columns, many tokens. For
// compute capability 9.0 alone.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/block/activation_ring.cuh"
#include "qeft/block/output_tile.cuh"
#include "qeft/core/unroll.hpp"
#include "qeft/tuning/parts.hpp"
#include "qeft/warp/group_scales.cuh"

namespace qeft::block {

/// The product of 64 rows over layout::fragment with all dense columns, run after run of them. Each
/// warp has a tile of 16 rows, and makes operands of its codes while the tensor cores multiply
/// those of another warpgroup. Sums are formed as warp::part_product forms them, product after
/// product. All threads of the warpgroup take part in every call.
/// @tparam View         quantized_matrix_view<Format, weak_tail<...>, layout::fragment,
///                      device_memory>
/// @tparam Tokens       64 or 128; 64 with scaled zero points
/// @tparam GroupColumns tuning::chunk_columns for groups of any multiple of it, and for one group;
///                      a quarter of it; dynamic for any other
template <class View, int Tokens, index_t GroupColumns>
class dense_product {
  using format = typename View::format_type;
  using scalar = typename View::scalar_type;
  using fragment = layout::fragment;
  static constexpr int bits = format::bits;
  using unpack = qeft::unpack<bits, scalar>;
  using ring = activation_ring<scalar, Tokens>;
  using sums = warpgroup_sums<Tokens>;
  static constexpr int tile_columns = static_cast<int>(fragment::columns<bits>);
  static constexpr int step_columns = fragment::step_columns;
  static constexpr int stage_columns = tuning::many_tokens_sm90::stage_columns;
  static constexpr int stage_steps = stage_columns / step_columns;
  static constexpr int stage_tiles = stage_columns / tile_columns;
  static_assert(2 * stage_columns == tuning::stage_columns && stage_columns % tile_columns == 0);
  static constexpr bool scaled = format::zero == zero_kind::scaled;
  static_assert(!scaled || Tokens == 64, "the sums of more tokens do not fit the registers");
  /// A group is a stage, or has an even number of stages, or ends anywhere.
  static constexpr bool stage_is_group = GroupColumns == stage_columns;
  static constexpr bool any_group = GroupColumns == dynamic;
  static_assert(stage_is_group || any_group || GroupColumns == tuning::chunk_columns);

 public:
  /// @param row_tile the tile of 16 rows of this warp
  __device__ dense_product(const View& w, int row_tile)
      : codes_(w, row_tile), group_(w, row_tile) {}

  /// Adds the columns from `first` on up to `last`: x has stages of them, then of zeros behind the
  /// last one of all.
  /// @pre first is 0 or the last one of the call before; last is a multiple of
  ///      tuning::chunk_columns unless the columns end there
  __device__ void add(int first, int last, ring& x, sums& sum) {
    for (int column = first; column < last; column += 2 * stage_columns) {
      unroll<2>([&](auto half) {
        const int at = column + half * stage_columns;
        if (half == 1 && at >= last) return;
        // Tensor cores round sums over many products in one direction, so none goes on for more
        // than two stages.
        const bool ends_sum = half == 1 || at + stage_columns >= last;
        const std::uint64_t tokens = x.wait();
        group_.template multiply<half>(codes_.template stage<half>(), tokens, ends_sum, sum);
        codes_.template load_next<half>(at);
        group_.wait();
        x.leave();
        group_.passed_stage(ends_sum, sum);
      });
    }
  }

 private:
  /// Codes on their way into registers, some stages before they are needed, and into the
  /// second-level cache before that.
  class code_stream {
    static constexpr int stages_ahead = 2;
    static constexpr int stages_in_cache = 8;
    static constexpr int stage_words = stage_tiles * static_cast<int>(fragment::tile_words<bits>());

   public:
    using words = typename unpack::lane_words[stage_tiles];

    __device__ code_stream(const View& w, int row_tile)
        : last_(static_cast<int>(w.dense_columns())) {
      const int lane = arch::lane();
      const std::uint32_t* tile = w.codes + index_t{row_tile} * ceil_quotient(last_, tile_columns) *
                                                fragment::tile_words<bits>();
      low_ = tile + lane * 4;
      high_ = tile + fragment::lanes * 4 + lane * (unpack::words - 4);
      lines_ = tile + lane * line_words;
      unroll<stages_ahead>([&](auto i) { load<i>(i * stage_columns); });
      for (int i = 0; i < stages_in_cache; ++i) prefetch(i * stage_columns);
    }
    /// The words of a stage, an even or an odd one.
    template <int Half>
    __device__ const words& stage() const {
      return ring_[Half % stages_ahead];
    }
    /// Instead of the stage at `column`, which is done, a later one.
    template <int Half>
    __device__ void load_next(int column) {
      load<Half % stages_ahead>(column + stages_ahead * stage_columns);
      prefetch(column + stages_in_cache * stage_columns);
    }

   private:
    /// Of a cache line.
    static constexpr int line_words = 32;
    static constexpr int tile_lines = static_cast<int>(fragment::tile_words<bits>()) / line_words;

    /// Asks for the next stage that is not in the cache yet: each lane for a line.
    __device__ void prefetch(int column) {
      const int lane = arch::lane();
      if (lane < stage_tiles * tile_lines && column + lane / tile_lines * tile_columns < last_) {
        arch::prefetch(lines_);
      }
      lines_ += stage_words;
    }
    template <int Slot>
    __device__ void load(int column) {
      unroll<stage_tiles>([&](auto i) {
        if (column + i * tile_columns >= last_) return;
        constexpr int offset = i * static_cast<int>(fragment::tile_words<bits>());
        arch::load_once<4, offset>(ring_[Slot][i], low_);
        if constexpr (unpack::words > 4) {
          arch::load_once<unpack::words - 4, offset>(ring_[Slot][i] + 4, high_);
        }
      });
      low_ += stage_words;
      high_ += stage_words;
    }

    int last_;
    const std::uint32_t* low_;   // of the first plane, the next stage
    const std::uint32_t* high_;  // of the second one
    const std::uint32_t* lines_;
    words ring_[stages_ahead] = {};
  };

  /// The group that is being summed up, without its scale.
  class group_state {
    /// k-steps that are multiplied together: those of the least group, or half a stage.
    static constexpr int steps_together = any_group ? 2 : stage_steps / 2;

   public:
    __device__ group_state(const View& w, int row_tile)
        : columns_(static_cast<int>(w.columns_per_group)),
          sets_(ceil_quotient(w.groups, fragment::groups_together)),
          left_(columns_),
          params_(w, row_tile * sets_) {
      load_set();
      enter();
    }

    /// Starts to add a stage, the first one (Half == 0) or the second one of a sum at most.
    /// @param ends_sum no sum goes on behind it
    template <int Half>
    __device__ void multiply(const typename code_stream::words& words, std::uint64_t tokens,
                             bool ends_sum, sums& sum) {
      unroll<stage_steps / steps_together>([&](auto i) {
        constexpr int first = i * steps_together;
        std::uint32_t a[steps_together][4];
        unroll<steps_together>([&](auto s) {
          constexpr int step = first + s;
          unpack::template step<step % unpack::steps>(words[step / unpack::steps], offsets_, a[s]);
        });
        arch::fence_products(a);
        unroll<steps_together>([&](auto s) {
          constexpr int step = first + s;
          const bool adds =
              s > 0 || (any_group ? has_sum_ : i > 0 || (Half == 1 && !stage_is_group));
          const std::uint64_t b = arch::advanced<ring::operand_offset(step)>(tokens);
          arch::multiply_64x16<scalar>(codes_.of, a[s], b, adds);
          if constexpr (scaled) {
            constexpr std::uint32_t one = pair_of<scalar>::power(0);
            const std::uint32_t ones[4] = {one, one, one, one};
            arch::multiply_64x16<scalar>(inputs_.of, ones, b, adds);
          }
        });
        arch::commit_products();
        if constexpr (any_group) {
          has_sum_ = true;
          left_ -= steps_together * step_columns;
          if (left_ <= 0 || (ends_sum && i + 1 == stage_steps / steps_together)) {
            wait();
            leave(sum);
          }
        }
      });
    }
    __device__ void wait() {
      arch::wait_for_products(codes_.of);
      if constexpr (scaled) arch::wait_for_products(inputs_.of);
    }
    /// Behind a stage whose products have been waited for.
    __device__ void passed_stage(bool ends_sum, sums& sum) {
      if constexpr (any_group) return;
      left_ -= stage_columns;
      if (stage_is_group || ends_sum) leave(sum);
    }

   private:
    /// Adds the sum to that of the part, with its scale.
    __device__ void leave(sums& sum) {
      add(sum, scale_, codes_);
      if constexpr (scaled) add(sum, rest_, inputs_);
      has_sum_ = false;
      if (!stage_is_group && left_ > 0) return;
      ++group_;
      left_ = columns_;
      if (group_ % 4 == 0 && group_ < 4 * sets_) {
        params_.advance();
        load_set();
      }
      enter();
    }
    /// The set behind the present one, if there is one.
    __device__ void load_set() {
      if (group_ / 4 + 1 < sets_) params_.load_next();
    }
    __device__ void enter() {
      offsets_ = params_.offsets(group_ % 4);
      scale_ = params_.scale(group_ % 4);
      if constexpr (scaled) rest_ = params_.rest(group_ % 4);
    }
    using scales = warp::group_scales<format>;
    static __device__ void add(sums& sum, typename scales::pair scale, const sums& x) {
      for (int t = 0; t < Tokens / 8; ++t) {
        for (int i = 0; i < 4; ++i) {
          sum.of[t][i] = fmaf(i < 2 ? scale.low : scale.high, x.of[t][i], sum.of[t][i]);
        }
      }
    }

    int columns_;
    int sets_;
    int group_ = 0;
    int left_;              // columns that the group still has
    bool has_sum_ = false;  // where that is not known
    scales params_;
    typename unpack::offsets offsets_;
    typename scales::pair scale_;
    typename scales::pair rest_ = {};
    sums codes_;   // of (q - z) x
    sums inputs_;  // of x, for what scaled zero points leave
  };

  code_stream codes_;
  group_state group_;
};

}  // namespace qeft::block
