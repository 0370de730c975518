// SPDX-License-Identifier: Apache-2.0
// Integer helpers for sizes.
#pragma once

#include "qeft/core/config.hpp"

namespace qeft {

/// ceil(a / b) for a >= 0, b > 0.
QEFT_HOST_DEVICE constexpr index_t ceil_div(index_t a, index_t b) noexcept {
  return a / b + (a % b != 0 ? 1 : 0);
}

/// The smallest multiple of b that is not below a, for a >= 0, b > 0.
QEFT_HOST_DEVICE constexpr index_t round_up(index_t a, index_t b) noexcept {
  return ceil_div(a, b) * b;
}

}  // namespace qeft
