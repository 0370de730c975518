// SPDX-License-Identifier: Apache-2.0
// Half conversions against the definition of the formats, in double arithmetic.
#include "qeft/core/half.hpp"

#include <cmath>
#include <limits>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "support/catch.hpp"

namespace {

using qeft::bf16_bits;
using qeft::half_bits;

struct format {
  int mantissa_bits;
  int min_exponent;  // of the smallest normal number
  int max_exponent;  // of the largest finite number
};
template <class T>
constexpr format format_of = {10, -14, 15};
template <>
constexpr format format_of<bf16_bits> = {7, -126, 127};

/// The value of a bit pattern by the definition of IEEE 754 interchange formats.
template <class T>
double value_of(std::uint16_t bits) {
  constexpr format f = format_of<T>;
  const int exponent_field = (bits & 0x7fff) >> f.mantissa_bits;
  const int mantissa = bits & ((1 << f.mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent_field == f.max_exponent + 1 - f.min_exponent + 1) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent_field == 0) return sign * std::ldexp(mantissa, f.min_exponent - f.mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << f.mantissa_bits),
                           exponent_field - 1 + f.min_exponent - f.mantissa_bits);
}

/// x rounded to nearest even on the grid of the format, with overflow to infinity.
template <class T>
double rounded(double x) {
  constexpr format f = format_of<T>;
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), f.min_exponent);
  const double quantum = std::ldexp(1.0, exponent - f.mantissa_bits);
  const double r = std::nearbyint(x / quantum) * quantum;
  if (std::fabs(r) >= std::ldexp(1.0, f.max_exponent + 1)) {
    return std::copysign(std::numeric_limits<double>::infinity(), x);
  }
  return r;
}

template <class T>
bool converts_as_defined(float x) {
  const T got = qeft::from_float<T>(x);
  const double want = rounded<T>(x);
  if (std::isnan(want)) return std::isnan(value_of<T>(got.bits));
  return value_of<T>(got.bits) == want && std::signbit(x) == ((got.bits & 0x8000) != 0);
}

template <class T>
void check_to_float() {
  int mismatches = 0;
  for (unsigned bits = 0; bits < 0x10000U; ++bits) {
    const auto h = static_cast<std::uint16_t>(bits);
    const double want = value_of<T>(h);
    const float got = qeft::to_float(T{h});
    const bool same = std::isnan(want) ? std::isnan(got)
                                       : got == want && std::signbit(got) == ((h & 0x8000) != 0);
    mismatches += same ? 0 : 1;
  }
  CHECK(mismatches == 0);
}

template <class T>
void check_round_trip_and_ties() {
  int mismatches = 0;
  for (unsigned bits = 0; bits < 0x10000U; ++bits) {
    const float x = qeft::to_float(T{static_cast<std::uint16_t>(bits)});
    if (std::isnan(x)) {
      mismatches += std::isnan(qeft::to_float(qeft::from_float<T>(x))) ? 0 : 1;
      continue;
    }
    mismatches += qeft::from_float<T>(x).bits == bits ? 0 : 1;
    const float next = qeft::to_float(T{static_cast<std::uint16_t>(bits + 1)});
    if (!std::isfinite(x) || !std::isfinite(next)) continue;
    const float middle = x + (next - x) / 2;  // exact: one more bit than the format has
    for (const float y : {middle, std::nextafter(middle, x), std::nextafter(middle, next)}) {
      mismatches += converts_as_defined<T>(y) ? 0 : 1;
    }
  }
  CHECK(mismatches == 0);
}

template <class T>
void check_all_floats() {
  int mismatches = 0;
  for (std::uint32_t field = 90; field < 114; ++field) {  // around the subnormal halves
    for (std::uint32_t bit = 0; bit < 24; ++bit) {
      for (const std::uint32_t offset : {0xffffffffU, 0U, 1U}) {
        const float x = qeft::detail::bits_to_float((field << 23U) + (1U << bit) + offset);
        mismatches += converts_as_defined<T>(x) ? 0 : 1;
      }
    }
  }
  constexpr std::uint32_t stride = 1009;  // prime: visits every exponent and many mantissas
  for (std::uint64_t u = 0; u <= 0xffffffffU; u += stride) {
    const float x = qeft::detail::bits_to_float(static_cast<std::uint32_t>(u));
    mismatches += converts_as_defined<T>(x) ? 0 : 1;
  }
  CHECK(mismatches == 0);
}

