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

/// Exact.
QEFT_HOST_DEVICE float to_float(half_bits h) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(h.bits & 0x8000U) << 16U;
  const std::uint32_t magnitude = h.bits & 0x7fffU;
  if (magnitude >= 0x7c00U) {  // infinity, NaN: the exponent becomes all ones
    return detail::bits_to_float(sign | 0x7f800000U | ((magnitude & 0x3ffU) << 13U));
  }
  // The exponent is off by 127 - 15; the multiplication corrects it and normalises subnormals.
  const float scaled = detail::bits_to_float(magnitude << 13U) * detail::bits_to_float(0x77800000U);
  return detail::bits_to_float(sign | detail::float_to_bits(scaled));
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
  const std::uint32_t u = detail::float_to_bits(x);
  const std::uint32_t sign = (u >> 16U) & 0x8000U;
  std::uint32_t a = u & 0x7fffffffU;
  if (a > 0x7f800000U) return {static_cast<std::uint16_t>(sign | 0x7e00U)};
  if (a >= 0x47800000U) return {static_cast<std::uint16_t>(sign | 0x7c00U)};  // >= 65536
  if (a < 0x38800000U) {
    // Below 2^-14 the result is subnormal: adding 0.5 leaves the rounded mantissa in the low bits,
    // because one unit in the last place of numbers near 0.5 is 2^-24, that of a subnormal half.
    const float shifted = detail::bits_to_float(a) + 0.5F;
    return {static_cast<std::uint16_t>(sign | (detail::float_to_bits(shifted) - 0x3f000000U))};
  }
  a += 0xfffU + ((a >> 13U) & 1U);  // round to nearest even at bit 13
  return {static_cast<std::uint16_t>(sign | ((a >> 13U) - (112U << 10U)))};
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
