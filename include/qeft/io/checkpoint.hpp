// SPDX-License-Identifier: Apache-2.0
// Quantised linears and permutations as tensors of a checkpoint (DESIGN section 6).
#pragma once

#include <array>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/io/errors.hpp"
#include "qeft/io/quantization_config.hpp"
#include "qeft/io/safetensors.hpp"
#include "qeft/reorder/permutation.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// A quantised layer as stored, and which input columns of the original model its weak columns are.
/// The two differ in a reordered layer, whose weak columns sit at the tail of the matrix.
struct stored_linear {
  quantized_matrix<layout::row_packed> matrix;
  std::vector<std::int32_t> weak_index;  // (k), original coordinates, ascending
};

/// Adds 32-bit integers, which the writer copies.
inline void add_i32(safetensors_writer& writer, const std::string& name,
                    const std::vector<std::int32_t>& values) {
  const span<const std::byte> bytes = as_bytes(values);
  writer.add(name, dtype::i32, {static_cast<index_t>(values.size())},
             std::vector<std::byte>(bytes.begin(), bytes.end()));
}

/// Reads `count` 32-bit integers. Throws errc::corrupt_file for another type or shape.
inline std::vector<std::int32_t> read_i32(const safetensors_reader& reader, const std::string& name,
                                          index_t count) {
  const tensor_view& t = reader.at(name, dtype::i32, {count});
  std::vector<std::int32_t> values(static_cast<std::size_t>(count));
  if (count > 0) std::memcpy(values.data(), t.data.data(), static_cast<std::size_t>(t.data.size()));
  return values;
}

namespace detail {

/// What the descriptor says about a tensor of a layer.
struct linear_part {
  const char* suffix;
  dtype type;
  std::vector<index_t> shape;
  index_t bytes;
};

/// Codes, scales, zeros and weak columns, in this order.
inline std::array<linear_part, 4> parts_of(const matrix_descriptor& d) {
  const storage_bytes s = storage_of(d);
  const dtype scalar = dtype_of(d.scalar);
  const std::vector<index_t> params = {d.out_channels, d.groups()};
  const bool scaled = d.zero == zero_kind::scaled;
  return {{{".codes", dtype::u8, {d.out_channels, s.codes / d.out_channels}, s.codes},
           {".scales", scalar, params, s.scales},
           {".zeros", scaled ? scalar : dtype::u8, scaled ? params : std::vector{s.zeros}, s.zeros},
           {".weak", scalar, {d.out_channels, d.weak_columns}, s.weak}}};
}

/// BF16 scales must not exceed 2^119: products with 8-bit codes have to fit FP32.
inline void check_scales(const std::string& where, span<const std::byte> scales) {
  constexpr unsigned largest = (119U + 127U) << 7U;
  for (index_t i = 0; i < scales.size(); i += 2) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, scales.data() + i, 2);
    if ((bits & 0x7fffU) > largest) {
      fail_corrupt(where, "scale " + std::to_string(i / 2) + " is " +
                              std::to_string(to_float(bf16_bits{bits})) +
                              ", but must not exceed 2^119");
    }
  }
}

/// What validate_weak_index says of a layer's weak_index, or nothing.
inline std::string weak_index_error(const std::vector<std::int32_t>& weak_index,
                                    const matrix_descriptor& d) {
  return validate_weak_index(weak_index, d.weak_columns, d.in_channels).message();
}

// A layer's format stands in the file too: where config.json is edited by hand, tensors may still
// have the sizes it implies.
inline std::string format_key(const std::string& name) { return name + ".format"; }
inline std::string format_text(const matrix_descriptor& d) {
  return format_to_json(d, nullptr).dump();
}
inline void check_format(const safetensors_reader& reader, const std::string& name,
                         const matrix_descriptor& d) {
  for (const safetensors_file& file : reader.files()) {
    const auto written = file.metadata().find(format_key(name));
    if (written != file.metadata().end() && written->second != format_text(d)) {
      fail_corrupt(reader.where(), "layer '" + name + "' was written as " + written->second +
                                       ", but quantization_config says " + format_text(d));
    }
  }
}

}  // namespace detail

