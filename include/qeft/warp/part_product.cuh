// SPDX-License-Identifier: Apache-2.0
// What a warp contributes to Y = X W^T: some rows of W, some of its columns, a few tokens.
#pragma once

#include "qeft/warp/activations.cuh"
#include "qeft/warp/group_scales.cuh"

namespace qeft::warp {

/// Sums of RowTiles x 16 rows and TokenTiles x 8 tokens, spread over a warp as mma leaves them:
/// lane l = 4 g + t has rows g (of[.][.][0], [1]) and g + 8 ([2], [3]) of tokens 2 t and 2 t + 1.
template <int RowTiles, int TokenTiles>
struct sums {
  float of[RowTiles][TokenTiles][4] = {};

  __device__ sums& operator+=(const sums& x) {
    for (int r = 0; r < RowTiles; ++r) {
      for (int t = 0; t < TokenTiles; ++t) {
        for (int i = 0; i < 4; ++i) of[r][t][i] += x.of[r][t][i];
      }
    }
    return *this;
  }
  /// Stores all of them. @param to of the first token; the next one is `stride` further, its rows
  ///                            are contiguous
  __device__ void store(float* to, int stride) const {
    const int lane = static_cast<int>(threadIdx.x % 32U);
    to += lane % 4 * 2 * stride + lane / 4;
    for (int r = 0; r < RowTiles; ++r) {
      for (int t = 0; t < TokenTiles; ++t) {
        for (int i = 0; i < 4; ++i) {
          to[(8 * t + i % 2) * stride + 16 * r + i / 2 * 8] = of[r][t][i];
        }
      }
    }
  }
};

/// A warp's part of the product with a layer over layout::fragment.
/// @tparam View         quantized_matrix_view<Format, weak_tail<...>, layout::fragment,
///                      device_memory>
/// @tparam GroupColumns tuning::chunk_columns for groups of any multiple of it, and for one group;
///                      a quarter of it; dynamic for any other
template <class View, int RowTiles, int TokenTiles, index_t GroupColumns>
class part_product {
  using format = typename View::format_type;
  using scalar = typename View::scalar_type;
  using fragment = layout::fragment;
  static constexpr int bits = format::bits;
  using unpack = qeft::unpack<bits, scalar>;
  static constexpr int tile_columns = static_cast<int>(fragment::columns<bits>);
  static constexpr int tiles_per_chunk = tuning::chunk_columns / tile_columns;
  static constexpr int tiles_per_stage = tiles_per_chunk / 2;
  /// With many tokens there is more to do for a tile than it takes to come, and less room.
  static constexpr int most_tiles_ahead = TokenTiles <= 2 ? 8 : 4;
  static constexpr int tiles_ahead =
      tiles_per_chunk < most_tiles_ahead ? tiles_per_chunk : most_tiles_ahead;
  /// Tiles that are asked for together.
  static constexpr int tiles_together = tiles_per_stage < 4 ? tiles_per_stage : 4;
  static constexpr bool scaled = format::zero == zero_kind::scaled;
  /// A chunk has the four groups of a set.
  static constexpr bool set_is_chunk = 4 * GroupColumns == tuning::chunk_columns;

 public:
  using result = sums<RowTiles, TokenTiles>;

  /// @param row_tile the first of RowTiles tiles of 16 rows; those behind the last one repeat it
  __device__ part_product(const View& w, int row_tile)
      : w_(w),
        column_tiles_(ceil_quotient(w.dense_columns(), tile_columns)),
        weak_steps_(ceil_quotient(w.weak_columns(), fragment::step_columns)),
        group_sets_(ceil_quotient(w.groups, fragment::groups_together)) {
    const int last = ceil_quotient(w.out_channels, fragment::rows) - 1;
    for (int r = 0; r < RowTiles; ++r) {
      row_tile_[r] = row_tile + r < last ? row_tile + r : last;
    }
  }

