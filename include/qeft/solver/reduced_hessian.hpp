// SPDX-License-Identifier: Apache-2.0
// The Hessian of the dense columns of a layer whose weak columns follow them: what refinement
// lowers (METHOD section 9).
#pragma once

#include <Eigen/Cholesky>
#include <algorithm>
#include <cmath>
#include <vector>

#include "qeft/core/host_buffer.hpp"
#include "qeft/core/text.hpp"
#include "qeft/solver/matrix_ops.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {
namespace detail {

/// What is added to the diagonal of a system, relative to it: the rounding error of an FP32 H.
inline constexpr double refine_ridge = 1e-6;

/// The part of H_jj that the weak columns must leave of it, or column j counts as represented by
/// them. The rounding of an FP32 H and the ridge blur what they leave by about 1e-6 of H_jj.
/// A gradient summed over thousands of such columns is wrong by up to 1e-4 of H_jj times a step:
/// over a smaller curvature that would be steps in any direction.
inline constexpr double refine_noise = 1e-4;

/// E as the dense columns see it. Whatever they are, the k weak columns may follow with the values
/// that are best for them; what is left of E is the quadratic form of H_dd - H_dw H_ww^-1 H_wd.
/// Columns with H_jj = 0 are dead: their rows of H count as 0, and H_jj of a weak one as 1.
struct reduced_hessian {
  double scale = 1.0;                    // a power of two that brings H near 1
  host_buffer<float> dense;              // (dense, dense) that form times `scale`
  Eigen::RowVectorXf noise;              // (dense) what its diagonal may be by rounding alone
  std::vector<float> curvature;          // (dense) its diagonal; 0 where that is no more than noise
  row_major_matrix<double> dense_weak;   // (dense, k) H_dw
  row_major_matrix<double> weak_factor;  // (k, k) upper triangular R with R^T R = H_ww + ridge
  std::vector<bool> weak_alive;          // (k)
};

/// R of reduced_hessian, with the least ridge that makes H_ww positive definite.
inline row_major_matrix<double> factor_weak(const Eigen::MatrixXd& h_ww) {
  for (double ridge = refine_ridge; ridge <= 1.0; ridge *= 10.0) {
    Eigen::MatrixXd damped = h_ww;
    damped.diagonal() *= 1.0 + ridge;
    const Eigen::LLT<Eigen::MatrixXd> llt(damped);
    if (llt.info() == Eigen::Success) return llt.matrixU();
  }
  fail(errc::not_positive_definite,
       text("refine: the Hessian of the ", h_ww.rows(),
            " weak columns is not positive semidefinite; it is not a matrix of the form X X^T"));
}

/// H with its columns reordered, and without what underflow left in the rows of dead ones.
class reordered_hessian {
 public:
  /// @param h (n, n) symmetric  @param columns (n) column of `h` at each position
  reordered_hessian(span<const float> h, const std::vector<index_t>& columns)
      : h_(h.data()), columns_(columns) {
    for (index_t i = 0; i < size(); ++i) {
      if (diagonal(i) >= 0.0) continue;
      fail(errc::not_positive_definite,
           text("refine: H[", column(i), "][", column(i), "] is ", diagonal(i),
                ", but a Hessian's diagonal cannot be negative"));
    }
  }

  index_t size() const { return static_cast<index_t>(columns_.size()); }
  double diagonal(index_t i) const { return static_cast<double>(h_[column(i) * (size() + 1)]); }
  double operator()(index_t i, index_t j) const {
    const bool coupled = diagonal(i) > 0.0 && diagonal(j) > 0.0;
    return coupled ? static_cast<double>(h_[column(i) * size() + column(j)]) : 0.0;
  }
  /// A power of two that brings the largest entry near 1.
  double scale() const {
    double largest = 0.0;
    for (index_t i = 0; i < size(); ++i) largest = std::max(largest, diagonal(i));
    return largest > 0.0 ? std::ldexp(1.0, -std::ilogb(largest)) : 1.0;
  }

 private:
  index_t column(index_t i) const { return columns_[static_cast<std::size_t>(i)]; }

  const float* h_;
  const std::vector<index_t>& columns_;
};

/// The parts of reduced_hessian that belong to weak columns.
inline void set_weak(const reordered_hessian& h, index_t dense, reduced_hessian& out) {
  const index_t k = h.size() - dense;
  out.dense_weak.resize(dense, k);
  Eigen::MatrixXd h_ww(k, k);
  for (index_t j = 0; j < k; ++j) {
    out.weak_alive.push_back(h.diagonal(dense + j) > 0.0);
    for (index_t i = 0; i < dense; ++i) out.dense_weak(i, j) = h(i, dense + j);
    for (index_t i = 0; i < k; ++i) h_ww(i, j) = h(dense + i, dense + j);
    if (!out.weak_alive.back()) h_ww(j, j) = 1.0;
  }
  out.weak_factor = factor_weak(h_ww);
}

/// @param h       (n, n) symmetric
/// @param columns (n) columns of `h`: `dense` dense ones, then the weak ones
inline reduced_hessian reduce_hessian(const on_host& exec, span<const float> h,
                                      const std::vector<index_t>& columns, index_t dense) {
  constexpr index_t tile_rows = 64;
  const reordered_hessian original(h, columns);
  reduced_hessian out;
  out.scale = original.scale();
  set_weak(original, dense, out);
  const Eigen::MatrixXd taken =  // H_dw H_ww^-1 H_wd is its square
      out.weak_factor.transpose().triangularView<Eigen::Lower>().solve(out.dense_weak.transpose());
  out.dense.resize(static_cast<std::size_t>(dense * dense));
  out.noise.resize(dense);
  out.curvature.resize(static_cast<std::size_t>(dense));
  exec.parallel_for(ceil_div(dense, tile_rows), 1, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const index_t first = t * tile_rows;
      const index_t rows = std::min(tile_rows, dense - first);
      const Eigen::MatrixXd product = taken.middleCols(first, rows).transpose() * taken;
      for (index_t i = first; i < first + rows; ++i) {
        float* row = out.dense.data() + i * dense;
        for (index_t j = 0; j < dense; ++j) {
          row[j] = static_cast<float>(out.scale * (original(i, j) - product(i - first, j)));
        }
        out.noise[i] = static_cast<float>(refine_noise * out.scale * original.diagonal(i));
        out.curvature[static_cast<std::size_t>(i)] = row[i] > out.noise[i] ? row[i] : 0.0F;
      }
    }
  });
  return out;
}

}  // namespace detail
}  // namespace QEFT_TARGET
}  // namespace qeft::solver
