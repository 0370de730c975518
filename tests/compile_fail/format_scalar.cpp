// SPDX-License-Identifier: Apache-2.0
// expect: qeft::quant_format: Scalar must be qeft::half_bits or qeft::bf16_bits
#include "qeft/format/quant_format.hpp"

using scalar = std::conditional_t<VALID, qeft::bf16_bits, float>;
qeft::quant_format<4, 64, qeft::zero_kind::integer, scalar> format;
