// SPDX-License-Identifier: Apache-2.0
// What a warp contributes to dX = dY W: some columns of W, row after row, a few tokens.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/arch/mma.cuh"
#include "qeft/core/unroll.hpp"
#include "qeft/thread/split_product.hpp"
#include "qeft/tuning/backward.hpp"
#include "qeft/warp/group_scales.cuh"

namespace qeft::warp {

/// Tiles of 8 tokens that go with `Steps` k-steps of columns.
template <int Steps>
inline constexpr int tokens_beside = tuning::gradient_tiles / Steps;

/// Sums of Steps x 16 columns and tokens_beside<Steps> x 8 tokens, spread over a warp as mma leaves
/// them: lane l = 4 g + t has columns g (of[.][.][0], [1]) and g + 8 ([2], [3]) of tokens 2 t and
/// 2 t + 1.
template <int Steps>
struct column_sums {
  float of[Steps][tokens_beside<Steps>][4] = {};
};
/// B operands: 16 rows of dY and tokens_beside<Steps> x 8 tokens.
template <int Steps>
using gradient_operands = std::uint32_t[tokens_beside<Steps>][2];

/// A group's parameters of 16 rows after 16 rows: scales as rows are contracted, zero points as
/// codes are unpacked.
template <class Format>
class row_scales {
  using fragment = layout::fragment;
  using unpack = qeft::unpack<Format::bits, typename Format::scalar_type>;
  using params = group_scales<Format>;
  using zero_pair = typename params::zero_pair;
  static constexpr bool scaled = Format::zero == zero_kind::scaled;
  static constexpr bool has_zeros = Format::zero != zero_kind::symmetric;

 public:
  row_scales() = default;
  /// @param row_tile the first 16 rows
  template <class View>
  __device__ row_scales(const View& w, int group, int row_tile)
      : step_(static_cast<int>(fragment::group_sets(w.extent())) * fragment::lanes) {
    const int lane = arch::lane();
    const index_t first = index_t{row_tile} * step_ + group / 4 * fragment::lanes + group % 4;
    contracted_ = reinterpret_cast<const std::uint32_t*>(w.scales) + first + lane % 4 * 8;
    own_ = lane / 4 * 4 - lane % 4 * 8;
    if constexpr (has_zeros) {
      zeros_ = reinterpret_cast<const zero_pair*>(w.zeros) + first + lane / 4 * 4;
    }
  }

  /// What a lane loads of 16 rows.
  struct words {
    std::uint32_t even;  // scales of rows 2 t and 2 t + 8, t = lane % 4
    std::uint32_t odd;   // of rows 2 t + 1 and 2 t + 9
    std::uint32_t own;   // of rows r and r + 8, r = lane / 4
    std::uint32_t zero;  // their zero points
  };
  /// @param there whether there are rows
  __device__ void load_next(words& w, bool there) {
    if (there) {
      w.even = __ldg(contracted_);
      w.odd = __ldg(contracted_ + 4);
      if constexpr (scaled) w.own = __ldg(contracted_ + own_);
      if constexpr (has_zeros) w.zero = __ldg(zeros_);
    }
    contracted_ += step_;
    if constexpr (has_zeros) zeros_ += step_;
  }

  /// Scales beside the registers of a B operand.
  static __device__ void beside_operand(const words& w, std::uint32_t (&s)[2]) {
    s[0] = __byte_perm(w.even, w.odd, 0x5410);
    s[1] = __byte_perm(w.even, w.odd, 0x7632);
  }
  static __device__ typename unpack::offsets offsets(const words& w) {
    if constexpr (scaled) {
      const auto zero = params::parts_of(params::floats(w.own), params::floats(w.zero));
      return unpack::make_offsets(zero.low, zero.high);
    } else if constexpr (has_zeros) {
      constexpr unsigned width = fragment::zero_width<Format::bits>;
      return unpack::make_offsets(w.zero & ((1U << width) - 1U), w.zero >> width);
    } else {
      return unpack::make_offsets(Format::mid_code, Format::mid_code);
    }
  }

 private:
  const std::uint32_t* contracted_ = nullptr;
  const zero_pair* zeros_ = nullptr;
  int own_ = 0;   // from there to the scales of rows r and r + 8
  int step_ = 0;  // from 16 rows to the next
};

/// Some dense columns: 64, or a tile of them where that is less. dY takes up the scales: their
/// product is exact in two parts, and tensor cores multiply both with q - z, so that all products
/// that they add are exact.
/// @tparam View     quantized_matrix_view<Format, weak_tail<...>, layout::fragment, device_memory>
/// @tparam OneGroup whether all these columns belong to the same group
template <class View, bool OneGroup>
class dense_columns {
  using format = typename View::format_type;
  using scalar = typename View::scalar_type;
  using fragment = layout::fragment;
  using unpack = qeft::unpack<format::bits, scalar>;