/// The bits of every conversion to float, and of the conversions from every float that lies beside
/// or between two halves.
std::vector<std::uint32_t> all_conversions() {
  std::vector<std::uint32_t> bits;
  for (std::uint32_t h = 0; h < 0x10000U; ++h) {
    const auto b = static_cast<std::uint16_t>(h);
    bits.push_back(qeft::detail::float_to_bits(qeft::to_float(half_bits{b})));
    bits.push_back(qeft::detail::float_to_bits(qeft::to_float(bf16_bits{b})));
  }
  for (std::uint32_t u = 0; u < 0xfffff000U; u += 0x1000U) {  // half of a half's last place
    for (const std::uint32_t offset : {0U, 1U, 0xfffU}) {
      bits.push_back(qeft::from_float<half_bits>(qeft::detail::bits_to_float(u + offset)).bits);
    }
  }
  for (std::uint32_t field = 90; field < 114; ++field) {  // around the subnormal halves
    for (std::uint32_t bit = 0; bit < 24; ++bit) {
      for (const std::uint32_t offset : {0xffffffffU, 0U, 1U}) {
        const std::uint32_t u = (field << 23U) + (1U << bit) + offset;
        bits.push_back(qeft::from_float<half_bits>(qeft::detail::bits_to_float(u)).bits);
      }
    }
  }
  for (std::uint32_t u = 0; u < 0xffff0000U; u += 0x8000U) {
    for (const std::uint32_t offset : {0U, 1U, 0x7fffU}) {
      bits.push_back(qeft::from_float<bf16_bits>(qeft::detail::bits_to_float(u + offset)).bits);
    }
  }
  return bits;
}

}  // namespace

TEST_CASE("to_float is exact for all bit patterns") {
  check_to_float<half_bits>();
  check_to_float<bf16_bits>();
}

TEST_CASE("from_float inverts to_float and rounds ties to even") {
  check_round_trip_and_ties<half_bits>();
  check_round_trip_and_ties<bf16_bits>();
}

TEST_CASE("from_float rounds floats of every magnitude as defined") {
  check_all_floats<half_bits>();
  check_all_floats<bf16_bits>();
}

TEST_CASE("from_float at the edges of the range") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  CHECK(qeft::from_float<half_bits>(65504.0F).bits == 0x7bff);
  CHECK(qeft::from_float<half_bits>(65519.99F).bits == 0x7bff);
  CHECK(qeft::from_float<half_bits>(65520.0F).bits == 0x7c00);
  CHECK(qeft::from_float<half_bits>(-infinity).bits == 0xfc00);
  CHECK(qeft::from_float<half_bits>(0x1p-25F).bits == 0);  // a tie, to even
  CHECK(qeft::from_float<half_bits>(0x1.000002p-25F).bits == 1);
  CHECK(qeft::from_float<bf16_bits>(std::numeric_limits<float>::max()).bits == 0x7f80);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(qeft::to_float(qeft::from_float<half_bits>(nan))));
  // A NaN whose payload lies in the truncated bits only.
  CHECK(std::isnan(
      qeft::to_float(qeft::from_float<bf16_bits>(qeft::detail::bits_to_float(0x7f800001U)))));
  CHECK(qeft::from_float<float>(1.5F) == 1.5F);
}

TEST_CASE("halves compare by bits") {
  CHECK(half_bits{1} == half_bits{1});
  CHECK(half_bits{1} != half_bits{2});
  CHECK(bf16_bits{3} == bf16_bits{3});
  CHECK(bf16_bits{3} != bf16_bits{4});
}

#if defined(__SSE__)

TEST_CASE("conversions do not depend on the treatment of subnormal floats") {
  const auto expected = all_conversions();
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040U);  // flush to zero, denormals are zero
  volatile float smallest = 0x1p-149F;
  // Stored before the mode changes back: a compiler may move arithmetic across that otherwise.
  const volatile float product = smallest * 0x1p+20F;
  const auto flushed = all_conversions();
  _mm_setcsr(mode);
  CHECK(product == 0.0F);
  CHECK((flushed == expected));
}

#endif
