// SPDX-License-Identifier: Apache-2.0
// expect: qeft: products on a stream need activations of the layer's scalar type
#include "qeft/qeft.cuh"

using activation = std::conditional_t<VALID, qeft::half_bits, float>;
using view = qeft::quantized_matrix_view<qeft::quant_format<4>, qeft::weak_none,
                                         qeft::layout::fragment, qeft::device_memory>;
qeft::index_t bytes(const view& w, const activation* x) {
  return workspace_bytes(qeft::on_stream{}, w, x, 1);
}
