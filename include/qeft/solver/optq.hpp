// SPDX-License-Identifier: Apache-2.0
// OPTQ: column by column, each column's rounding error compensated by all later columns, the weak
// ones included (METHOD section 3, steps 3 and 4).
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "qeft/core/host_buffer.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/core/text.hpp"
#include "qeft/solver/layer.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {
namespace detail {

/// The order in which columns are solved: robust ones, then weak ones.
struct solve_order {
  std::vector<std::int32_t> dense;  // (dense columns) dense column at each position
  std::vector<std::int32_t> input;  // (IC) input column at each position
};

/// Robust columns in order, or by falling H_jj (equals in order).
inline solve_order make_solve_order(const layer_builder& builder, const layer_options& options,
                                    span<const float> h) {
  const index_t n = builder.extent().dense + builder.extent().weak;
  const auto& dense_columns = builder.dense_columns();
  solve_order order;
  order.dense.resize(dense_columns.size());
  std::iota(order.dense.begin(), order.dense.end(), 0);
  if (options.act_order) {
    const auto sensitivity = [&](std::int32_t i) {
      return h[dense_columns[static_cast<std::size_t>(i)] * (n + 1)];
    };
    std::stable_sort(order.dense.begin(), order.dense.end(), [&](std::int32_t a, std::int32_t b) {
      return sensitivity(a) > sensitivity(b);
    });
  }
  for (const std::int32_t i : order.dense) {
    order.input.push_back(dense_columns[static_cast<std::size_t>(i)]);
  }
  const auto& weak = builder.weak_columns();
  order.input.insert(order.input.end(), weak.begin(), weak.end());
  return order;
}

/// One solve of a layer; rows are independent given U.
class optq_solver {
 public:
  /// @param target (OC, IC) weights to approximate
  /// @param factor U over `order`
  optq_solver(const float* target, const layer_options& options, const solve_order& order,
              const inverse_factor& factor, layer_builder& builder)
      : target_(target),
        options_(options),
        order_(order),
        factor_(factor),
        builder_(builder),
        e_(builder.extent()),
        n_(e_.dense + e_.weak),
        static_groups_(options.static_groups || options.act_order),
        group_size_(builder.group_size()),
        err_stride_(std::min(options.tuning.block_columns, std::max<index_t>(e_.dense, 1))) {
    if (options.search.weighted) find_importances();
  }

