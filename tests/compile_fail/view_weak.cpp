// SPDX-License-Identifier: Apache-2.0
// expect: qeft::quantized_matrix_view: Weak must be weak_none, weak_tail<K>
#include "qeft/container/quantized_matrix_view.hpp"

struct own_weak : qeft::weak_none {};
using weak = std::conditional_t<VALID, qeft::weak_none, own_weak>;
auto size = sizeof(qeft::quantized_matrix_view<qeft::quant_format<4>, weak>);
