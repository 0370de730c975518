// SPDX-License-Identifier: Apache-2.0
// What the solver needs of dense linear algebra. Products are Eigen's, one call per tile: a tile's
// size never depends on the number of threads, so neither do its sums. (Compiled with OpenMP, Eigen
// would start threads of its own inside ours: call Eigen::setNbThreads(1) there.)
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "qeft/core/checked_product.hpp"
#include "qeft/core/memory.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/core/text.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

template <class T>
using row_major_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Maps rows x cols elements, consecutive rows `stride` apart.
template <class T>
auto map_rows(T* data, index_t rows, index_t cols, index_t stride) {
  using matrix =
      std::conditional_t<std::is_const_v<T>, const row_major_matrix<std::remove_const_t<T>>,
                         row_major_matrix<T>>;
  return Eigen::Map<matrix, 0, Eigen::OuterStride<>>(data, rows, cols,
                                                     Eigen::OuterStride<>(stride));
}

/// Throws errc::not_finite naming the first NaN or infinity of a rows x cols matrix.
inline void check_finite(const on_host& exec, const float* x, index_t rows, index_t cols,
                         const std::string& what) {
  constexpr index_t chunk = 4096;
  const index_t count = rows * cols;
  std::atomic<index_t> first_bad{count};
  exec.parallel_for(ceil_div(count, chunk), 16, [&](index_t begin, index_t end) {
    for (index_t c = begin; c < end; ++c) {
      const index_t last = std::min(count, (c + 1) * chunk);
      float poison = 0.0F;  // 0 * x is NaN for infinities and NaNs
      for (index_t i = c * chunk; i < last; ++i) {
        poison += x[i] * 0.0F == 0.0F ? 0.0F : 1.0F;
      }
      if (poison == 0.0F) continue;
      index_t i = c * chunk;
      while (std::isfinite(x[i])) ++i;
      index_t seen = first_bad.load();
      while (i < seen && !first_bad.compare_exchange_weak(seen, i)) {
      }
      return;
    }
  });
  const index_t i = first_bad.load();
  if (i == count) return;
  fail(errc::not_finite,
       text(what, ": row ", i / cols, ", column ", i % cols, " is ", x[i], ", but must be finite"));
}

namespace detail {
/// Throws when x is not (rows, cols), or not finite.
inline void check_matrix(const on_host& exec, span<const float> x, index_t rows, index_t cols,
                         const char* what) {
  if (x.size() != checked_product(rows, cols, what)) {
    fail(errc::invalid_argument,
         text(what, " has ", x.size(), " elements, but must have ", rows, " x ", cols));
  }
  check_finite(exec, x.data(), rows, cols, what);
}
}  // namespace detail

/// Throws errc::invalid_argument naming an entry in which a finite n x n Hessian is not symmetric
/// by more than rounding: |h_ij - h_ji| <= 1e-4 sqrt(h_ii h_jj). Every use of H reads one triangle.
inline void check_symmetric(const on_host& exec, const float* h, index_t n,
                            const std::string& what) {
  constexpr index_t tile = 64;
  std::vector<double> size(static_cast<std::size_t>(n));
  for (index_t j = 0; j < n; ++j) {
    size[static_cast<std::size_t>(j)] = std::sqrt(std::abs(static_cast<double>(h[j * (n + 1)])));
  }
  const index_t tiles = ceil_div(n, tile);
  std::atomic<index_t> first_bad{n * n};
  exec.parallel_for(tiles, 1, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t first = 0; first <= t * tile; first += tile) {  // the lower tiles of a row
        for (index_t i = t * tile; i < std::min(n, (t + 1) * tile); ++i) {
          for (index_t j = first; j < std::min(i, first + tile); ++j) {
            const double limit =
                1e-4 * size[static_cast<std::size_t>(i)] * size[static_cast<std::size_t>(j)];
            const auto difference =
                static_cast<double>(h[i * n + j]) - static_cast<double>(h[j * n + i]);
            if (std::abs(difference) <= limit) continue;
            index_t seen = first_bad.load();
            while (i * n + j < seen && !first_bad.compare_exchange_weak(seen, i * n + j)) {
            }
          }
        }
      }
    }
  });
  const index_t at = first_bad.load();
  if (at == n * n) return;
  const index_t i = at / n;
  const index_t j = at % n;
  fail(errc::invalid_argument, text(what, " is not symmetric: entry (", i, ", ", j, ") is ",
                                    h[i * n + j], ", but (", j, ", ", i, ") is ", h[j * n + i]));
}

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
