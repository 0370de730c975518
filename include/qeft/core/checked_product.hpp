// SPDX-License-Identifier: Apache-2.0
// Products of sizes that users give.
#pragma once

#include <limits>

#include "qeft/core/config.hpp"
#include "qeft/core/status.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

/// a * b, or an error naming `what` when a factor is negative or the product overflows.
inline index_t checked_product(index_t a, index_t b, const char* what) {
  if (a < 0 || b < 0 || (a != 0 && b > std::numeric_limits<index_t>::max() / a)) {
    fail(errc::invalid_argument,
         text(what, ": ", a, " x ", b, " is negative or overflows 64 bits"));
  }
  return a * b;
}

}  // namespace QEFT_TARGET
}  // namespace qeft
