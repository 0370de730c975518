// SPDX-License-Identifier: Apache-2.0
// Integer helpers for sizes.
#pragma once

#include <limits>

#include "qeft/core/config.hpp"
#include "qeft/core/status.hpp"

namespace qeft {

/// ceil(a / b) for a >= 0, b > 0.
QEFT_HOST_DEVICE constexpr index_t ceil_div(index_t a, index_t b) noexcept {
  return a / b + (a % b != 0 ? 1 : 0);
}

/// The smallest multiple of b that is not below a, for a >= 0, b > 0.
QEFT_HOST_DEVICE constexpr index_t round_up(index_t a, index_t b) noexcept {
  return ceil_div(a, b) * b;
}

/// a * b, or an error naming `what` when a factor is negative or the product overflows.
inline index_t checked_product(index_t a, index_t b, const char* what) {
  if (a < 0 || b < 0 || (a != 0 && b > std::numeric_limits<index_t>::max() / a)) {
    fail(errc::invalid_argument, std::string(what) + ": " + std::to_string(a) + " x " +
                                     std::to_string(b) + " is negative or overflows 64 bits");
  }
  return a * b;
}

}  // namespace qeft
