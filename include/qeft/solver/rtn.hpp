// SPDX-License-Identifier: Apache-2.0
// Round to nearest (METHOD section 3, step 5): min-max or searched group parameters, no
// compensation.
#pragma once

#include <vector>

#include "qeft/core/on_host.hpp"
#include "qeft/solver/layer.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {
namespace detail {

/// Quantises every row of w (OC, IC) on its own into `builder`.
inline void solve_rtn(const on_host& exec, const float* w, index_t in_channels,
                      const layer_options& options, layer_builder& builder) {
  const layout::extent e = builder.extent();
  const index_t group_size = builder.group_size();
  exec.parallel_for(e.out_channels, 8, [&](index_t begin, index_t end) {
    std::vector<float> dense(static_cast<std::size_t>(e.dense));
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(e.dense));
    for (index_t n = begin; n < end; ++n) {
      const float* row = w + n * in_channels;
      for (std::size_t i = 0; i < dense.size(); ++i) dense[i] = row[builder.dense_columns()[i]];
      for (index_t g = 0; g < e.groups; ++g) {
        const index_t first = g * group_size;
        const index_t last = std::min(first + group_size, e.dense);
        const group_quantizer q =
            builder.find_params(n, g, {dense.data() + first, last - first}, options.search);
        for (auto i = static_cast<std::size_t>(first); i < static_cast<std::size_t>(last); ++i) {
          codes[i] = q.code(q.level(dense[i]));
        }
      }
      builder.set_codes(n, codes.data());
      for (index_t j = 0; j < e.weak; ++j) {
        builder.set_weak(n, j, row[builder.weak_columns()[j]]);
      }
    }
  });
}

}  // namespace detail
}  // namespace QEFT_TARGET
}  // namespace qeft::solver
