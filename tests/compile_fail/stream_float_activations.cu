// SPDX-License-Identifier: Apache-2.0
// expect: qeft: products on a stream need qeft::half_bits or qeft::bf16_bits activations
#include "qeft/qeft.cuh"

using activation = std::conditional_t<VALID, qeft::half_bits, float>;
using matrix = qeft::quantized_matrix<qeft::layout::fragment, qeft::device_memory>;
qeft::index_t bytes(const matrix& w, const activation* x) {
  return workspace_bytes(qeft::on_stream{}, w, x, 1);
}
