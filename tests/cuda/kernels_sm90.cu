// SPDX-License-Identifier: Apache-2.0
// Kernels for compute capability 9.0 alone as machine code, those of most layers: none may spill
// registers.
#include "qeft/kernel/many_tokens_sm90.cuh"

namespace qeft::kernel {

using bf16_format = quant_format<4, dynamic, zero_kind::integer, bf16_bits>;
using scaled_format = quant_format<4, dynamic, zero_kind::scaled>;

template <class Format>
using layer = quantized_matrix_view<Format, weak_tail<>, layout::fragment, device_memory>;

template <class Format, int Layers>
using products =
    product_layers<Layers, many_tokens_sm90_product<layer<Format>, half_bits, epilogue::none>>;

#define QEFT_LAYERS(format, tokens, group, layers)                                   \
  template __global__ void                                                           \
  many_tokens_sm90<tokens, group, layers, layer<format>, half_bits, epilogue::none>( \
      const __grid_constant__ products<format, layers>);
#define QEFT_KERNEL(format, tokens, group) QEFT_LAYERS(format, tokens, group, 1)

QEFT_KERNEL(quant_format<4>, 64, 128)
QEFT_KERNEL(quant_format<4>, 128, 128)
QEFT_KERNEL(quant_format<4>, 128, dynamic)
QEFT_KERNEL(quant_format<4>, 128, tuning::chunk_columns)
QEFT_KERNEL(quant_format<3>, 128, 128)
QEFT_KERNEL(quant_format<8>, 128, 128)
QEFT_KERNEL(bf16_format, 128, 128)
QEFT_KERNEL(scaled_format, 64, 128)
QEFT_LAYERS(quant_format<4>, 64, tuning::chunk_columns, most_layers)
QEFT_LAYERS(quant_format<4>, 128, tuning::chunk_columns, most_layers)

}  // namespace qeft::kernel
