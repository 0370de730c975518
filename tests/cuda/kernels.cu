// SPDX-License-Identifier: Apache-2.0
// Kernels as machine code of the architectures that matter, those of most layers: none may spill
// registers.
#include "qeft/qeft.cuh"

namespace qeft::kernel {

using bf16_format = quant_format<4, dynamic, zero_kind::integer, bf16_bits>;

template <class Format>
using layer = quantized_matrix_view<Format, weak_tail<>, layout::fragment, device_memory>;

#define QEFT_KERNEL(format, row_tiles, token_tiles, group)                             \
  template __global__ void                                                             \
  few_tokens<row_tiles, token_tiles, group, layer<format>, half_bits, epilogue::none>( \
      const __grid_constant__ product_args<layer<format>, half_bits, epilogue::none> args);
#define QEFT_LAYERS(format, token_tiles, group)                                          \
  template __global__ void                                                               \
  few_tokens_of_layers<2, token_tiles, group, layer<format>, half_bits, epilogue::none>( \
      const __grid_constant__ few_tokens_layers<layer<format>, half_bits, epilogue::none> args);
#define QEFT_MANY(format, token_warps, group)                                              \
  template __global__ void                                                                 \
  many_tokens<token_warps, group, layer<format>, half_bits, epilogue::none>(               \
      const __grid_constant__ product_args<layer<format>, half_bits, epilogue::none> args, \
      float* part_sums);
#define QEFT_KERNELS(format, group) \
  QEFT_MANY(format, 1, group)       \
  QEFT_MANY(format, 2, group)       \
  QEFT_KERNEL(format, 1, 1, group)  \
  QEFT_KERNEL(format, 2, 1, group)  \
  QEFT_KERNEL(format, 1, 2, group)  \
  QEFT_KERNEL(format, 2, 2, group)

QEFT_KERNELS(quant_format<4>, 128)
QEFT_KERNELS(quant_format<3>, 128)
QEFT_KERNELS(quant_format<4>, dynamic)
QEFT_KERNELS(quant_format<4>, tuning::chunk_columns)
QEFT_KERNELS(bf16_format, 128)
QEFT_LAYERS(quant_format<4>, 1, 128)
QEFT_LAYERS(quant_format<4>, 2, 128)

}  // namespace qeft::kernel
