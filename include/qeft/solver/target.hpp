// SPDX-License-Identifier: Apache-2.0
// Asymmetric calibration: the weights that reproduce the full-precision model's output on the
// inputs of the quantised one (METHOD section 9).
#pragma once

#include <algorithm>
#include <string>

#include "qeft/core/host_buffer.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/core/text.hpp"
#include "qeft/reorder/permutation.hpp"
#include "qeft/solver/cholesky.hpp"
#include "qeft/solver/matrix_ops.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

/// How much of what the layers before did to a layer's input, and to the residual stream it writes,
/// the layer makes good.
struct asymmetric_options {
  double input = 0.0;   // a, in [0, 1]; 0 in the paper
  double stream = 0.0;  // r, in [0, 1]; for layers that write the residual stream
};

/// Throws when an option breaks its rule.
inline void check(const asymmetric_options& o) {
  const auto in_range = [](const char* name, double value) {
    if (value >= 0.0 && value <= 1.0) return;
    fail(errc::invalid_argument,
         text("asymmetric_options: ", name, " is ", value, ", but must be in [0, 1]"));
  };
  in_range("input", o.input);
  in_range("stream", o.stream);
}

namespace detail {

inline constexpr index_t target_tile_rows = 64;

/// Calls body(first row, rows) for every tile of rows.
template <class Body>
void for_each_row_tile(const on_host& exec, index_t out_channels, const Body& body) {
  exec.parallel_for(ceil_div(out_channels, target_tile_rows), 1, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const index_t first = t * target_tile_rows;
      body(first, std::min(target_tile_rows, out_channels - first));
    }
  });
}

/// x (U^T U) for some rows x (rows, n) in the order of U, in place. Only the upper triangle of U
/// is multiplied, in blocks of columns.
inline void multiply_inverse(row_major_matrix<float>& x, const float* u) {
  constexpr index_t block = 128;
  const index_t n = x.cols();
  row_major_matrix<float> y(x.rows(), n);  // x U^T
  for (index_t c = 0; c < n; c += block) {
    const index_t cols = std::min(block, n - c);
    y.middleCols(c, cols).noalias() =
        x.rightCols(n - c) * map_rows(u + c * n + c, cols, n - c, n).transpose();
  }
  for (index_t c = 0; c < n; c += block) {
    const index_t cols = std::min(block, n - c);
    x.middleCols(c, cols).noalias() = y.leftCols(c + cols) * map_rows(u + c, c + cols, cols, n);
  }
}

}  // namespace detail

/// M = a W D + r R, (out_channels, in_channels): how the layer's output, and the residual stream
/// before it, differ between the two models, correlated with the quantised model's input. Empty
/// when neither D nor R counts. The same bits for any number of threads.
/// @param w (out_channels, in_channels), row-major
/// @param d D = 2/T sum (x_fp - x_q) x_q^T, (in_channels, in_channels), not symmetric; empty for 0
/// @param r R = 2/T sum (h_fp - h_q) x_q^T, (out_channels, in_channels), h the residual stream
///          before the layer's addition; empty for 0
/// @throws qeft::error for wrong sizes, and naming row and column of what is not finite
inline host_buffer<float> output_mismatch(const on_host& exec, span<const float> w,
                                          index_t out_channels, index_t in_channels,
                                          span<const float> d, span<const float> r,
                                          const asymmetric_options& options) {
  check(options);
  detail::check_matrix(exec, w, out_channels, in_channels, "output_mismatch: w");
  const bool use_d = !d.empty() && options.input > 0.0;
  const bool use_r = !r.empty() && options.stream > 0.0;
  if (!d.empty()) detail::check_matrix(exec, d, in_channels, in_channels, "output_mismatch: d");
  if (!r.empty()) detail::check_matrix(exec, r, out_channels, in_channels, "output_mismatch: r");
  host_buffer<float> m;
  if (!use_d && !use_r) return m;
  m.resize(static_cast<std::size_t>(out_channels * in_channels));
  detail::for_each_row_tile(exec, out_channels, [&](index_t first, index_t rows) {
    const auto tile = [&](auto* x) {
      return map_rows(x + first * in_channels, rows, in_channels, in_channels);
    };
    auto out = tile(m.data());
    if (use_d) {
      out.noalias() = static_cast<float>(options.input) *
                      (tile(w.data()) * map_rows(d.data(), in_channels, in_channels, in_channels));
    }
    if (use_r) out += static_cast<float>(options.stream) * tile(r.data());
  });
  check_finite(exec, m.data(), out_channels, in_channels, "output_mismatch: a W D + r R");
  return m;
}

/// W* = W + M (H + l I)^-1, which asymmetric calibration quantises instead of W: with a = 1, r = 0
/// it minimises 2/T ||W X_fp - W* X_q||^2 + l ||W* - W||^2. All columns take part, weak ones
/// included; columns of dead inputs stay as they are. In solve order M (H + l I)^-1 = (M U^T) U:
/// two triangular products, and no inverse. The same bits for any number of threads.
/// @param w        (out_channels, order.size()), row-major
/// @param mismatch M as output_mismatch returns it, of the size of w
/// @param order    column of w that stands at each position of U
/// @param factor   U with U^T U = (H + l I)^-1 over `order`, as factor_inverse returns it
/// @throws qeft::error for wrong sizes, and naming row and column of what is not finite
inline host_buffer<float> asymmetric_target(const on_host& exec, span<const float> w,
                                            span<const float> mismatch, index_t out_channels,
                                            const permutation& order,
                                            const inverse_factor& factor) {
  const index_t n = order.size();
  detail::check_matrix(exec, w, out_channels, n, "asymmetric_target: w");
  detail::check_matrix(exec, mismatch, out_channels, n, "asymmetric_target: the mismatch");
  if (static_cast<index_t>(factor.u.size()) != n * n) {
    fail(errc::invalid_argument,
         text("asymmetric_target: U has ", factor.u.size(), " elements, but must have ", n, "^2"));
  }
  host_buffer<float> target(w.begin(), w.end());
  detail::for_each_row_tile(exec, out_channels, [&](index_t first, index_t rows) {
    row_major_matrix<float> x(rows, n);
    for (index_t i = 0; i < rows; ++i) {
      const float* from = mismatch.data() + (first + i) * n;
      for (index_t p = 0; p < n; ++p) x(i, p) = from[order[p]];
    }
    detail::multiply_inverse(x, factor.u.data());
    for (index_t p = 0; p < n; ++p) {
      const auto& dead = factor.dead_inputs;
      if (std::binary_search(dead.begin(), dead.end(), order[p])) continue;
      for (index_t i = 0; i < rows; ++i) {
        target[static_cast<std::size_t>((first + i) * n + order[p])] += x(i, p);
      }
    }
  });
  check_finite(exec, target.data(), out_channels, n, "asymmetric_target: W + M (H + l I)^-1");
  return target;
}

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
