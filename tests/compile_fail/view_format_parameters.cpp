// SPDX-License-Identifier: Apache-2.0
// expect: qeft::quant_format: Bits must be 2, 3, 4 or 8
#include "qeft/container/quantized_matrix_view.hpp"

// No format object exists here: the view must make its format check itself.
auto size = sizeof(qeft::quantized_matrix_view<qeft::quant_format<VALID ? 4 : 6>>);
