// SPDX-License-Identifier: Apache-2.0
// A piece of W as numbers, in shared memory.
#pragma once

#include "qeft/arch/copy.cuh"
#include "qeft/arch/index.cuh"
#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/core/unroll.hpp"
#include "qeft/layout/fragment.hpp"
#include "qeft/thread/dequantize.hpp"

namespace qeft::block {

/// Where the first column of a row of a tile lies in shared memory: (first + r * per_row) modulo
/// the elements of 16 bytes. So a row can be aligned as its destination in memory is.
struct row_shifts {
  int first = 0;
  int per_row = 0;
};

/// 16 rows and up to Columns consecutive input columns of W, weak ones included, in the layer's own
/// order, rounded to Y. For a block of any number of whole warps.
/// @tparam View a quantized_matrix_view over layout::fragment in device memory
/// @tparam Y    float, half_bits or bf16_bits
template <class View, class Y, int Columns>
class weight_tile {
  using format = typename View::format_type;
  using fragment = layout::fragment;
  using dequantizer = lane_dequantizer<format>;
  using unpack = qeft::unpack<format::bits, typename View::scalar_type>;
  static constexpr int tile_columns = static_cast<int>(fragment::columns<format::bits>);
  /// Whether dense and weak columns, one after another, are the input columns.
  static constexpr bool in_order =
      View::weak_type::kind == weak_kind::none || View::weak_type::kind == weak_kind::tail;

 public:
  static constexpr int rows = 16;
  /// Elements of 16 bytes.
  static constexpr int together = 16 / static_cast<int>(sizeof(Y));
  /// A row, shifted, and so much more that the rows which lanes write together lie in other banks.
  static constexpr int pitch = Columns + 8;

  struct shared_storage {
    alignas(16) Y weights[rows][pitch];
    /// Columns of the tile, first those with codes, then the weak ones, if that is another order.
    std::int16_t place[in_order ? 1 : Columns];
  };

  /// @param row_tile     the tile's first row is 16 * row_tile; rows behind the last one are 0
  /// @param first_column in [0, IC)
  __device__ weight_tile(const View& w, index_t row_tile, index_t first_column, row_shifts shifts,
                         shared_storage& shared)
      : w_(w),
        row_tile_(row_tile),
        first_column_(first_column),
        columns_(static_cast<int>(min(index_t{Columns}, w.in_channels - first_column))),
        first_dense_(static_cast<int>(dense_before(first_column))),
        dense_(static_cast<int>(dense_before(first_column + columns_)) - first_dense_),
        shifts_(shifts),
        shared_(shared) {
    const int row = arch::lane() / 4;
    row_[0] = shared.weights[row] + shift(row);
    row_[1] = shared.weights[row + 8] + shift(row + 8);
  }

  /// Columns of the tile.
  __device__ int columns() const { return columns_; }
  /// Where column 0 of row r lies.
  __device__ int shift(int r) const { return (shifts_.first + r * shifts_.per_row) % together; }

  /// Dequantises: then weights[r][shift(r) + c] holds row r and column c. All threads of the block
  /// take part, and all may read the tile when it returns.
  __device__ void fill() {
    if constexpr (!in_order) {
      find_places();
      __syncthreads();
    }
    const int warp = arch::warp();
    const int warps = static_cast<int>(blockDim.x / 32U);
    const int end = first_dense_ + dense_;
    for (int i = first_dense_ / tile_columns + warp; i * tile_columns < end; i += warps) {
      add_dense(i);
    }
    const int weak_end = first_weak() + columns_ - dense_;
    constexpr int step = fragment::step_columns;
    for (int j = first_weak() / step + warp; j * step < weak_end; j += warps) add_weak(j);
    __syncthreads();
  }

 private:
  /// Columns with codes in front of a column.
  __device__ index_t dense_before(index_t column) const {
    if (column == w_.in_channels) return w_.dense_columns();
    const column_location at = w_.weak.locate(column, w_.in_channels);
    return at.is_weak ? column - at.index : at.index;
  }
  __device__ void find_places() {
    for (int c = static_cast<int>(threadIdx.x); c < columns_; c += static_cast<int>(blockDim.x)) {
      const column_location at = w_.weak.locate(first_column_ + c, w_.in_channels);
      const index_t first = at.is_weak ? first_weak() - dense_ : first_dense_;
      shared_.place[at.index - first] = static_cast<std::int16_t>(c);
    }
  }
  /// The first weak column of the tile.
  __device__ int first_weak() const { return static_cast<int>(first_column_) - first_dense_; }