  /// Adds the dense columns [first, last), group after group. @pre first is a multiple of
  /// tuning::chunk_columns, and so is last unless the columns end there; all lanes take part
  /// @param x activations of these columns: warp::activations, or what else stages them
  template <class Activations>
  __device__ void add_dense(int first, int last, Activations& x, result& sum) const {
    code_stream codes(*this, first, last);
    group_state group(*this, first);
    x.template start<0, true>(last - first);
    arch::commit_copies();
    for (int column = first; column < last; column += tuning::chunk_columns) {
      group.begin_chunk(column, last);
      unroll<2>([&](auto stage) {
        // While this stage is multiplied, the other one is filled.
        constexpr int other = 1 - stage;
        const int next = column + (stage + 1) * tuning::stage_columns;
        x.leave();
        if (stage == 0 || next < last) x.template start<other, true>(last - next);
        arch::commit_copies();
        x.template wait<1>();
        // Behind the last column activations are zeros, which add nothing; whole groups are left
        // out.
        unroll<tiles_per_stage>([&](auto i) {
          constexpr int tile = stage * tiles_per_stage + i;
          if constexpr (set_is_chunk) {
            constexpr int group_begin = tile * tile_columns / GroupColumns * GroupColumns;
            if (column + group_begin >= last) return;
          }
          unroll<unpack::steps / 2>([&](auto pair) {
            constexpr int at = tile * tile_columns + pair * 2 * fragment::step_columns;
            std::uint32_t b[TokenTiles][4];
            x.template operands<at>(b);
            group.template reached<at>();
            group.template multiply<2 * pair, at>(codes.tile(tile), b);
            group.template passed<at + 2 * fragment::step_columns>(sum);
          });
          if constexpr ((tile + 1) % tiles_together == 0) {
            codes.template load_next<tile + 1 - tiles_together>(column);
          }
        });
      });
      codes.next_chunk();
    }
    x.template wait<0>();
  }

  /// Adds the weak columns [first, last). @pre first is a multiple of 16; all lanes take part
  /// @param x activations of these columns
  template <class Activations>
  __device__ void add_weak(int first, int last, Activations& x, result& sum) const {
    const int lane = static_cast<int>(threadIdx.x % 32U);
    const std::uint32_t* words[RowTiles];
    for (int r = 0; r < RowTiles; ++r) {
      const index_t step = row_tile_[r] * weak_steps_ + first / fragment::step_columns;
      words[r] = reinterpret_cast<const std::uint32_t*>(w_.weak_values) +
                 step * (fragment::lanes * 4) + lane * 4;
    }
    for (int column = first; column < last; column += tuning::stage_columns) {
      x.leave();
      x.template start<0, false>(last - column);
      arch::commit_copies();
      x.template wait<0>();
      const int columns =
          last - column < tuning::stage_columns ? last - column : tuning::stage_columns;
      result stage_sum;
#pragma unroll 4
      for (int at = 0; at < columns; at += 2 * fragment::step_columns) {
        std::uint32_t a[2][RowTiles][4] = {};
        const bool both = at + fragment::step_columns < columns;
        for (int r = 0; r < RowTiles; ++r) {
          arch::load_once<4>(a[0][r], words[r]);
          if (both) arch::load_once<4, fragment::lanes * 4>(a[1][r], words[r]);
          words[r] += 2 * fragment::lanes * 4;
        }
        std::uint32_t b[TokenTiles][4];
        x.template operands<0>(b, at);
        unroll<2>([&](auto half) {
          for (int r = 0; r < RowTiles; ++r) {
            for (int t = 0; t < TokenTiles; ++t) {
              arch::mma_16x8x16<scalar>(stage_sum.of[r][t], a[half][r], b[t][2 * half],
                                        b[t][2 * half + 1]);
            }
          }
        });
      }
      sum += stage_sum;
    }
  }

 private:
  /// Codes on their way into registers, tiles_ahead tiles before they are needed.
  class code_stream {
    using words = typename unpack::lane_words[RowTiles];