/// Adds the tensors of a layer: NAME.codes (U8, (OC, bytes per row)), NAME.scales ((OC, groups)),
/// NAME.zeros (U8 for packed integers, (OC, groups) for scaled ones), NAME.weak ((OC, k)) and
/// NAME.weak_index (I32, (k)). Parts without elements are left out. Throws errc::invalid_argument
/// for a wrong weak index.
/// @param matrix     must live until the file is written
/// @param weak_index the weak columns in the coordinates of the original model, in the order in
///                   which they are stored, which is ascending; for `indexed`, those of the matrix
inline void add_linear(safetensors_writer& writer, const std::string& name,
                       const quantized_matrix<layout::row_packed>& matrix,
                       const std::vector<std::int32_t>& weak_index) {
  const matrix_descriptor& d = matrix.descriptor();
  validate(d).throw_if_error();  // false for what was moved from
  const std::string broken = detail::weak_index_error(weak_index, d);
  if (!broken.empty()) {
    fail(errc::invalid_argument, "add_linear: " + name + ": " + broken);
  }
  if (d.weak == weak_kind::indexed && matrix.weak_index() != weak_index) {
    fail(errc::invalid_argument,
         "add_linear: " + name + " is indexed, so weak_index must be that of the matrix");
  }
  const std::array<span<const std::byte>, 4> bytes = {matrix.codes(), matrix.scales(),
                                                      matrix.zeros(), matrix.weak()};
  const auto parts = detail::parts_of(d);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (bytes[i].empty()) continue;
    writer.add(name + parts[i].suffix, parts[i].type, parts[i].shape, bytes[i]);
  }
  if (!weak_index.empty()) add_i32(writer, name + ".weak_index", weak_index);
  writer.set_metadata(detail::format_key(name), detail::format_text(d));
}
void add_linear(safetensors_writer&, const std::string&, quantized_matrix<layout::row_packed>&&,
                const std::vector<std::int32_t>&) = delete;  // it would not live long enough

/// As above for a layer that `matrix` makes while the file is written, once for each of its
/// tensors, so that no more than one layer need be in memory.
/// @param d      what `matrix().descriptor()` will be
/// @param matrix its result must stay valid until it is called again, for any layer
inline void add_linear(safetensors_writer& writer, const std::string& name,
                       const matrix_descriptor& d, const std::vector<std::int32_t>& weak_index,
                       const std::function<const quantized_matrix<layout::row_packed>&()>& matrix) {
  validate(d).throw_if_error();
  const std::string broken = detail::weak_index_error(weak_index, d);
  if (!broken.empty()) {
    fail(errc::invalid_argument, "add_linear: " + name + ": " + broken);
  }
  const auto parts = detail::parts_of(d);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].bytes == 0) continue;
    writer.add(name + parts[i].suffix, parts[i].type, parts[i].shape,
               [matrix, d, i, name](const safetensors_writer::sink& out) {
                 const quantized_matrix<layout::row_packed>& m = matrix();
                 if (m.descriptor() != d) {
                   fail(errc::invalid_argument,
                        "add_linear: the matrix of " + name + " is not what its descriptor says");
                 }
                 const std::array<span<const std::byte>, 4> bytes = {m.codes(), m.scales(),
                                                                     m.zeros(), m.weak()};
                 out(bytes[i]);
               });
  }
  if (!weak_index.empty()) add_i32(writer, name + ".weak_index", weak_index);
  writer.set_metadata(detail::format_key(name), detail::format_text(d));
}

