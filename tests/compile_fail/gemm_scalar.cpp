// SPDX-License-Identifier: Apache-2.0
// expect: qeft::gemm: X and Y must be float, qeft::half_bits or qeft::bf16_bits
#include "qeft/cpu/matmul.hpp"

using view = qeft::quantized_matrix_view<qeft::quant_format<4>, qeft::weak_none,
                                         qeft::layout::simd_tile>;
using scalar = std::conditional_t<VALID, float, double>;
qeft::status product(const view& w, const scalar* x, float* y) {
  return qeft::gemm(qeft::on_host(), w, x, 1, y);
}
