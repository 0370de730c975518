// SPDX-License-Identifier: Apache-2.0
// Kernels as machine code of the architectures that matter, those of most layers: none may spill
// registers.
#include "qeft/qeft.cuh"

namespace qeft::kernel {

using bf16_format = quant_format<4, dynamic, zero_kind::integer, bf16_bits>;

template <class Format>
using layer = quantized_matrix_view<Format, weak_tail<>, layout::fragment, device_memory>;

template <class Format, int Layers>
using products = product_layers<Layers, product_args<layer<Format>, half_bits, epilogue::none>>;

#define QEFT_FEW(format, row_tiles, token_tiles, group, layers)                                \
  template __global__ void                                                                     \
  few_tokens<row_tiles, token_tiles, group, layers, layer<format>, half_bits, epilogue::none>( \
      const __grid_constant__ products<format, layers>);
#define QEFT_KERNEL(format, row_tiles, token_tiles, group) \
  QEFT_FEW(format, row_tiles, token_tiles, group, 1)
#define QEFT_LAYERS(format, token_tiles, group) QEFT_FEW(format, 2, token_tiles, group, most_layers)
#define QEFT_MANY(format, token_warps, group, layers)                                \
  template __global__ void                                                           \
  many_tokens<token_warps, group, layers, layer<format>, half_bits, epilogue::none>( \
      const __grid_constant__ products<format, layers>);
#define QEFT_KERNELS(format, group) \
  QEFT_MANY(format, 1, group, 1)    \
  QEFT_MANY(format, 2, group, 1)    \
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
QEFT_MANY(quant_format<4>, 1, tuning::chunk_columns, most_layers)
QEFT_MANY(quant_format<4>, 2, tuning::chunk_columns, most_layers)

}  // namespace qeft::kernel