/// The counterpart of add_linear. Type and size of every tensor must be what the descriptor says,
/// and the descriptor must be valid and the one that was written: else errc::corrupt_file or
/// errc::invalid_argument. Scales, scaled zeros and weak columns must be finite: else
/// errc::not_finite. Errors name the tensor.
inline stored_linear read_linear(const safetensors_reader& reader, const std::string& name,
                                 const matrix_descriptor& d) {
  if (const status valid = validate(d); !valid.ok()) {
    fail(valid.code(), reader.where() + ": layer '" + name + "': " + valid.message());
  }
  const auto refuse_extra = [&](const std::string& tensor) {
    if (reader.contains(tensor)) {
      fail_corrupt(reader.where(), "tensor '" + tensor + "' exists, but its layer needs none");
    }
  };
  std::vector<std::int32_t> weak_index;
  if (d.weak_columns > 0) {
    weak_index = read_i32(reader, name + ".weak_index", d.weak_columns);
    const std::string broken = detail::weak_index_error(weak_index, d);
    if (!broken.empty()) {
      fail_corrupt(reader.where(), "layer '" + name + "': " + broken);
    }
  } else {
    refuse_extra(name + ".weak_index");
  }
  // All sizes are checked before a layer of the size the descriptor claims is allocated.
  const auto parts = detail::parts_of(d);
  for (const detail::linear_part& part : parts) {
    const std::string tensor = name + part.suffix;
    if (part.bytes == 0) {
      refuse_extra(tensor);
      continue;
    }
    const tensor_view& t = reader.at(tensor, part.type, part.shape);
    const index_t bad = part.type == dtype::u8 ? -1 : find_not_finite(t.data, d.scalar);
    if (bad >= 0) {
      fail(errc::not_finite, reader.where() + ": tensor '" + tensor +
                                 "' holds a NaN or infinity at flat index " + std::to_string(bad));
    }
    if (part.suffix == std::string(".scales") && d.scalar == scalar_kind::bf16) {
      detail::check_scales(reader.where() + ": tensor '" + tensor + "'", t.data);
    }
  }
  detail::check_format(reader, name, d);
  quantized_matrix<layout::row_packed> matrix(
      d, d.weak == weak_kind::indexed ? weak_index : std::vector<std::int32_t>{});
  const std::array<span<std::byte>, 4> into = {matrix.codes(), matrix.scales(), matrix.zeros(),
                                               matrix.weak()};
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].bytes == 0) continue;
    const tensor_view& t = reader.at(name + parts[i].suffix);
    std::memcpy(into[i].data(), t.data.data(), static_cast<std::size_t>(parts[i].bytes));
    forget_pages(t.data);
  }
  return {std::move(matrix), std::move(weak_index)};
}

/// As above, with the descriptor that the checkpoint's config has for this layer.
inline stored_linear read_linear(const safetensors_reader& reader, const std::string& name,
                                 const quantization_config& config) {
  const matrix_descriptor* d = config.find(name);
  if (d == nullptr) {
    fail_corrupt(reader.where(), "quantization_config lists no layer '" + name + "'");
  }
  return read_linear(reader, name, *d);
}

/// Adds a permutation as I32 tensor `qeft.permutation.SPACE`.
inline void add_permutation(safetensors_writer& writer, const std::string& space,
                            const permutation& p) {
  add_i32(writer, "qeft.permutation." + space, p.source());
}

/// Reads what add_permutation stored; the identity where there is none. Throws errc::corrupt_file
/// for another size or what is no permutation.
inline permutation read_permutation(const safetensors_reader& reader, const std::string& space,
                                    index_t size) {
  const std::string name = "qeft.permutation." + space;
  if (!reader.contains(name)) return permutation::identity(size);
  std::vector<std::int32_t> source = read_i32(reader, name, size);
  try {
    return permutation(std::move(source));
  } catch (const error& e) {
    fail_corrupt(reader.where(), "tensor '" + name + "': " + e.what());
  }
}

}  // namespace QEFT_TARGET
}  // namespace qeft::io
