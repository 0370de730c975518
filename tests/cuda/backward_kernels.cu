// SPDX-License-Identifier: Apache-2.0
// Kernels of gradients as machine code of the architectures that matter: none may spill registers.
#include "qeft/qeft.cuh"

namespace qeft::kernel {

using bf16_format = quant_format<4, dynamic, zero_kind::integer, bf16_bits>;

template <class Format>
using layer = quantized_matrix_view<Format, weak_tail<>, layout::fragment, device_memory>;

#define QEFT_KERNEL(format, one_group)                                                  \
  template __global__ void input_gradient<one_group, layer<format>, half_bits>(         \
      const __grid_constant__ input_gradient_args<layer<format>, half_bits> args);      \
  template __global__ void input_gradient_by_runs<one_group, layer<format>, half_bits>( \
      const __grid_constant__ input_gradient_args<layer<format>, half_bits> args);

QEFT_KERNEL(quant_format<4>, true)
QEFT_KERNEL(quant_format<4>, false)
QEFT_KERNEL(quant_format<3>, true)
QEFT_KERNEL(quant_format<3>, false)
QEFT_KERNEL(quant_format<8>, true)
QEFT_KERNEL(bf16_format, true)

template __global__ void weak_gradient<half_bits>(
    const __grid_constant__ weak_gradient_args<half_bits> args);
template __global__ void weak_gradient<bf16_bits>(
    const __grid_constant__ weak_gradient_args<bf16_bits> args);

}  // namespace qeft::kernel