 public:
  static constexpr int steps = unpack::steps < 4 ? unpack::steps : 4;
  static constexpr int columns = 16 * steps;
  /// Tiles of rows whose words are on their way.
  static constexpr int tiles_ahead = 4;

  /// @param first         the first column, a multiple of `columns`
  /// @param row_tile      the first 16 rows
  /// @param group_factors what scales are multiplied with, if needs_factors<scalar>
  __device__ dense_columns(const View& w, int first, int row_tile, const float* group_factors)
      : tiles_left_(static_cast<int>(fragment::row_tiles(w.extent())) - row_tile) {
    const int lane = arch::lane();
    const index_t tiles = fragment::column_tiles<format::bits>(w.extent());
    step_ = static_cast<int>(tiles * fragment::tile_words<format::bits>());
    const int part = first / columns % parts;
    const std::uint32_t* const tile = w.codes + (row_tile * tiles + first / columns / parts) *
                                                    fragment::tile_words<format::bits>();
    low_ = tile + lane * 4 + part * low_words;
    high_ = tile + fragment::lanes * 4 + lane * (unpack::words - 4) + part * high_words;
    const int last = static_cast<int>(w.groups) - 1;
    for (int s = 0; s < spans; ++s) {
      const int of_span = static_cast<int>(quotient(first + s * 32, w.columns_per_group));
      const int group = of_span < last ? of_span : last;
      scales_[s] = row_scales<format>(w, group, row_tile);
      if constexpr (needs_factors<scalar>) {
        factors_[s] = from_float<scalar>(group_factors[group]).bits * 0x00010001U;
      }
    }
    unroll<tiles_ahead>([&](auto i) { load_codes<i>(i < tiles_left_); });
    unroll<params_ahead>([&](auto i) { load_params<i>(i < tiles_left_); });
  }

  /// Adds the next 16 rows, tile number Slot modulo tiles_ahead.
  template <int Slot>
  __device__ void add(const gradient_operands<steps>& dy, column_sums<steps>& sum) {
    constexpr int span_steps = steps / spans;
    unroll<spans>([&](auto span) {
      const auto& params = params_[Slot % params_ahead][span];
      const auto offsets = row_scales<format>::offsets(params);
      std::uint32_t scale[2];
      row_scales<format>::beside_operand(params, scale);
      if constexpr (needs_factors<scalar>) {
        for (auto& s : scale) s = split_product<scalar>(s, factors_[span]).high;
      }
      std::uint32_t high[token_tiles][2];
      std::uint32_t low[token_tiles][2];
      for (int t = 0; t < token_tiles; ++t) {
        for (int r = 0; r < 2; ++r) {
          const split_pair p = split_product<scalar>(dy[t][r], scale[r]);
          high[t][r] = p.high;
          low[t][r] = p.low;
        }
      }
      unroll<span_steps>([&](auto i) {
        constexpr int step = span * span_steps + i;
        std::uint32_t a[4];
        std::uint32_t transposed[4];
        unpack::template step<step>(words_[Slot], offsets, a);
        arch::transpose_operand(transposed, a);
        for (int t = 0; t < token_tiles; ++t) {
          arch::mma_16x8x16<scalar>(sum.of[step][t], transposed, high[t][0], high[t][1]);
        }
        for (int t = 0; t < token_tiles; ++t) {
          arch::mma_16x8x16<scalar>(sum.of[step][t], transposed, low[t][0], low[t][1]);
        }
      });
    });
    load_codes<Slot>(tiles_ahead < tiles_left_);
    load_params<Slot % params_ahead>(params_ahead < tiles_left_);
    --tiles_left_;
  }

 private:
  static constexpr int token_tiles = tokens_beside<steps>;
  /// Runs of columns with parameters of their own, and tiles whose parameters are on their way.
  static constexpr int spans = OneGroup ? 1 : steps / 2;
  static constexpr int params_ahead = 2 / spans;

  /// A tile has one part or two, whose words lie alike, those of the second behind those of the
  /// first.
  static constexpr int parts = unpack::steps / steps;
  static constexpr int low_words = 4 / parts;
  static constexpr int high_words = (unpack::words - 4) / parts;
  static constexpr bool parts_are_alike() {
    for (int reg = 0; reg < 4 && parts > 1; ++reg) {
      for (int p = 0; p < bit_planes<format::bits>::count; ++p) {
        const auto of_first = fragment::locate_register<format::bits>(p, steps - 1, reg);
        const auto of_second = fragment::locate_register<format::bits>(p, 2 * steps - 1, reg);
        if (of_second.word != of_first.word + (p == 0 ? low_words : high_words) ||
            of_second.shift != of_first.shift) {
          return false;
        }
      }
    }
    return true;
  }
  static_assert(parts_are_alike());

