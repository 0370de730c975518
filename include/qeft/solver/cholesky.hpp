// SPDX-License-Identifier: Apache-2.0
// The upper Cholesky factor of H^-1 without inverting H (METHOD section 3, steps 1 and 2).
#pragma once

#include <Eigen/Cholesky>
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "qeft/core/host_buffer.hpp"
#include "qeft/core/text.hpp"
#include "qeft/reorder/permutation.hpp"
#include "qeft/solver/matrix_ops.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

struct damping_options {
  double damping = 0.01;     // lambda: H + lambda * mean(diag H) * I, in [0, 1]
  bool robust_mean = false;  // mean over the robust columns only: outliers (weak columns) otherwise
                             // raise it, see layer_options
};

/// Throws when an option breaks its rule.
inline void check(const damping_options& o) {
  if (!(o.damping >= 0.0 && o.damping <= 1.0)) {
    fail(errc::invalid_argument,
         text("damping_options: damping is ", o.damping, ", but must be in [0, 1]"));
  }
}

/// U with U^T U = H^-1, and what it took.
struct inverse_factor {
  host_buffer<float> u;                   // (n, n) row-major, upper triangular, diagonal positive
  double damping = 0.0;                   // lambda that succeeded
  double added = 0.0;                     // to the diagonal by it
  std::vector<std::int32_t> dead_inputs;  // columns of H with H_jj = 0, ascending
};

namespace detail {

inline constexpr index_t factor_block = 128;

/// In place: the lower triangle of the column-major n x n matrix becomes L with L L^T = A. Returns
/// false when a pivot is not clearly positive. Tiles are fixed, so the result does not depend on
/// the number of threads.
inline bool cholesky_lower(const on_host& exec, double* a, index_t n) {
  using matrix = Eigen::Map<Eigen::MatrixXd, 0, Eigen::OuterStride<>>;
  const auto tile = [&](index_t row, index_t col, index_t rows, index_t cols) {
    return matrix(a + col * n + row, rows, cols, Eigen::OuterStride<>(n));
  };
  std::vector<double> smallest_pivot(static_cast<std::size_t>(n));
  for (index_t j = 0; j < n; ++j) {
    // Below this a pivot is only the rounding error of a singular matrix.
    smallest_pivot[static_cast<std::size_t>(j)] =
        static_cast<double>(n) * std::numeric_limits<double>::epsilon() * a[j * n + j];
  }
  for (index_t k = 0; k < n; k += factor_block) {
    const index_t width = std::min(factor_block, n - k);
    const Eigen::MatrixXd diagonal_tile = tile(k, k, width, width);
    const Eigen::LLT<Eigen::MatrixXd> llt(diagonal_tile);
    if (llt.info() != Eigen::Success) return false;
    const Eigen::MatrixXd factor = llt.matrixL();
    for (index_t j = 0; j < width; ++j) {
      const double pivot = factor(j, j) * factor(j, j);
      if (!(pivot > smallest_pivot[static_cast<std::size_t>(k + j)]) || !std::isfinite(pivot)) {
        return false;
      }
    }
    tile(k, k, width, width) = factor;

    const index_t below = k + width;
    const index_t tiles = ceil_div(n - below, factor_block);
    exec.parallel_for(tiles, 1, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        const index_t row = below + t * factor_block;
        auto panel = tile(row, k, std::min(factor_block, n - row), width);
        factor.triangularView<Eigen::Lower>().transpose().solveInPlace<Eigen::OnTheRight>(panel);
      }
    });
    exec.parallel_for(tiles * (tiles + 1) / 2, 1, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        index_t i = 0;
        while ((i + 1) * (i + 2) / 2 <= t) ++i;
        const index_t row = below + i * factor_block;
        const index_t col = below + (t - i * (i + 1) / 2) * factor_block;
        const index_t rows = std::min(factor_block, n - row);
        const index_t cols = std::min(factor_block, n - col);
        tile(row, col, rows, cols).noalias() -=
            tile(row, k, rows, width) * tile(col, k, cols, width).transpose();
      }
    });
  }
  return true;
}

/// u = J L^-1 J in row-major FP32, where J reverses the order: u[n-1-i][n-1-j] = (L^-1)_ij. Block
/// columns of L^-1 are independent tasks. Returns false when a value leaves the range of FP32.
inline bool reversed_inverse(const on_host& exec, const double* l, index_t n, float* u) {
  using const_matrix = Eigen::Map<const Eigen::MatrixXd, 0, Eigen::OuterStride<>>;
  std::atomic<bool> in_range{true};
  exec.parallel_for(ceil_div(n, factor_block), 1, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const index_t first = t * factor_block;
      const index_t cols = std::min(factor_block, n - first);
      const index_t rows = n - first;
      Eigen::MatrixXd x = Eigen::MatrixXd::Identity(rows, cols);
      const_matrix(l + first * n + first, rows, rows, Eigen::OuterStride<>(n))
          .triangularView<Eigen::Lower>()
          .solveInPlace(x);
      for (index_t i = 0; i < rows; ++i) {
        float* row = u + (n - 1 - first - i) * n + (n - 1 - first);
        for (index_t j = 0; j < cols; ++j) {
          row[-j] = j <= i ? static_cast<float>(x(i, j)) : 0.0F;
          if (!std::isfinite(row[-j])) in_range = false;
        }
      }
    }
  });
  for (index_t j = 0; j < n; ++j) {
    if (!(u[j * (n + 1)] > 0.0F)) in_range = false;
  }
  return in_range;
}

}  // namespace detail

