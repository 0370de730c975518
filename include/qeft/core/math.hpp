// SPDX-License-Identifier: Apache-2.0
// Integer helpers for sizes.
#pragma once

#include "qeft/core/config.hpp"

namespace qeft {

/// ceil(a / b) for a >= 0, b > 0.
QEFT_HOST_DEVICE constexpr index_t ceil_div(index_t a, index_t b) noexcept {
  return a / b + (a % b != 0 ? 1 : 0);
}

/// a / b for a in [0, 2^31) and b in [1, 2^31), in 32 bits: dividing 64-bit numbers takes a GPU,
/// and many a CPU, several times as long.
QEFT_HOST_DEVICE constexpr index_t quotient(index_t a, index_t b) noexcept {
  return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
}

/// ceil(a / b) in the same way, for a + b <= 2^31.
QEFT_HOST_DEVICE constexpr int ceil_quotient(index_t a, index_t b) noexcept {
  const auto divisor = static_cast<std::uint32_t>(b);
  return static_cast<int>((static_cast<std::uint32_t>(a) + divisor - 1U) / divisor);
}

/// The smallest multiple of b that is not below a, for a >= 0, b > 0.
QEFT_HOST_DEVICE constexpr index_t round_up(index_t a, index_t b) noexcept {
  return ceil_div(a, b) * b;
}

}  // namespace qeft
