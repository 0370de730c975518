// SPDX-License-Identifier: Apache-2.0
// Storage types for 16-bit floating point, with explicit conversions and no arithmetic.
#pragma once

#include <cstring>

#include "qeft/core/config.hpp"

namespace qeft {

/// IEEE binary16, storage only.
struct half_bits {
  std::uint16_t bits;
};

/// bfloat16 (the upper half of binary32), storage only.
struct bf16_bits {
  std::uint16_t bits;
};

QEFT_HOST_DEVICE constexpr bool operator==(half_bits a, half_bits b) { return a.bits == b.bits; }
QEFT_HOST_DEVICE constexpr bool operator!=(half_bits a, half_bits b) { return a.bits != b.bits; }
QEFT_HOST_DEVICE constexpr bool operator==(bf16_bits a, bf16_bits b) { return a.bits == b.bits; }
QEFT_HOST_DEVICE constexpr bool operator!=(bf16_bits a, bf16_bits b) { return a.bits != b.bits; }

/// Run-time name of an element type.
enum class scalar_kind : std::uint8_t { half, bf16 };

inline namespace QEFT_TARGET {
namespace detail {

QEFT_HOST_DEVICE std::uint32_t float_to_bits(float x) noexcept {
  std::uint32_t u = 0;
  memcpy(&u, &x, sizeof u);
  return u;
}

QEFT_HOST_DEVICE float bits_to_float(std::uint32_t u) noexcept {
  float x = 0.0F;
  memcpy(&x, &u, sizeof x);
  return x;
}

}  // namespace detail
}  // namespace QEFT_TARGET

/// Exact, also where the processor or the compiler flushes subnormal floats to zero.
QEFT_HOST_DEVICE float to_float(half_bits h) noexcept {
#if QEFT_DEVICE_CODE
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
#else
  const std::uint32_t sign = (h.bits & 0x8000U) << 16U;
  const std::uint32_t magnitude = h.bits & 0x7fffU;
  if (magnitude >= 0x7c00U) {  // infinity, NaN: the exponent becomes all ones
    return detail::bits_to_float(sign | 0x7f800000U | ((magnitude & 0x3ffU) << 13U));
  }
  if (magnitude >= 0x400U) {  // the exponent is off by 127 - 15
    return detail::bits_to_float(sign | ((magnitude << 13U) + (112U << 23U)));
  }
  // Subnormal: magnitude * 2^-24, from an integer, so that no float is subnormal.
  const float value =
      static_cast<float>(static_cast<std::int32_t>(magnitude)) * detail::bits_to_float(0x33800000U);
  return detail::bits_to_float(sign | detail::float_to_bits(value));
#endif
}

/// Exact.
QEFT_HOST_DEVICE float to_float(bf16_bits h) noexcept {
  return detail::bits_to_float(static_cast<std::uint32_t>(h.bits) << 16U);
}

/// Exact; lets generic code read activations of any element type.
QEFT_HOST_DEVICE constexpr float to_float(float x) noexcept { return x; }

/// Rounds to nearest even; overflow gives infinity, NaN stays NaN.
template <class T>
QEFT_HOST_DEVICE T from_float(float x) noexcept;

template <>
QEFT_HOST_DEVICE float from_float<float>(float x) noexcept {
  return x;
}

template <>
QEFT_HOST_DEVICE half_bits from_float<half_bits>(float x) noexcept {
#if QEFT_DEVICE_CODE
  half_bits h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
#else
  const std::uint32_t u = detail::float_to_bits(x);
  const std::uint32_t sign = (u >> 16U) & 0x8000U;
  std::uint32_t a = u & 0x7fffffffU;
  if (a > 0x7f800000U) return {static_cast<std::uint16_t>(sign | 0x7e00U)};
  if (a >= 0x47800000U) return {static_cast<std::uint16_t>(sign | 0x7c00U)};  // >= 65536
  if (a < 0x38800000U) {
    // Below 2^-14 the result is subnormal, in units of 2^-24: what is shifted out is rounded off.
    if (a < 0x33000000U) return {static_cast<std::uint16_t>(sign)};  // less than half a unit
    const std::uint32_t mantissa = (a & 0x7fffffU) | 0x800000U;
    const std::uint32_t shift = 126U - (a >> 23U);  // 14 to 24
    const std::uint32_t quotient = mantissa >> shift;
    const std::uint32_t half = 1U << (shift - 1U);
    const std::uint32_t rest = mantissa & (2U * half - 1U);
    const bool up = rest > half || (rest == half && (quotient & 1U) != 0);
    return {static_cast<std::uint16_t>(sign | (quotient + (up ? 1U : 0U)))};
  }
  a += 0xfffU + ((a >> 13U) & 1U);  // round to nearest even at bit 13
  return {static_cast<std::uint16_t>(sign | ((a >> 13U) - (112U << 10U)))};
#endif
}

template <>
QEFT_HOST_DEVICE bf16_bits from_float<bf16_bits>(float x) noexcept {
  const std::uint32_t u = detail::float_to_bits(x);
  if ((u & 0x7fffffffU) > 0x7f800000U) {
    return {static_cast<std::uint16_t>((u >> 16U) | 0x40U)};
  }
  return {static_cast<std::uint16_t>((u + 0x7fffU + ((u >> 16U) & 1U)) >> 16U)};
}

template <class T>
struct scalar_kind_of;
template <>
struct scalar_kind_of<half_bits> {
  static constexpr scalar_kind value = scalar_kind::half;
};
template <>
struct scalar_kind_of<bf16_bits> {
  static constexpr scalar_kind value = scalar_kind::bf16;
};

}  // namespace qeft
