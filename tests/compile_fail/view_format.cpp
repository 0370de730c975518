// SPDX-License-Identifier: Apache-2.0
// expect: qeft::quantized_matrix_view: Format must be a qeft::quant_format<...>
#include "qeft/container/quantized_matrix_view.hpp"

// Naming the type must be enough: nothing of the view is used. (A class that looks like a format.)
struct own_format : qeft::quant_format<4> {};
using format = std::conditional_t<VALID, qeft::quant_format<4>, own_format>;
auto size = sizeof(qeft::quantized_matrix_view<format>);
