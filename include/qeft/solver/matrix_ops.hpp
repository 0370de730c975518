// SPDX-License-Identifier: Apache-2.0
// What the solver needs of dense linear algebra. Products are Eigen's, one call per tile: a tile's
// size never depends on the number of threads, so neither do its sums. (Compiled with OpenMP, Eigen
// would start threads of its own inside ours: call Eigen::setNbThreads(1) there.)
#pragma once

#include <Eigen/Core>
#include <atomic>
#include <cmath>
#include <string>

#include "qeft/core/memory.hpp"
#include "qeft/core/on_host.hpp"

namespace qeft::solver {

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
  fail(errc::not_finite, what + ": row " + std::to_string(i / cols) + ", column " +
                             std::to_string(i % cols) + " is " + std::to_string(x[i]) +
                             ", but must be finite");
}

}  // namespace qeft::solver
