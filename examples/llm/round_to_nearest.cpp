// SPDX-License-Identifier: Apache-2.0
#include "round_to_nearest.hpp"

#include <utility>

#include "qeft/solver/quantize_layer.hpp"

namespace qeft_llm {

packed_matrix round_to_nearest(const qeft::on_host& exec, const packed_matrix& weight, int bits,
                               qeft::index_t group_size) {
  const qeft::matrix_descriptor& d = weight.descriptor();
  qeft::solver::layer_options o;
  o.method = qeft::solver::layer_method::rtn;
  o.bits = bits;
  o.group_size = group_size;
  o.scalar = d.scalar;
  o.search.method = qeft::solver::search_method::minmax;
  o.measure_error = false;
  const std::vector<float> values = values_of(weight);
  return std::move(
      qeft::solver::quantize_layer(exec, values, d.out_channels, d.in_channels, {}, o).matrix);
}

}  // namespace qeft_llm
