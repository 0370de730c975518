// SPDX-License-Identifier: Apache-2.0
// Clipping of gradients by their global norm (METHOD section 6).
#pragma once

#include <cmath>

#include "qeft/core/host_buffer.hpp"
#include "qeft/core/math.hpp"
#include "qeft/core/memory.hpp"
#include "qeft/core/on_host.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace detail {

inline constexpr index_t norm_tile = 4096;

/// Of the sums of squares of the tiles of one array, added in their order.
inline double sum_of_squares(const on_host& exec, span<const float> x) {
  const index_t tiles = ceil_div(x.size(), norm_tile);
  host_buffer<double> sums(static_cast<std::size_t>(tiles));
  exec.parallel_for(tiles, 1, [&](index_t begin, index_t end) {
    for (index_t tile = begin; tile < end; ++tile) {
      const index_t first = tile * norm_tile;
      const index_t last = first + norm_tile < x.size() ? first + norm_tile : x.size();
      double sum = 0;
      for (index_t i = first; i < last; ++i) {
        const auto value = static_cast<double>(x[i]);
        sum += value * value;
      }
      sums[static_cast<std::size_t>(tile)] = sum;
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace detail

/// The Euclidean norm of all elements of several arrays together, in double; NaN or infinity when
/// an element is. @param arrays a container of spans, or of what converts to one
template <class Arrays>
double global_norm(const on_host& exec, const Arrays& arrays) {
  double total = 0;
  for (const auto& array : arrays) total += detail::sum_of_squares(exec, array);
  return std::sqrt(total);
}

/// What a gradient of this norm is multiplied by so that its norm is at most `limit`.
/// @param limit 0 for none
QEFT_HOST_DEVICE double clip_factor(double norm, double limit) noexcept {
  return limit > 0 && norm > limit ? limit / norm : 1.0;
}

}  // namespace QEFT_TARGET
}  // namespace qeft
