// SPDX-License-Identifier: Apache-2.0
// expect: qeft::gemm: this nvcc does not take the vector kernels
#define QEFT_NO_NATIVE_ISA 1  // what config.hpp finds out about an older nvcc
#include "qeft/cpu/matmul.hpp"

using isa = std::conditional_t<VALID, qeft::cpu::isa::portable, qeft::cpu::native_isa>;
using view =
    qeft::quantized_matrix_view<qeft::quant_format<4>, qeft::weak_none, qeft::layout::simd_tile>;
qeft::status product(const view& w, const float* x, float* y) {
  return qeft::gemm(qeft::cpu::with<qeft::cpu::exact, isa>(qeft::on_host()), w, x, 1, y);
}