  /// Of the next 16 rows. @param there whether they are
  template <int Slot>
  __device__ void load_codes(bool there) {
    if (there) {
      arch::load<low_words>(words_[Slot], low_);
      if constexpr (high_words > 0) arch::load<high_words>(words_[Slot] + 4, high_);
    }
    low_ += step_;
    if constexpr (high_words > 0) high_ += step_;
  }
  template <int Slot>
  __device__ void load_params(bool there) {
    for (int s = 0; s < spans; ++s) scales_[s].load_next(params_[Slot][s], there);
  }

  int tiles_left_;             // of rows, that are not added yet
  int step_;                   // words from one to the next
  const std::uint32_t* low_;   // of the first plane, the next tile
  const std::uint32_t* high_;  // of the second one
  row_scales<format> scales_[spans];
  std::uint32_t factors_[spans];
  typename unpack::lane_words words_[tiles_ahead] = {};
  typename row_scales<format>::words params_[params_ahead][spans] = {};
};

/// Steps x 16 weak columns.
template <class View, int Steps>
class weak_columns {
  using scalar = typename View::scalar_type;
  using fragment = layout::fragment;

 public:
  static constexpr int steps = Steps;
  static constexpr int columns = 16 * steps;
  static constexpr int tiles_ahead = 2;

  /// @param first    the first column, a multiple of `columns`
  /// @param row_tile the first 16 rows
  __device__ weak_columns(const View& w, int first, int row_tile)
      : tiles_left_(static_cast<int>(fragment::row_tiles(w.extent())) - row_tile) {
    const int weak_steps = static_cast<int>(fragment::weak_steps(w.extent()));
    steps_ = weak_steps - first / 16;
    step_ = index_t{weak_steps} * step_words;
    values_ = reinterpret_cast<const std::uint32_t*>(w.weak_values) + row_tile * step_ +
              first / 16 * step_words + arch::lane() * 4;
    unroll<tiles_ahead>([&](auto i) { load<i>(i < tiles_left_); });
  }

  /// Adds the next 16 rows, tile number Slot modulo tiles_ahead.
  template <int Slot>
  __device__ void add(const gradient_operands<steps>& dy, column_sums<steps>& sum) {
    unroll<steps>([&](auto step) {
      std::uint32_t transposed[4];
      arch::transpose_operand(transposed, values_of_[Slot][step]);
      for (int t = 0; t < tokens_beside<steps>; ++t) {
        arch::mma_16x8x16<scalar>(sum.of[step][t], transposed, dy[t][0], dy[t][1]);
      }
    });
    load<Slot>(tiles_ahead < tiles_left_);
    --tiles_left_;
  }

 private:
  static constexpr int step_words = fragment::lanes * 4;

  template <int Slot>
  __device__ void load(bool there) {
    unroll<steps>([&](auto step) {
      if (!there || step >= steps_) return;
      arch::load<4>(values_of_[Slot][step], values_ + step * step_words);
    });
    values_ += step_;
  }

  int tiles_left_;  // of rows, that are not added yet
  int steps_;       // k-steps that there are from the tile on
  index_t step_;    // words from one tile of rows to the next
  const std::uint32_t* values_;
  std::uint32_t values_of_[tiles_ahead][steps][4] = {};
};

/// Adds the next `rows` rows of some columns. What lies behind the last row is multiplied too:
/// gradients must be zero there.
/// @pre rows, and all that were added before, are multiples of tuning::round_rows; at most
///      tuning::chain_rows
/// @param operands operands(b, row): the B operands of 16 rows
template <class Columns, class Operands>
__device__ void add_rows(Columns& columns, const Operands& operands, int rows,
                         column_sums<Columns::steps>& sum) {
  constexpr int tiles = Columns::tiles_ahead;
  static_assert(tuning::round_rows % (16 * tiles) == 0);
  column_sums<Columns::steps> part;
#pragma unroll 1
  for (int row = 0; row < rows; row += 16 * tiles) {
    unroll<tiles>([&](auto i) {
      gradient_operands<Columns::steps> b;
      operands(b, row + 16 * i);
      columns.template add<i>(b, part);
    });
  }
  for (int s = 0; s < Columns::steps; ++s) {
    for (int t = 0; t < tokens_beside<Columns::steps>; ++t) {
      for (int i = 0; i < 4; ++i) sum.of[s][t][i] += part.of[s][t][i];
    }
  }
}

}  // namespace qeft::warp
