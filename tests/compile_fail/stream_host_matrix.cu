// SPDX-License-Identifier: Apache-2.0
// expect: qeft: products on a stream need a matrix in device memory
#include "qeft/qeft.cuh"

using memory = std::conditional_t<VALID, qeft::device_memory, qeft::host_memory>;
using view = qeft::quantized_matrix_view<qeft::quant_format<4>, qeft::weak_none,
                                         qeft::layout::fragment, memory>;
qeft::index_t bytes(const view& w, const qeft::half_bits* x) {
  return workspace_bytes(qeft::on_stream{}, w, x, 1);
}
