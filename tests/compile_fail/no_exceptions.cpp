// SPDX-License-Identifier: Apache-2.0
// expect: qeft: this header throws
// always: -fno-exceptions
#if VALID
#include "qeft/container/quantized_matrix_view.hpp"
#else
#include "qeft/container/quantized_matrix.hpp"
#endif
