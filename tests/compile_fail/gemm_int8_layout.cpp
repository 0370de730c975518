// SPDX-License-Identifier: Apache-2.0
// expect: qeft::gemm: the int8 activation policy needs layout::simd_tile
#include "qeft/cpu/matmul.hpp"

using layout = std::conditional_t<VALID, qeft::layout::simd_tile, qeft::layout::row_packed>;
using view = qeft::quantized_matrix_view<qeft::quant_format<4>, qeft::weak_none, layout>;
qeft::status product(const view& w, const float* x, float* y) {
  return qeft::gemm(qeft::cpu::with<qeft::cpu::int8>(qeft::on_host()), w, x, 1, y);
}
