// SPDX-License-Identifier: Apache-2.0
// What a warp contributes to Y = X W^T: some rows of W, some of its columns, a few tokens.
#pragma once

#include "qeft/tuning/few_tokens.hpp"
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
    const int lane = arch::lane();
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
  /// With many tokens there is more to do for a tile than it takes to come, and less room.
  static constexpr int most_tiles_ahead = TokenTiles <= 2 ? 8 : 4;
  static constexpr int tiles_ahead =
      tiles_per_chunk < most_tiles_ahead ? tiles_per_chunk : most_tiles_ahead;
  /// Whether codes are asked for one more chunk ahead.
  static constexpr bool prefetches = tuning::prefetch_codes && TokenTiles <= 2;
  /// Tiles that are asked for together.
  static constexpr int tiles_together = TokenTiles > 2        ? 1
                                        : tiles_per_chunk < 8 ? tiles_per_chunk / 2
                                                              : 4;
  /// Weak columns that are multiplied together, and how many of these are loaded ahead.
  static constexpr int weak_columns = 2 * fragment::step_columns;
  static constexpr int weak_ahead = most_tiles_ahead / 2;
  static constexpr int weak_step = weak_ahead * weak_columns;
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

  /// Sums up parts [part, end) of the columns: done(sum) is called with each of them, in order.
  /// All lanes take part.
  /// @param dense_x of the first dense column  @param weak_x of the first weak column
  /// @param x_of    makes of a pointer to the first of some columns what add_dense and add_weak
  ///                take
  template <class XOf, class Done>
  __device__ void for_each_part(const tuning::parts& parts, int part, int end,
                                const scalar* dense_x, const scalar* weak_x, const XOf& x_of,
                                const Done& done) const {
    if (part < parts.dense) {
      const int last_part = min(end, parts.dense);
      const int first = part * parts.dense_columns;
      const int last =
          arch::kept(min(last_part * parts.dense_columns, static_cast<int>(w_.dense_columns())));
      int part_end = min(first + parts.dense_columns, last);
      result sum;
      auto&& x = x_of(dense_x + first);
      add_dense(first, last, x, sum, [&](int column) {
        if (column < part_end) return;
        done(sum);
        sum = {};
        part_end = min(part_end + parts.dense_columns, last);
      });
      part = last_part;
    }
#pragma unroll 1
    for (; part < end; ++part) {
      const int first = (part - parts.dense) * parts.weak_columns;
      const int last = min(first + parts.weak_columns, static_cast<int>(w_.weak_columns()));
      result sum;
      auto&& x = x_of(weak_x + first);
      add_weak(first, last, x, sum);
      done(sum);
    }
  }

  /// Adds the dense columns [first, last), group after group. All lanes take part.
  /// @pre first < last; first is a multiple of tuning::chunk_columns, and so is last unless the
  ///      columns end there
  /// @param x    activations of these columns: warp::activations, or what else stages them
  /// @param sum  may be taken away in between: `done`(column) is called whenever it has all columns
  ///             up to `column`, a multiple of tuning::chunk_columns or behind the last one
  template <class Activations, class Done>
  __device__ void add_dense(int first, int last, Activations& x, result& sum,
                            const Done& done) const {
    constexpr int columns = Activations::columns;
    constexpr int tiles = columns / tile_columns;
    code_stream codes(*this, first);
    codes.template load<0, tiles_ahead>(last - first);
    x.template begin<(columns < tuning::chunk_columns)>(last - first);
    group_state group(*this, first);
    int column = first;
    do {
      const int left = last - column;
      if constexpr (prefetches) codes.prefetch_next(left);
      group.begin_chunk(left);
      unroll<tuning::chunk_columns / columns>([&](auto stage) {
        constexpr int begin = stage * columns;
        // Behind the last column activations are zeros, which add nothing; whole groups are left
        // out.
        constexpr int read = set_is_chunk ? static_cast<int>(GroupColumns) : tuning::chunk_columns;
        constexpr bool goes_on = begin + columns < tuning::chunk_columns;
        x.template enter<begin, read, goes_on>(left - begin);
        unroll<tiles>([&](auto i) {
          constexpr int tile = begin / tile_columns + i;
          if constexpr (i == tiles / 2) x.template halfway<goes_on>(left - begin);
          if constexpr (set_is_chunk) {
            constexpr int group_begin = tile * tile_columns / GroupColumns * GroupColumns;
            if (group_begin > 0 && left <= group_begin) return;
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
            codes.template load_next<tile + 1 - tiles_together>(left);
          }
        });
        x.leave();
      });
      codes.next_chunk();
      column += tuning::chunk_columns;
      done(column);
    } while (column < last);
  }

  /// Adds the weak columns [first, last). @pre first is a multiple of 16; all lanes take part
  /// @param x activations of these columns
  template <class Activations>
  __device__ void add_weak(int first, int last, Activations& x, result& sum) const {
    constexpr int columns = Activations::columns;
    weak_stream values(*this, first);
    values.template load<0, weak_ahead>(last - first);
    x.template begin<false>(last - first);
    result stage_sum;
    for (int left = last - first; left > 0; left -= 2 * columns) {
      unroll<2>([&](auto stage) {
        constexpr int begin = stage * columns;
        if (stage == 1 && left <= begin) return;
        x.template enter<begin, weak_columns, false>(left - begin);
#pragma unroll 1
        for (int at = 0; at < columns && at < left - begin; at += weak_step) {
          if (at == columns / 2) x.template halfway<false>(left - begin);
          const int left_here = left - begin - at;
          unroll<weak_ahead>([&](auto i) {
            if (i > 0 && left_here <= i * weak_columns) return;
            std::uint32_t b[TokenTiles][4];
            x.template operands<begin + i * weak_columns>(b, at);
            values.template multiply<i>(b, stage_sum);
            values.template load<i + weak_ahead, 1>(left_here);
          });
          values.advance();
          if ((begin + at + weak_step) % tuning::stage_columns == 0) {
            sum += stage_sum;
            stage_sum = {};
          }
        }
        x.leave();
      });
    }
    sum += stage_sum;
  }

 private:
  /// Codes on their way into registers, tiles_ahead tiles before they are needed.
  class code_stream {
    using words = typename unpack::lane_words[RowTiles];

   public:
    __device__ code_stream(const part_product& p, int first) {
      const int lane = arch::lane();
      for (int r = 0; r < RowTiles; ++r) {
        const int tile =
            p.row_tile_[r] * p.column_tiles_ + static_cast<int>(quotient(first, tile_columns));
        const index_t at = tile * fragment::tile_words<bits>();
        low_[r] = p.w_.codes + lane * 4 + at;
        high_[r] = p.w_.codes + fragment::lanes * 4 + lane * (unpack::words - 4) + at;
      }
      if constexpr (prefetches) {
        prefetch_word_ = arch::kept(chunk_words + lane * (line_words - 4));
        prefetch_column_ = arch::kept(tuning::chunk_columns + lane * (2 * line_words) / bits);
      }
    }
    /// The words of tile i of a chunk.
    __device__ const words& tile(int i) const { return ring_[i % tiles_ahead]; }
    /// Loads Count tiles from the chunk's First on. @param left columns from the chunk on
    template <int First, int Count>
    __device__ void load(int left) {
      if (left >= (First + Count) * tile_columns) {
        unroll<Count>([&](auto i) { load_tile<First + i>(); });
      } else if (left > First * tile_columns) {
        unroll<Count>([&](auto i) {
          if (left > (First + i) * tile_columns) load_tile<First + i>();
        });
      }
    }
    /// Instead of tiles_together tiles from First on, which are done, later ones.
    template <int First>
    __device__ void load_next(int left) {
      load<First + tiles_ahead, tiles_together>(left);
    }
    /// Asks for the codes of the next chunk to come to the second-level cache.
    /// @param left columns from this chunk on
    __device__ void prefetch_next(int left) const {
      unroll<(chunk_words + 32 * line_words - 1) / (32 * line_words)>([&](auto i) {
        if (left <= prefetch_column_ + i * 32 * (2 * line_words) / bits) return;
        for (int r = 0; r < RowTiles; ++r) {
          arch::prefetch(low_[r] + (prefetch_word_ + i * 32 * line_words));
        }
      });
    }
    __device__ void next_chunk() {
      for (int r = 0; r < RowTiles; ++r) {
        low_[r] += chunk_words;
        high_[r] += chunk_words;
      }
    }

   private:
    static constexpr int chunk_words =
        tiles_per_chunk * static_cast<int>(fragment::tile_words<bits>());
    /// Of what is asked for together: a word is 2 / bits columns of 16 rows.
    static constexpr int line_words = 128 / 4;
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

    const std::uint32_t* low_[RowTiles];   // of the first plane, the chunk's first tile
    const std::uint32_t* high_[RowTiles];  // of the second one
    int prefetch_word_;                    // from there to what a lane asks for
    int prefetch_column_;                  // at which that is, in the chunk
    words ring_[tiles_ahead];  // behind the last column anything: zeros are multiplied with it
  };

  /// Weak columns on their way into registers, weak_ahead times weak_columns of them before they
  /// are needed.
  class weak_stream {
   public:
    __device__ weak_stream(const part_product& p, int first) {
      const int lane = arch::lane();
      for (int r = 0; r < RowTiles; ++r) {
        const int step = p.row_tile_[r] * p.weak_steps_ +
                         static_cast<int>(quotient(first, fragment::step_columns));
        from_[r] =
            reinterpret_cast<const std::uint32_t*>(p.w_.weak_values) + lane * 4 + step * step_words;
      }
    }
    /// Adds the Which-th weak_columns from where the stream is.
    template <int Which>
    __device__ void multiply(const std::uint32_t (&b)[TokenTiles][4], result& sum) const {
      unroll<2>([&](auto half) {
        for (int r = 0; r < RowTiles; ++r) {
          for (int t = 0; t < TokenTiles; ++t) {
            arch::mma_16x8x16<scalar>(sum.of[r][t], ring_[Which % weak_ahead][r][half],
                                      b[t][2 * half], b[t][2 * half + 1]);
          }
        }
      });
    }
    /// Loads Count times weak_columns, from the Which-th on from where the stream is, which has
    /// `left` columns; behind them zeros.
    template <int Which, int Count>
    __device__ void load(int left) {
      if (left >= (Which + Count) * weak_columns) {
        unroll<2 * Count>([&](auto step) { load_step<2 * Which + step>(); });
      } else if (left > Which * weak_columns) {
        unroll<2 * Count>([&](auto step) {
          if (left > (2 * Which + step) * fragment::step_columns) {
            load_step<2 * Which + step>();
          } else {
            for (auto& of_row : ring_[(2 * Which + step) / 2 % weak_ahead]) {
              for (auto& word : of_row[step % 2]) word = 0;
            }
          }
        });
      }
    }
    /// Goes on by weak_ahead times weak_columns.
    __device__ void advance() {
      for (auto& from : from_) from += 2 * weak_ahead * step_words;
    }

   private:
    static constexpr index_t step_words = fragment::lanes * 4;
    template <int Step>
    __device__ void load_step() {
      for (int r = 0; r < RowTiles; ++r) {
        arch::load_once<4, Step* static_cast<int>(step_words)>(
            ring_[Step / 2 % weak_ahead][r][Step % 2], from_[r]);
      }
    }

    const std::uint32_t* from_[RowTiles];
    std::uint32_t ring_[weak_ahead][RowTiles][2][4];
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
          group_(static_cast<int>(quotient(first, set_is_chunk ? GroupColumns : columns_))),
          left_((group_ + 1) * columns_ - first) {
      for (int r = 0; r < RowTiles; ++r) {
        params_[r] = group_scales<format>::ahead(
            p.w_, p.row_tile_[r] * p.group_sets_ +
                      static_cast<int>(quotient(group_, fragment::groups_together)));
      }
      if constexpr (!set_is_chunk) next_set();
      if constexpr (!is_static) enter(group_ % 4);
    }

    /// Before a chunk. @param left columns from there on
    __device__ void begin_chunk(int left) {
      if constexpr (set_is_chunk) {
        for (auto& p : params_) p.advance();
        if (left <= tuning::chunk_columns) return;
        for (auto& p : params_) p.load_next();
      }
    }
    /// Before the columns from At on of a chunk.
    template <int At>
    __device__ void reached() {
      if constexpr (set_is_chunk) {
        if constexpr (begins_sum(At)) enter(constant<At / GroupColumns>{});
      } else if constexpr (begins_sum(At)) {
        enter(group_ % 4);
      }
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
        if constexpr (At % GroupColumns == 0) leave(constant<At / GroupColumns - 1>{}, sum);
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
        enter(group_ % 4);
      }
    }

   private:
    __device__ void next_group() {
      ++group_;
      left_ = columns_;
      if (group_ % 4 == 0 && group_ < 4 * sets_) next_set();
    }
    /// Takes the set of group_, and asks for the one behind it.
    __device__ void next_set() {
      for (auto& p : params_) p.advance();
      if (group_ / 4 + 1 >= sets_) return;
      for (auto& p : params_) p.load_next();
    }
    /// @param group in its set
    template <class Group>
    __device__ void enter(Group group) {
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
        arch::first_mma_16x8x16<scalar>(sum, a, b0, b1);
      } else {
        arch::mma_16x8x16<scalar>(sum, a, b0, b1);
      }
    }
    template <class Group>
    __device__ void leave(Group group, result& sum) const {
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
    int group_;
    int left_;  // columns that the group still has
    group_scales<format> params_[RowTiles];
    typename unpack::offsets offsets_[RowTiles];
    sums<RowTiles, TokenTiles> codes_;  // of (q - z) x
    sums<1, TokenTiles> inputs_;        // of x, for what scaled zero points leave
  };

  const View& w_;
  int column_tiles_;
  int weak_steps_;
  int group_sets_;
  int row_tile_[RowTiles];
};

}  // namespace qeft::warp
