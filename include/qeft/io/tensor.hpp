// SPDX-License-Identifier: Apache-2.0
// A named tensor in a file: element type, shape and bytes.
#pragma once

#include <cstddef>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "qeft/core/half.hpp"
#include "qeft/core/memory.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// Element types of the safetensors format, as far as they are whole bytes.
enum class dtype : std::uint8_t {
  boolean,
  u8,
  i8,
  f8_e4m3,
  f8_e5m2,
  u16,
  i16,
  f16,
  bf16,
  u32,
  i32,
  f32,
  u64,
  i64,
  f64
};

struct dtype_traits {
  dtype type;
  const char* name;  // in the file
  index_t bytes;     // of one element
};

inline constexpr dtype_traits dtype_table[] = {
    {dtype::boolean, "BOOL", 1},    {dtype::u8, "U8", 1},           {dtype::i8, "I8", 1},
    {dtype::f8_e4m3, "F8_E4M3", 1}, {dtype::f8_e5m2, "F8_E5M2", 1}, {dtype::u16, "U16", 2},
    {dtype::i16, "I16", 2},         {dtype::f16, "F16", 2},         {dtype::bf16, "BF16", 2},
    {dtype::u32, "U32", 4},         {dtype::i32, "I32", 4},         {dtype::f32, "F32", 4},
    {dtype::u64, "U64", 8},         {dtype::i64, "I64", 8},         {dtype::f64, "F64", 8},
};

/// "F16" and so on.
constexpr const char* to_string(dtype t) noexcept {
  return dtype_table[static_cast<std::size_t>(t)].name;
}
/// Bytes of one element.
constexpr index_t size_of(dtype t) noexcept {
  return dtype_table[static_cast<std::size_t>(t)].bytes;
}
inline std::optional<dtype> dtype_from_string(std::string_view name) noexcept {
  for (const dtype_traits& t : dtype_table) {
    if (name == t.name) return t.type;
  }
  return std::nullopt;
}
constexpr dtype dtype_of(scalar_kind s) noexcept {
  return s == scalar_kind::half ? dtype::f16 : dtype::bf16;
}

/// "[576, 1536]"
inline std::string to_string(const std::vector<index_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

/// Bytes of a tensor, or nothing when a dimension is negative or the product overflows.
inline std::optional<index_t> byte_size(dtype type, const std::vector<index_t>& shape) noexcept {
  index_t bytes = size_of(type);
  for (const index_t n : shape) {
    if (n < 0 || (n != 0 && bytes > std::numeric_limits<index_t>::max() / n)) return std::nullopt;
    bytes *= n;
  }
  return bytes;
}

/// The memory of a vector, span or buffer as bytes.
template <class Container>
span<const std::byte> as_bytes(const Container& c) noexcept {
  return {reinterpret_cast<const std::byte*>(c.data()),
          static_cast<index_t>(c.size()) * static_cast<index_t>(sizeof(*c.data()))};
}

/// A tensor of an open file. The bytes are row-major, little-endian, possibly unaligned, and live
/// as long as the file object.
struct tensor_view {
  std::string name;
  dtype type = dtype::u8;
  std::vector<index_t> shape;  // empty for a scalar
  span<const std::byte> data;

  index_t elements() const noexcept { return data.size() / size_of(type); }
};

}  // namespace QEFT_TARGET
}  // namespace qeft::io