  /// A tile of codes. For one warp.
  __device__ void add_dense(int column_tile) {
    const int lane = arch::lane();
    const std::uint32_t* const codes =
        w_.codes + fragment::tile_word<format::bits>(w_.extent(), 0, row_tile_, column_tile);
    typename unpack::lane_words words;
    arch::load_once<4>(words, codes + lane * 4);
    if constexpr (unpack::words > 4) {
      arch::load_once<unpack::words - 4>(words + 4,
                                         codes + fragment::lanes * 4 + lane * (unpack::words - 4));
    }
    const int first = column_tile * tile_columns;
    const bool pairs = in_pairs(first - first_dense_, tile_columns, 0, dense_);
    unroll<unpack::steps / 2>([&](auto pair) {
      const int column = first + pair * 2 * fragment::step_columns;
      if (column >= first_dense_ + dense_) return;
      const dequantizer& of = group_at(column);
      const int slot = column - first_dense_;
      put(of.template step<2 * pair>(words), slot, 0, dense_, pairs);
      put(of.template step<2 * pair + 1>(words), slot + fragment::step_columns, 0, dense_, pairs);
    });
  }

  /// A k-step of weak columns. For one warp.
  __device__ void add_weak(int step) {
    const index_t steps = fragment::weak_steps(w_.extent());
    const int lane = arch::lane();
    std::uint32_t words[4];
    arch::load_once<4>(words, reinterpret_cast<const std::uint32_t*>(w_.weak_values) +
                                  ((row_tile_ * steps + step) * fragment::lanes + lane) * 4);
    const int slot = dense_ + step * fragment::step_columns - first_weak();
    put(dequantizer::weak_step(words), slot, dense_, columns_,
        in_pairs(slot, fragment::step_columns, dense_, columns_));
  }

  /// The group of a dense column, not below the one before. For one warp.
  __device__ const dequantizer& group_at(int column) {
    if (column < group_end_) return group_;
    constexpr auto set_groups = static_cast<int>(fragment::groups_together);
    const auto group = static_cast<int>(w_.group_of(column));
    group_end_ = (group + 1) * static_cast<int>(w_.columns_per_group);
    if (group / set_groups != set_) load_set(group / set_groups);
    group_ = {__shfl_sync(0xffffffffU, scales_, group % set_groups, set_groups),
              __shfl_sync(0xffffffffU, zeros_, group % set_groups, set_groups)};
    return group_;
  }
  /// Parameters of a set of groups: lane 4 r + g those of rows r and r + 8 and group g.
  __device__ void load_set(int set) {
    using zero_pair = std::conditional_t<
        format::zero == zero_kind::scaled, std::uint32_t,
        std::conditional_t<fragment::zero_width<format::bits> == 4, std::uint8_t, std::uint16_t>>;
    const index_t sets = fragment::group_sets(w_.extent());
    const index_t at = (row_tile_ * sets + set) * fragment::lanes + arch::lane();
    set_ = set;
    scales_ = reinterpret_cast<const std::uint32_t*>(w_.scales)[at];
    if constexpr (format::zero != zero_kind::symmetric) {
      zeros_ = reinterpret_cast<const zero_pair*>(w_.zeros)[at];
    }
  }

  /// Whether slots from `slot` on can be stored in pairs: they are columns, aligned in all rows,
  /// and all in [begin, end).
  __device__ bool in_pairs(int slot, int columns, int begin, int end) const {
    return in_order && ((shifts_.first | shifts_.per_row | slot) & 1) == 0 && slot >= begin &&
           slot + columns <= end;
  }
  /// Stores a k-step whose first column has place[slot], but for slots outside of [begin, end).
  __device__ void put(const lane_weights& w, int slot, int begin, int end, bool pairs) {
    const int at = slot + static_cast<int>(threadIdx.x % 4U) * 2;
    if (pairs) {
      unroll<4>([&](auto reg) {
        put_pair(row_[reg % 2] + at + reg / 2 * 8, w.of[2 * reg], w.of[2 * reg + 1]);
      });
      return;
    }
    unroll<4>([&](auto i) {
      constexpr int reg = i / 2 * 2;  // of the lane's first row
      constexpr int half = i % 2;
      const int mine = at + 4 * reg + half;
      if (mine < begin || mine >= end) return;
      const int c = in_order ? mine : shared_.place[mine];
      row_[0][c] = from_float<Y>(w.of[2 * reg + half]);
      row_[1][c] = from_float<Y>(w.of[2 * (reg + 1) + half]);
    });
  }
  /// from_float of both, but for the bits of a NaN.
  static __device__ void put_pair(Y* to, float low, float high) {
    if constexpr (std::is_same_v<Y, float>) {
      *reinterpret_cast<float2*>(to) = {low, high};
    } else {
      std::uint32_t both;
      if constexpr (std::is_same_v<Y, half_bits>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
      } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
      }
      *reinterpret_cast<std::uint32_t*>(to) = both;
    }
  }

  const View& w_;
  index_t row_tile_;
  index_t first_column_;
  int columns_;
  int first_dense_;  // the first dense column of the tile,
  int dense_;        // and how many it has
  row_shifts shifts_;
  shared_storage& shared_;
  Y* row_[2];                 // rows r and r + 8 of a lane
  int set_ = -1;              // the set of groups that is loaded,
  std::uint32_t scales_ = 0;  // and its parameters
  std::uint32_t zeros_ = 0;
  dequantizer group_;
  int group_end_ = 0;  // the first dense column behind the group
};

}  // namespace qeft::block