  void run(const on_host& exec) const {
    const index_t tile = options_.tuning.tile_rows;
    exec.parallel_for(ceil_div(e_.out_channels, tile), 1, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        solve_tile(t * tile, std::min((t + 1) * tile, e_.out_channels));
      }
    });
  }

 private:
  /// The error-compensated state of some rows.
  struct tile_state {
    index_t first_row;
    index_t rows;
    host_buffer<float> w;                     // (rows, n) current weights, by position
    host_buffer<float> err;                   // (rows, block) scaled errors of a block
    std::vector<std::uint8_t> codes;          // (rows, dense)
    std::vector<group_quantizer> quantizers;  // (rows, groups)
  };

  void solve_tile(index_t first_row, index_t last_row) const {
    tile_state s;
    s.first_row = first_row;
    s.rows = last_row - first_row;
    s.w.resize(static_cast<std::size_t>(s.rows * n_));
    s.err.resize(static_cast<std::size_t>(s.rows * err_stride_));
    s.codes.resize(static_cast<std::size_t>(s.rows * e_.dense));
    s.quantizers.resize(static_cast<std::size_t>(s.rows * e_.groups));
    load(s);
    if (static_groups_) find_static_params(s);
    for (index_t begin = 0, end = 0; begin < e_.dense; begin = end) {
      end = block_end(begin);
      solve_block(s, begin, end);
      update_later_columns(s, begin, end);
    }
    store(s);
  }

  /// Blocks never cut a group that starts inside them, so that at a group's first column every
  /// earlier error has reached the whole group.
  index_t block_end(index_t begin) const {
    index_t length = options_.tuning.block_columns;
    if (!static_groups_) {
      length = group_size_ <= length ? length / group_size_ * group_size_
                                     : std::min(length, group_size_ - begin % group_size_);
    }
    return std::min(begin + length, e_.dense);
  }

  /// The solver pays err^2 = (w - q)^2 / U_jj^2 for a column; nothing where the input is dead.
  void find_importances() {
    importances_.resize(static_cast<std::size_t>(e_.dense));
    for (index_t p = 0; p < e_.dense; ++p) {
      const auto u = static_cast<double>(factor_.u[static_cast<std::size_t>(p * (n_ + 1))]);
      constexpr double largest = std::numeric_limits<float>::max();
      importances_[static_cast<std::size_t>(order_.dense[static_cast<std::size_t>(p)])] =
          is_zeroed(p) ? 0.0F : static_cast<float>(std::min(1.0 / (u * u), largest));
    }
  }

  /// A robust column whose input is always zero becomes zero, which frees the range of its group.
  /// If all inputs are dead nothing is known, and the weights stay.
  bool is_zeroed(index_t position) const {
    const auto& dead = factor_.dead_inputs;
    return static_cast<index_t>(dead.size()) != n_ &&
           std::binary_search(dead.begin(), dead.end(),
                              order_.input[static_cast<std::size_t>(position)]);
  }

  void load(tile_state& s) const {
    for (index_t r = 0; r < s.rows; ++r) {
      const float* from = target_ + (s.first_row + r) * n_;
      float* to = s.w.data() + r * n_;
      for (index_t p = 0; p < n_; ++p) to[p] = from[order_.input[static_cast<std::size_t>(p)]];
    }
    for (index_t p = 0; p < e_.dense; ++p) {
      if (!is_zeroed(p)) continue;
      for (index_t r = 0; r < s.rows; ++r) s.w[static_cast<std::size_t>(r * n_ + p)] = 0.0F;
    }
  }

  void find_group(tile_state& s, index_t r, index_t g, span<const float> weights) const {
    span<const float> importance;
    if (options_.search.weighted) {
      importance = {importances_.data() + g * group_size_, weights.size()};
    }
    s.quantizers[static_cast<std::size_t>(r * e_.groups + g)] =
        builder_.find_params(s.first_row + r, g, weights, options_.search, importance);
  }

  void find_static_params(tile_state& s) const {
    std::vector<float> dense(static_cast<std::size_t>(e_.dense));
    for (index_t r = 0; r < s.rows; ++r) {
      for (std::size_t p = 0; p < dense.size(); ++p) {
        dense[static_cast<std::size_t>(order_.dense[p])] =
            s.w[static_cast<std::size_t>(r * n_) + p];
      }
      for (index_t g = 0; g < e_.groups; ++g) {
        const index_t first = g * group_size_;
        find_group(s, r, g, {dense.data() + first, std::min(group_size_, e_.dense - first)});
      }
    }
  }

  /// Quantises columns [begin, end) one after the other; errors reach the columns of the block.
  void solve_block(tile_state& s, index_t begin, index_t end) const {
    for (index_t c = begin; c < end; ++c) {
      const index_t i = order_.dense[static_cast<std::size_t>(c)];
      const index_t g = i / group_size_;
      if (!static_groups_ && c % group_size_ == 0) {
        const index_t count = std::min(group_size_, e_.dense - c);
        for (index_t r = 0; r < s.rows; ++r) {
          find_group(s, r, g, {s.w.data() + r * n_ + c, count});
        }
      }
      const float* u = factor_.u.data() + c * n_;
      const float u_cc = u[c];
      for (index_t r = 0; r < s.rows; ++r) {
        float* w = s.w.data() + r * n_;
        const group_quantizer& q = s.quantizers[static_cast<std::size_t>(r * e_.groups + g)];
        const float level = q.level(w[c]);
        s.codes[static_cast<std::size_t>(r * e_.dense + i)] = q.code(level);
        const float err = (w[c] - q.value(level)) / u_cc;
        s.err[static_cast<std::size_t>(r * err_stride_ + c - begin)] = err;
        for (index_t p = c + 1; p < end; ++p) w[p] -= err * u[p];
      }
    }
  }

  /// The errors of block [begin, end) reach all later columns at once. FP32 suffices: a weight
  /// takes one update per block, so its rounding error stays near 1e-6 of its size, where a
  /// quantisation step is 1e-3 to 1e-1 of it.
  void update_later_columns(tile_state& s, index_t begin, index_t end) const {
    if (end == n_) return;
    map_rows(s.w.data() + end, s.rows, n_ - end, n_).noalias() -=
        map_rows(s.err.data(), s.rows, end - begin, err_stride_) *
        map_rows(factor_.u.data() + begin * n_ + end, end - begin, n_ - end, n_);
  }

  void store(const tile_state& s) const {
    if (!map_rows(s.w.data(), s.rows, n_, n_).allFinite()) {
      fail(errc::not_finite, text("quantize_layer: compensated weights of rows ", s.first_row,
                                  " to ", s.first_row + s.rows - 1, " overflow FP32"));
    }
    for (index_t r = 0; r < s.rows; ++r) {
      builder_.set_codes(s.first_row + r, s.codes.data() + r * e_.dense);
      for (index_t j = 0; j < e_.weak; ++j) {
        builder_.set_weak(s.first_row + r, j, s.w[static_cast<std::size_t>(r * n_ + e_.dense + j)]);
      }
    }
  }

  const float* target_;
  const layer_options& options_;
  const solve_order& order_;
  const inverse_factor& factor_;
  layer_builder& builder_;
  layout::extent e_;
  index_t n_;
  bool static_groups_;
  index_t group_size_;
  index_t err_stride_;              // columns of a block, at most
  std::vector<float> importances_;  // (dense columns), of a weighted search
};

}  // namespace detail
}  // namespace QEFT_TARGET
}  // namespace qeft::solver
