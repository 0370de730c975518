// SPDX-License-Identifier: Apache-2.0
// Quantised linears and permutations as tensors of a checkpoint (DESIGN section 6).
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/io/errors.hpp"
#include "qeft/io/safetensors.hpp"
#include "qeft/reorder/permutation.hpp"

namespace qeft::io {

/// A quantised layer as stored, and which input columns of the original model its weak columns are.
struct stored_linear {
  quantized_matrix<layout::row_packed> matrix;
  std::vector<std::int32_t> weak_index;  // (k), original coordinates
};

namespace detail {

inline span<const std::byte> bytes_of(const std::vector<std::int32_t>& values) {
  return {reinterpret_cast<const std::byte*>(values.data()),
          static_cast<index_t>(values.size() * sizeof(std::int32_t))};
}

inline std::vector<std::int32_t> read_i32(const safetensors_reader& reader,
                                          const std::string& name, index_t count) {
  const tensor_view& t = reader.at(name, dtype::i32, {count});
  std::vector<std::int32_t> values(static_cast<std::size_t>(count));
  if (count > 0) std::memcpy(values.data(), t.data.data(), static_cast<std::size_t>(4 * count));
  return values;
}

/// The index of the first 16-bit float that is NaN or infinite, or -1.
inline index_t first_not_finite(span<const std::byte> values, scalar_kind kind) {
  const unsigned exponent = kind == scalar_kind::half ? 0x7c00U : 0x7f80U;
  for (index_t i = 0; i < values.size() / 2; ++i) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, values.data() + 2 * i, 2);
    if ((bits & exponent) == exponent) return i;
  }
  return -1;
}

}  // namespace detail

/// Adds the tensors of a layer: NAME.codes (U8, (OC, bytes per row)), NAME.scales ((OC, groups)),
/// NAME.zeros (U8 for packed integers, (OC, groups) for scaled ones, none for symmetric),
/// NAME.weak ((OC, k)), NAME.weak_index (I32, (k), `original_weak`). Parts without elements are left
/// out.
/// @param matrix        must live until the file is written
/// @param original_weak the weak columns in the coordinates of the original model, in the order of the
///                      stored ones; must live until the file is written
inline void add_linear(safetensors_writer& writer, const std::string& name,
                       const quantized_matrix<layout::row_packed>& matrix,
                       const std::vector<std::int32_t>& original_weak) {
  const matrix_descriptor& d = matrix.descriptor();
  if (static_cast<index_t>(original_weak.size()) != d.weak_columns) {
    fail(errc::invalid_argument, "add_linear: " + name + " has " +
                                     std::to_string(d.weak_columns) + " weak columns, but " +
                                     std::to_string(original_weak.size()) +
                                     " original positions");
  }
  if (d.weak == weak_kind::indexed && matrix.weak_index() != original_weak) {
    fail(errc::unsupported,
         "add_linear: " + name + " is reordered, but its weak columns are still indexed");
  }
  const dtype scalar = dtype_of(d.scalar);
  const auto add = [&](const char* part, dtype type, const std::vector<index_t>& shape,
                       span<const std::byte> bytes) {
    if (!bytes.empty()) writer.add(name + part, type, shape, bytes);
  };
  add(".codes", dtype::u8, {d.out_channels, matrix.codes().size() / d.out_channels},
      matrix.codes());
  add(".scales", scalar, {d.out_channels, d.groups()}, matrix.scales());
  if (d.zero == zero_kind::scaled) {
    add(".zeros", scalar, {d.out_channels, d.groups()}, matrix.zeros());
  } else {
    add(".zeros", dtype::u8, {matrix.zeros().size()}, matrix.zeros());
  }
  add(".weak", scalar, {d.out_channels, d.weak_columns}, matrix.weak());
  add(".weak_index", dtype::i32, {d.weak_columns}, detail::bytes_of(original_weak));
}

/// The counterpart of add_linear. Every size is checked against the descriptor, scales, zeros and weak
/// columns must be finite; else errc::corrupt_file names the tensor.
inline stored_linear read_linear(const safetensors_reader& reader, const std::string& name,
                                 const matrix_descriptor& d) {
  validate(d).throw_if_error();
  stored_linear result;
  if (d.weak_columns > 0) {
    result.weak_index = detail::read_i32(reader, name + ".weak_index", d.weak_columns);
    index_t previous = -1;
    for (const std::int32_t column : result.weak_index) {
      if (column <= previous || column >= d.in_channels) {
        fail_corrupt(reader.where(), "tensor '" + name + ".weak_index' holds " +
                                         std::to_string(column) + " after " +
                                         std::to_string(previous) +
                                         ", but must ascend and stay below " +
                                         std::to_string(d.in_channels));
      }
      previous = column;
    }
  }
  result.matrix = quantized_matrix<layout::row_packed>(
      d, d.weak == weak_kind::indexed ? result.weak_index : std::vector<std::int32_t>{});
  auto& m = result.matrix;
  const dtype scalar = dtype_of(d.scalar);
  const auto read = [&](const char* part, dtype type, const std::vector<index_t>& shape,
                        span<std::byte> into) {
    if (into.empty()) return;
    const tensor_view& t = reader.at(name + part, type, shape);
    std::memcpy(into.data(), t.data.data(), static_cast<std::size_t>(into.size()));
    if (type != scalar) return;
    const index_t bad = detail::first_not_finite(into, d.scalar);
    if (bad >= 0) {
      fail_corrupt(reader.where(), "tensor '" + name + part + "' is not finite at element " +
                                       std::to_string(bad));
    }
  };
  read(".codes", dtype::u8, {d.out_channels, m.codes().size() / d.out_channels}, m.codes());
  read(".scales", scalar, {d.out_channels, d.groups()}, m.scales());
  if (d.zero == zero_kind::scaled) {
    read(".zeros", scalar, {d.out_channels, d.groups()}, m.zeros());
  } else {
    read(".zeros", dtype::u8, {m.zeros().size()}, m.zeros());
  }
  read(".weak", scalar, {d.out_channels, d.weak_columns}, m.weak());
  return result;
}

/// Adds a permutation as I32 tensor `qeft.permutation.SPACE`. It must live until the file is written.
inline void add_permutation(safetensors_writer& writer, const std::string& space,
                            const permutation& p) {
  writer.add("qeft.permutation." + space, dtype::i32, {p.size()}, detail::bytes_of(p.source()));
}

/// Reads what add_permutation stored; the identity where there is none.
inline permutation read_permutation(const safetensors_reader& reader, const std::string& space,
                                    index_t size) {
  const std::string name = "qeft.permutation." + space;
  if (!reader.contains(name)) return permutation::identity(size);
  try {
    return permutation(detail::read_i32(reader, name, size));
  } catch (const error& e) {
    fail_corrupt(reader.where(), "tensor '" + name + "': " + e.what());
  }
}

}  // namespace qeft::io