/// What a damping of 1 adds to the diagonal of a Hessian: the mean of the diagonal over the live
/// inputs (H_jj > 0) among the first `count` of `order`, or 1 if there are none. A negative H_jj is
/// errc::not_positive_definite.
/// @param h (n, n)  @param order  (n)
inline double mean_diagonal(span<const float> h, const permutation& order, index_t count) {
  const index_t n = order.size();
  double sum = 0.0;
  index_t live = 0;
  for (index_t p = 0; p < n; ++p) {
    const auto d = static_cast<double>(h[order[p] * (n + 1)]);
    if (d < 0.0) {
      fail(errc::not_positive_definite, text("the Hessian's diagonal cannot be negative, but H[",
                                             order[p], "][", order[p], "] is ", d));
    }
    if (d > 0.0 && p < count) {
      sum += d;
      ++live;
    }
  }
  return live == 0 ? 1.0 : sum / static_cast<double>(live);
}

/// H + added * I, where dead inputs (H_jj = 0) stay dead.
/// @param h (n, n)
inline host_buffer<float> damped_hessian(const on_host& exec, span<const float> h, index_t n,
                                         double added) {
  host_buffer<float> damped(static_cast<std::size_t>(n * n));
  exec.parallel_for(n, 16, [&](index_t begin, index_t end) {
    std::copy(h.data() + begin * n, h.data() + end * n, damped.data() + begin * n);
    for (index_t j = begin; j < end; ++j) {
      float& diagonal = damped[static_cast<std::size_t>(j * (n + 1))];
      if (diagonal > 0.0F) diagonal += static_cast<float>(added);
    }
  });
  return damped;
}

/// Factors the damped Hessian in reversed order. With J the reversal and J H J = L L^T (an ordinary
/// Cholesky factorisation), R = J L J is upper triangular and H = R R^T. Then H^-1 = R^-T R^-1, so
/// U = R^-1 = J L^-1 J is upper triangular with U^T U = H^-1: the upper Cholesky factor of H^-1,
/// for half the operations of inverting and factoring again. Computed in double: the condition
/// number of a damped H with outlier columns can exceed what FP32 resolves.
///
/// A dead input (H_jj = 0) gets H_jj = 1 and is decoupled: what underflow left of its row counts as
/// 0. The damping is relative to the mean of the diagonal over live inputs. When the factorisation
/// fails, lambda grows tenfold (from at least 0.001) while it is at most 1; then
/// errc::not_positive_definite is thrown.
/// @param h      (n, n) symmetric, as hessian_accumulator::finish returns it
/// @param order  column of `h` that stands at each of the n positions of U
/// @param robust the first `robust` positions of `order` are robust columns (the others are weak)
inline inverse_factor factor_inverse(const on_host& exec, span<const float> h,
                                     const permutation& order, index_t robust,
                                     const damping_options& options) {
  const index_t n = order.size();
  if (h.size() != n * n) {
    fail(errc::invalid_argument,
         text("factor_inverse: h has ", h.size(), " elements, but must have ", n, "^2"));
  }
  check(options);
  check_finite(exec, h.data(), n, n, "factor_inverse: the Hessian");
  check_symmetric(exec, h.data(), n, "factor_inverse: the Hessian");

  const double mean = mean_diagonal(h, order, options.robust_mean ? robust : n);
  inverse_factor result;
  for (index_t j = 0; j < n; ++j) {
    if (h[j * (n + 1)] == 0.0F) result.dead_inputs.push_back(static_cast<std::int32_t>(j));
  }

  host_buffer<double> a(static_cast<std::size_t>(n * n));
  result.u.resize(static_cast<std::size_t>(n * n));
  for (double lambda = options.damping; lambda <= 1.0; lambda = std::max(10.0 * lambda, 0.001)) {
    exec.parallel_for(n, 16, [&](index_t begin, index_t end) {
      for (index_t j = begin; j < end; ++j) {
        const float* row = h.data() + order[n - 1 - j] * n;  // h is symmetric: row = column
        double* column = a.data() + j * n;
        const bool dead = row[order[n - 1 - j]] == 0.0F;
        for (index_t i = j; i < n; ++i) {
          const index_t other = order[n - 1 - i];
          const bool coupled = !dead && h[other * (n + 1)] != 0.0F;
          column[i] = coupled ? static_cast<double>(row[other]) : 0.0;
        }
        column[j] = dead ? 1.0 : column[j] + lambda * mean;
      }
    });
    if (detail::cholesky_lower(exec, a.data(), n) &&
        detail::reversed_inverse(exec, a.data(), n, result.u.data())) {
      result.damping = lambda;
      result.added = lambda * mean;
      return result;
    }
  }
  fail(
      errc::not_positive_definite,
      text("factor_inverse: the Hessian of ", n,
           " inputs is not positive definite even with a damping of its mean diagonal; it is not a "
           "matrix of the form X X^T"));
}

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