   public:
    __device__ code_stream(const part_product& p, int first, int last) : last_(last) {
      const int lane = static_cast<int>(threadIdx.x % 32U);
      for (int r = 0; r < RowTiles; ++r) {
        const int tile_index = p.row_tile_[r] * p.column_tiles_ + first / tile_columns;
        const std::uint32_t* tile = p.w_.codes + tile_index * fragment::tile_words<bits>();
        low_[r] = tile + lane * 4;
        high_[r] = tile + fragment::lanes * 4 + lane * (unpack::words - 4);
      }
      load<0, tiles_ahead>(first);
    }
    /// The words of tile i of a chunk.
    __device__ const words& tile(int i) const { return ring_[i % tiles_ahead]; }
    /// Instead of tiles_together tiles from First on of the chunk at `column`, which are done,
    /// later ones.
    template <int First>
    __device__ void load_next(int column) {
      load<First + tiles_ahead, tiles_together>(column + (First + tiles_ahead) * tile_columns);
    }
    __device__ void next_chunk() {
      for (int r = 0; r < RowTiles; ++r) {
        low_[r] += tiles_per_chunk * fragment::tile_words<bits>();
        high_[r] += tiles_per_chunk * fragment::tile_words<bits>();
      }
    }

   private:
    /// Count tiles from the chunk's First on, at `column`, up to the last column.
    template <int First, int Count>
    __device__ void load(int column) {
      if (column + Count * tile_columns <= last_) {
        unroll<Count>([&](auto i) { load_tile<First + i>(); });
      } else {
        unroll<Count>([&](auto i) {
          if (column + i * tile_columns < last_) load_tile<First + i>();
        });
      }
    }
    template <int Tile>
    __device__ void load_tile() {
      constexpr int offset = Tile * static_cast<int>(fragment::tile_words<bits>());
      for (int r = 0; r < RowTiles; ++r) {
        std::uint32_t* const to = ring_[Tile % tiles_ahead][r];
        arch::load_once<4, offset>(to, low_[r]);
        if constexpr (unpack::words > 4) {
          arch::load_once<unpack::words - 4, offset>(to + 4, high_[r]);
        }
      }
    }

    int last_;
    const std::uint32_t* low_[RowTiles];   // of the first plane, the chunk's first tile
    const std::uint32_t* high_[RowTiles];  // of the second one
    words ring_[tiles_ahead] = {};
  };

  /// The group that is being summed up, without its scale.
  class group_state {
    static constexpr bool is_static = GroupColumns != dynamic;
    /// Whether it is known that a sum begins at column `at` of a chunk.
    static __device__ constexpr bool begins_sum(int at) {
      return is_static && at % (set_is_chunk ? GroupColumns : tuning::stage_columns) == 0;
    }

   public:
    __device__ group_state(const part_product& p, int first)
        : columns_(static_cast<int>(p.w_.columns_per_group)),
          sets_(p.group_sets_),
          first_(first),
          group_(set_is_chunk ? first / static_cast<int>(GroupColumns)
                              : static_cast<int>(quotient(first, columns_))),
          left_((group_ + 1) * columns_ - first) {
      for (int r = 0; r < RowTiles; ++r) {
        params_[r] = group_scales<format>(p.w_, p.row_tile_[r] * p.group_sets_ + group_ / 4);
      }
      if (!is_static) enter(group_ % 4);
    }

