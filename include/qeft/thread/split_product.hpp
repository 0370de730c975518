// SPDX-License-Identifier: Apache-2.0
// Products of 16-bit floats without an error: what gradients and scales need, where scales vary
// along the sum.
#pragma once

#include "qeft/thread/unpack.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

/// a b in each half of a word as the sum of two 16-bit floats. Exact unless it is so small that its
/// last bit, or so large that its first one, is none of Scalar's.
struct split_pair {
  std::uint32_t high;
  std::uint32_t low;
};
template <class Scalar>
QEFT_HOST_DEVICE split_pair split_product(std::uint32_t a, std::uint32_t b) noexcept {
  split_pair p{};
#if QEFT_DEVICE_CODE
  if constexpr (std::is_same_v<Scalar, half_bits>) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(p.high) : "r"(a), "r"(b));
    asm("{ .reg .b32 n; neg.f16x2 n, %3; fma.rn.f16x2 %0, %1, %2, n; }"
        : "=r"(p.low)
        : "r"(a), "r"(b), "r"(p.high));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(p.high) : "r"(a), "r"(b), "r"(0x80008000U));
    asm("{ .reg .b32 n; neg.bf16x2 n, %3; fma.rn.bf16x2 %0, %1, %2, n; }"
        : "=r"(p.low)
        : "r"(a), "r"(b), "r"(p.high));
  }
#else
  p.high = detail::fma_halves<Scalar>(a, b, 0x80008000U);
  p.low = detail::fma_halves<Scalar>(a, b, p.high ^ 0x80008000U);
#endif
  return p;
}

/// Whether numbers are brought into the middle of Scalar's range before they are multiplied.
template <class Scalar>
inline constexpr bool needs_factors = std::is_same_v<Scalar, half_bits>;

/// Binades of the largest gradient of a token and of the largest scale of a group: all products lie
/// below 2^15, and as many bits as can be above 2^-24. Gradients are never made smaller, so that
/// none loses a bit.
inline constexpr int gradient_exponent = 15;
inline constexpr int scale_exponent = -2;

/// The power of two, at most 2^most, that brings a positive number closest to or into
/// [2^exponent, 2^(exponent + 1)); 1 for 0, infinity and NaN.
QEFT_HOST_DEVICE float factor_to(int exponent, int most, float x) noexcept {
  const int of_x = static_cast<int>(detail::float_to_bits(x) >> 23U);
  if (of_x == 0 || of_x == 255) return 1.0F;
  const int power = exponent + 127 - of_x;
  return detail::bits_to_float(static_cast<std::uint32_t>(127 + (power < most ? power : most))
                               << 23U);
}

}  // namespace QEFT_TARGET
}  // namespace qeft
