// SPDX-License-Identifier: Apache-2.0
// Tensor bytes to float and back, and the check that they are numbers.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "qeft/core/half.hpp"
#include "qeft/core/status.hpp"
#include "qeft/io/tensor.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

namespace detail {

/// The i-th T of bytes of any alignment.
template <class T>
T load(const std::byte* bytes, index_t i) noexcept {
  T value;
  std::memcpy(&value, bytes + i * static_cast<index_t>(sizeof(T)), sizeof(T));
  return value;
}

template <class T>
void decode(const std::byte* in, float* out, index_t n) noexcept {
  for (index_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, double>) {
      out[i] = static_cast<float>(load<double>(in, i));
    } else {
      out[i] = to_float(load<T>(in, i));
    }
  }
}

template <class T>
void encode(const float* in, std::byte* out, index_t n) noexcept {
  for (index_t i = 0; i < n; ++i) {
    const T value = from_float<T>(in[i]);
    std::memcpy(out + i * static_cast<index_t>(sizeof(T)), &value, sizeof(T));
  }
}

}  // namespace detail

/// Flat index of the first NaN or infinity, or -1.
inline index_t find_not_finite(span<const float> values) noexcept {
  constexpr index_t block = 1024;  // the search itself does not vectorise, a block's verdict does
  for (index_t begin = 0; begin < values.size(); begin += block) {
    const index_t end = begin + block < values.size() ? begin + block : values.size();
    std::uint32_t bad = 0;
    for (index_t i = begin; i < end; ++i) {
      bad |= (qeft::detail::float_to_bits(values[i]) & 0x7f800000U) == 0x7f800000U ? 1U : 0U;
    }
    for (index_t i = begin; bad != 0 && i < end; ++i) {
      if (!std::isfinite(values[i])) return i;
    }
  }
  return -1;
}

/// Flat index of the first NaN or infinity among 16-bit floats, or -1.
inline index_t find_not_finite(span<const std::byte> values, scalar_kind kind) noexcept {
  const unsigned exponent = kind == scalar_kind::half ? 0x7c00U : 0x7f80U;
  for (index_t i = 0; i < values.size() / 2; ++i) {
    if ((detail::load<std::uint16_t>(values.data(), i) & exponent) == exponent) return i;
  }
  return -1;
}

/// Throws errc::not_finite naming the tensor and the flat index of its first NaN or infinity.
inline void require_finite(span<const float> values, const std::string& name) {
  const index_t at = find_not_finite(values);
  if (at >= 0) {
    fail(errc::not_finite, "tensor '" + name + "' holds " + std::to_string(values[at]) +
                               " at flat index " + std::to_string(at) +
                               ", but weights must be finite");
  }
}

/// The elements of an F16, BF16, F32 or F64 tensor, row-major; F64 is rounded. Throws
/// errc::unsupported for other types. NaNs pass: see require_finite.
inline std::vector<float> to_floats(const tensor_view& t) {
  std::vector<float> out(static_cast<std::size_t>(t.elements()));
  const std::byte* in = t.data.data();
  switch (t.type) {
    case dtype::f16:
      detail::decode<half_bits>(in, out.data(), t.elements());
      break;
    case dtype::bf16:
      detail::decode<bf16_bits>(in, out.data(), t.elements());
      break;
    case dtype::f32:
      detail::decode<float>(in, out.data(), t.elements());
      break;
    case dtype::f64:
      detail::decode<double>(in, out.data(), t.elements());
      break;
    default:
      fail(errc::unsupported, "tensor '" + t.name + "' is " + to_string(t.type) +
                                  ", but must be F16, BF16, F32 or F64 to be read as numbers");
  }
  return out;
}

/// The bytes of an F16, BF16 or F32 tensor with these values, rounded to nearest even. Throws
/// errc::not_finite naming `name` for values that are not finite or become infinite in that type.
inline std::vector<std::byte> to_bytes(dtype type, span<const float> values,
                                       const std::string& name) {
  require_finite(values, name);
  std::vector<std::byte> out(static_cast<std::size_t>(values.size() * size_of(type)));
  switch (type) {
    case dtype::f16:
      detail::encode<half_bits>(values.data(), out.data(), values.size());
      break;
    case dtype::bf16:
      detail::encode<bf16_bits>(values.data(), out.data(), values.size());
      break;
    case dtype::f32:
      detail::encode<float>(values.data(), out.data(), values.size());
      break;
    default:
      fail(errc::unsupported, "to_bytes: tensor '" + name + "' is to become " + to_string(type) +
                                  ", but only F16, BF16 and F32 are written from numbers");
  }
  if (type == dtype::f32) return out;
  const auto kind = type == dtype::f16 ? scalar_kind::half : scalar_kind::bf16;
  if (const index_t at = find_not_finite(out, kind); at >= 0) {
    fail(errc::not_finite, "tensor '" + name + "' holds " + std::to_string(values[at]) +
                               " at flat index " + std::to_string(at) + ", which overflows " +
                               to_string(type));
  }
  return out;
}

}  // namespace QEFT_TARGET
}  // namespace qeft::io