    /// Before the chunk at `column`.
    __device__ void begin_chunk(int column, int last) {
      if constexpr (set_is_chunk) {
        for (auto& p : params_) {
          if (column > first_) p.advance();
          if (column + tuning::chunk_columns < last) p.load_next();
        }
      } else if constexpr (is_static) {
        if (column > first_) load_set();
      }
    }
    /// Before the columns from At on of a chunk.
    template <int At>
    __device__ void reached() {
      if constexpr (begins_sum(At)) enter(set_is_chunk ? At / GroupColumns : group_ % 4);
    }
    /// Adds k-steps Step and Step + 1 of a tile, which are at column At of the chunk.
    template <int Step, int At>
    __device__ void multiply(const typename unpack::lane_words (&words)[RowTiles],
                             const std::uint32_t (&b)[TokenTiles][4]) {
      unroll<2>([&](auto half) {
        constexpr bool first = half == 0 && begins_sum(At);
        for (int r = 0; r < RowTiles; ++r) {
          std::uint32_t a[4];
          unpack::template step<Step + half>(words[r], offsets_[r], a);
          for (int t = 0; t < TokenTiles; ++t) {
            accumulate<first>(codes_.of[r][t], a, b[t][2 * half], b[t][2 * half + 1]);
          }
        }
        if constexpr (scaled) {
          constexpr std::uint32_t one = pair_of<scalar>::power(0);
          const std::uint32_t ones[4] = {one, one, one, one};
          for (int t = 0; t < TokenTiles; ++t) {
            accumulate<first>(inputs_.of[0][t], ones, b[t][2 * half], b[t][2 * half + 1]);
          }
        }
      });
    }
    /// Behind the columns up to At of a chunk. Tensor cores round sums over many products in one
    /// direction, so none goes on for more than a stage.
    template <int At>
    __device__ void passed(result& sum) {
      constexpr bool ends_stage = At % tuning::stage_columns == 0;
      if constexpr (set_is_chunk) {
        if (At % GroupColumns == 0) leave(At / GroupColumns - 1, sum);
      } else if constexpr (is_static) {
        if (!ends_stage) return;
        leave(group_ % 4, sum);
        left_ -= tuning::stage_columns;
        if (left_ <= 0) next_group();
      } else {
        left_ -= 32;
        if (left_ > 0 && !ends_stage) return;
        leave(group_ % 4, sum);
        if (left_ > 0) return restart();
        next_group();
        load_set();
        enter(group_ % 4);
      }
    }

   private:
    __device__ void next_group() {
      ++group_;
      left_ = columns_;
    }
    /// When the group is the first one of another set.
    __device__ void load_set() {
      if (group_ % 4 != 0 || left_ != columns_ || group_ >= 4 * sets_) return;
      for (auto& p : params_) {
        p.load_next();
        p.advance();
      }
    }
    /// @param group in its set
    __device__ void enter(int group) {
      for (int r = 0; r < RowTiles; ++r) offsets_[r] = params_[r].offsets(group);
      if (!is_static) restart();  // else the first product does not add to anything
    }
    __device__ void restart() {
      codes_ = {};
      if constexpr (scaled) inputs_ = {};
    }
    template <bool First>
    static __device__ void accumulate(float (&sum)[4], const std::uint32_t (&a)[4],
                                      std::uint32_t b0, std::uint32_t b1) {
      if constexpr (First) {
        constexpr float zero[4] = {};
        arch::mma_16x8x16<scalar>(sum, a, b0, b1, zero);
      } else {
        arch::mma_16x8x16<scalar>(sum, a, b0, b1);
      }
    }
    __device__ void leave(int group, result& sum) const {
      for (int r = 0; r < RowTiles; ++r) {
        const auto s = params_[r].scale(group);
        for (int t = 0; t < TokenTiles; ++t) {
          add(sum.of[r][t], s.low, s.high, codes_.of[r][t]);
        }
        if constexpr (scaled) {
          const auto z = params_[r].rest(group);
          for (int t = 0; t < TokenTiles; ++t) {
            add(sum.of[r][t], z.low, z.high, inputs_.of[0][t]);
          }
        }
      }
    }
    static __device__ void add(float (&sum)[4], float low, float high, const float (&x)[4]) {
      sum[0] = fmaf(low, x[0], sum[0]);
      sum[1] = fmaf(low, x[1], sum[1]);
      sum[2] = fmaf(high, x[2], sum[2]);
      sum[3] = fmaf(high, x[3], sum[3]);
    }

    int columns_;
    int sets_;
    int first_;
    int group_;
    int left_;  // columns that the group still has
    group_scales<format> params_[RowTiles];
    typename unpack::offsets offsets_[RowTiles];
    sums<RowTiles, TokenTiles> codes_;  // of (q - z) x
    sums<1, TokenTiles> inputs_;        // of x, for what scaled zero points leave
  };

  /// ceil(a / b) in 32 bits.
  static __device__ constexpr int ceil_quotient(index_t a, index_t b) {
    return static_cast<int>(quotient(a + b - 1, b));
  }

  const View& w_;
  int column_tiles_;
  int weak_steps_;
  int group_sets_;
  int row_tile_[RowTiles];
};

}  // namespace qeft::warp
