// SPDX-License-Identifier: Apache-2.0
// Adapters: what tuning changed of a model's weak columns, in the coordinates of the original model
// (METHOD section 7).
#pragma once

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "qeft/core/text.hpp"
#include "qeft/io/checkpoint.hpp"
#include "qeft/io/convert.hpp"
#include "qeft/io/errors.hpp"
#include "qeft/io/json.hpp"
#include "qeft/io/safetensors.hpp"
#include "qeft/reorder/permutation.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// Version of adapter files.
inline constexpr int adapter_format_version = 1;

/// What an adapter adds to one linear.
struct adapter_linear {
  index_t out_channels = 0;
  index_t in_channels = 0;
  std::vector<std::int32_t> columns;  // (k), ascending, of the original model
  std::vector<double> delta;          // (OC, k) row-major, rows of the original model

  double at(index_t row, index_t j) const noexcept {
    return delta[static_cast<std::size_t>(row * static_cast<index_t>(columns.size()) + j)];
  }
};

/// The rows and columns are those of the original model, whatever order a quantised one keeps them
/// in, so that an adapter fits the full-precision model as well.
struct adapter {
  std::string base;            // weights_fingerprint of the quantised model that was tuned
  std::string full_precision;  // that of the model it was quantised from; empty when not known
  std::string architecture;    // must be that of the model to merge with; any text
  std::map<std::string, adapter_linear> linears;  // by name, without ".weight"
};

/// Tells models apart: 16 hexadecimal digits, the sum modulo 2^64 of the checksums of all tensors.
/// It covers their names, types, shapes and bytes, not config.json. Order, metadata and number of
/// files do not matter. Reads every byte.
inline std::string weights_fingerprint(const safetensors_reader& reader) {
  std::uint64_t sum = 0;
  for (const safetensors_file& file : reader.files()) sum += file.checksum();
  return to_hex(sum);
}

/// Element i of an F16, BF16, F32 or F64 tensor. @pre in range
inline double number_at(dtype type, const std::byte* data, index_t i) noexcept {
  switch (type) {
    case dtype::f16:
      return static_cast<double>(to_float(detail::load<half_bits>(data, i)));
    case dtype::bf16:
      return static_cast<double>(to_float(detail::load<bf16_bits>(data, i)));
    case dtype::f32:
      return static_cast<double>(detail::load<float>(data, i));
    default:
      return detail::load<double>(data, i);
  }
}

namespace detail {

/// The float next to `x`, on the side where the last bit is 1, or `x` where floats hold it.
/// Rounding it to 16 bits rounds `x` once: it is a tie only where `x` is.
inline float round_to_odd(double x) noexcept {
  const auto nearest = static_cast<float>(x);
  const auto back = static_cast<double>(nearest);
  const std::uint32_t bits = qeft::detail::float_to_bits(nearest);
  if (back == x || std::isnan(x) || (bits & 1U) != 0) return nearest;
  return qeft::detail::bits_to_float(std::abs(back) > std::abs(x) ? bits - 1U : bits + 1U);
}

}  // namespace detail

/// The counterpart of number_at: rounds once, to nearest even. What overflows becomes infinity.
inline void store_number(dtype type, double value, std::byte* data, index_t i) noexcept {
  const auto store = [&](const auto& x) {
    std::memcpy(data + i * static_cast<index_t>(sizeof(x)), &x, sizeof(x));
  };
  switch (type) {
    case dtype::f16:
      return store(from_float<half_bits>(detail::round_to_odd(value)));
    case dtype::bf16:
      return store(from_float<bf16_bits>(detail::round_to_odd(value)));
    case dtype::f32:
      return store(static_cast<float>(value));
    default:
      return store(value);
  }
}

namespace detail {

/// The number d for which `initial` + d, rounded once, is `tuned`, both 16-bit: a float where one
/// does, which is almost always their difference. A negative zero needs what is next to it. Nothing
/// where there is none.
inline std::optional<double> find_delta(dtype type, const std::byte* initial,
                                        const std::byte* tuned) noexcept {
  const double from = number_at(type, initial, 0);
  const double exact = number_at(type, tuned, 0) - from;
  const auto nearest = static_cast<float>(exact);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const auto next = [](auto x, double to) {
    return static_cast<double>(std::nextafter(x, static_cast<decltype(x)>(to)));
  };
  for (const double d :
       {static_cast<double>(nearest), exact == 0 ? -0.0 : 0.0, next(nearest, -infinity),
        next(nearest, infinity), exact, next(exact, -infinity), next(exact, infinity)}) {
    std::byte sum[2];
    store_number(type, from + d, sum, 0);
    if (std::memcmp(sum, tuned, 2) == 0) return d;
  }
  return std::nullopt;
}

}  // namespace detail

/// What tuning changed of a linear. Adding it to the base in double and rounding once gives the
/// tuned columns bit for bit: that is checked.
/// @param name  for errors
/// @param base  the layer before tuning
/// @param tuned its weak columns after it: (OC, k), the 16-bit type, rows and columns of
///              base.matrix.weak()
/// @param rows  row i of the matrix is row rows[i] of the original model; null when equal
/// @throws errc::invalid_argument for sizes that differ; errc::not_finite for NaN and infinity;
///         errc::unsupported, naming row, column and both values, where no number leads from one to
///         the other: BF16 values that differ by more than 2^45 units of the smaller
inline adapter_linear make_adapter_linear(const std::string& name, const stored_linear& base,
                                          span<const std::byte> tuned, const permutation* rows) {
  const matrix_descriptor& d = base.matrix.descriptor();
  const dtype type = dtype_of(d.scalar);
  const index_t k = d.weak_columns;
  if (tuned.size() != base.matrix.weak().size() ||
      (rows != nullptr && rows->size() != d.out_channels)) {
    fail(errc::invalid_argument,
         text("make_adapter_linear: ", name, ": tuned has ", tuned.size(), " bytes and rows ",
              rows == nullptr ? d.out_channels : rows->size(), " entries, but must have ",
              base.matrix.weak().size(), " and ", d.out_channels));
  }
  if (const index_t bad = find_not_finite(tuned, d.scalar); bad >= 0) {
    fail(errc::not_finite, text("make_adapter_linear: ", name, ": tuned holds a NaN or infinity ",
                                "at flat index ", bad, ", but must be finite"));
  }
  adapter_linear result{d.out_channels, d.in_channels, base.weak_index, {}};
  result.delta.resize(static_cast<std::size_t>(d.out_channels * k));
  for (index_t n = 0; n < d.out_channels; ++n) {
    const index_t row = rows == nullptr ? n : (*rows)[n];
    for (index_t j = 0; j < k; ++j) {
      const std::byte* initial = base.matrix.weak().data() + 2 * (n * k + j);
      const std::byte* after = tuned.data() + 2 * (n * k + j);
      const std::optional<double> delta = detail::find_delta(type, initial, after);
      if (!delta) {
        fail(errc::unsupported, text("make_adapter_linear: ", name, ", row ", row, ", column ",
                                     base.weak_index[static_cast<std::size_t>(j)], ": tuned is ",
                                     number_at(type, after, 0), ", but no number added to ",
                                     number_at(type, initial, 0), " gives it"));
      }
      result.delta[static_cast<std::size_t>(row * k + j)] = *delta;
    }
  }
  return result;
}

namespace detail {

inline constexpr const char* adapter_kind = "qeft.adapter";

/// What is wrong with a linear of an adapter, or nothing.
inline std::string adapter_linear_error(const adapter_linear& l) {
  constexpr index_t limit = index_t{1} << 30;  // as of matrix_descriptor
  if (l.out_channels < 1 || l.out_channels > limit || l.in_channels < 1 || l.in_channels > limit) {
    return text("its shape is ", l.out_channels, " x ", l.in_channels,
                ", but both must be in [1, 2^30]");
  }
  const auto k = static_cast<index_t>(l.columns.size());
  if (const status s = validate_weak_index(l.columns, k, l.in_channels); !s.ok()) {
    return "columns: " + std::string(s.message());
  }
  if (static_cast<index_t>(l.delta.size()) != l.out_channels * k) {
    return text("delta has ", l.delta.size(), " elements, but ", l.out_channels, " x ", k,
                " are needed");
  }
  for (std::size_t i = 0; i < l.delta.size(); ++i) {
    if (!std::isfinite(l.delta[i])) {
      return text("delta holds a NaN or infinity at flat index ", i);
    }
  }
  return {};
}

/// F32 where it holds these numbers, else F64.
inline dtype delta_type(const std::vector<double>& delta) noexcept {
  for (const double d : delta) {
    if (static_cast<double>(static_cast<float>(d)) != d) return dtype::f64;
  }
  return dtype::f32;
}

inline const std::string& adapter_entry(const safetensors_file& file, const char* key) {
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) {
    fail_corrupt(file.where(), std::string("__metadata__ '") + key + "' is missing");
  }
  return found->second;
}

inline void check_adapter_kind(const safetensors_file& file) {
  const auto kind = file.metadata().find("format");
  if (kind == file.metadata().end() || kind->second != adapter_kind) {
    fail_corrupt(file.where(),
                 std::string("is no adapter: __metadata__ 'format' must be ") + adapter_kind);
  }
  const std::string& version = adapter_entry(file, "format_version");
  if (version != std::to_string(adapter_format_version)) {
    fail(errc::unsupported, file.where() + ": format_version is " + dump_json(version) +
                                ", but this program reads " +
                                std::to_string(adapter_format_version));
  }
}

/// The shape of a linear, as the metadata has it: [OC, IC].
inline adapter_linear shape_from_json(const std::string& name, const nlohmann::json& entry,
                                      const std::string& where) {
  constexpr std::uint64_t limit = std::uint64_t{1} << 30U;
  const auto is_size = [&](const nlohmann::json& n) {
    return n.is_number_unsigned() && n.get<std::uint64_t>() >= 1 && n.get<std::uint64_t>() <= limit;
  };
  if (!entry.is_array() || entry.size() != 2 || !is_size(entry[0]) || !is_size(entry[1])) {
    fail_corrupt(where, "'" + name + "' is " + dump_json(entry) +
                            ", but must be [OC, IC], integers from 1 to 2^30");
  }
  return {entry[0].get<index_t>(), entry[1].get<index_t>(), {}, {}};
}

}  // namespace detail

/// Writes an adapter as one safetensors file: for each linear NAME.delta (F32, or F64 where F32
/// loses; (OC, k)) and NAME.columns (I32, (k)); fingerprints, architecture and shapes in the
/// metadata. Throws errc::invalid_argument, naming the linear, for what breaks a rule, and
/// errc::io_error; then a file that was there is as it was.
inline void write_adapter(const std::filesystem::path& path, const adapter& a) {
  safetensors_writer writer(
      std::map<std::string, std::string>{{"format", detail::adapter_kind},
                                         {"format_version", std::to_string(adapter_format_version)},
                                         {"base", a.base},
                                         {"full_precision", a.full_precision},
                                         {"architecture", a.architecture}});
  nlohmann::json shapes = nlohmann::json::object();
  for (const auto& [name, linear] : a.linears) {
    if (const std::string broken = detail::adapter_linear_error(linear); !broken.empty()) {
      fail(errc::invalid_argument, "write_adapter: " + name + ": " + broken);
    }
    const auto k = static_cast<index_t>(linear.columns.size());
    const dtype type = detail::delta_type(linear.delta);
    std::vector<std::byte> delta(linear.delta.size() * static_cast<std::size_t>(size_of(type)));
    for (index_t i = 0; i < linear.out_channels * k; ++i) {
      store_number(type, linear.delta[static_cast<std::size_t>(i)], delta.data(), i);
    }
    writer.add(name + ".delta", type, {linear.out_channels, k}, std::move(delta));
    add_i32(writer, name + ".columns", linear.columns);
    shapes[name] = {linear.out_channels, linear.in_channels};
  }
  writer.set_metadata("shapes", dump_json(shapes));
  writer.write(path);
}

/// The counterpart of write_adapter. Throws errc::io_error, errc::unsupported for another version,
/// and errc::corrupt_file, naming file, tensor and rule, for whatever else is not as write_adapter
/// leaves it.
inline adapter read_adapter(const std::filesystem::path& path) {
  std::error_code unknown;  // then opening says why
  if (std::filesystem::is_directory(path, unknown)) {
    fail(errc::io_error, path.string() + ": is a directory, but an adapter is one file");
  }
  const safetensors_reader reader(path);
  const safetensors_file& file = reader.files().front();
  detail::check_adapter_kind(file);
  if (!file.verify_checksum()) fail_corrupt(file.where(), "has no checksum");
  adapter a;
  a.base = detail::adapter_entry(file, "base");
  a.full_precision = detail::adapter_entry(file, "full_precision");
  a.architecture = detail::adapter_entry(file, "architecture");
  const std::string where = file.where() + ": shapes";
  const nlohmann::json shapes = parse_json(detail::adapter_entry(file, "shapes"), where);
  if (!shapes.is_object()) fail_corrupt(where, "must be an object, not " + dump_json(shapes));
  std::set<std::string> expected;
  for (const auto& [name, entry] : shapes.items()) {
    adapter_linear linear = detail::shape_from_json(name, entry, where);
    const std::vector<index_t>& listed = reader.at(name + ".columns").shape;
    const index_t k = listed.empty() ? 0 : listed[0];
    linear.columns = read_i32(reader, name + ".columns", k);
    const tensor_view& stored = reader.at(name + ".delta");
    const dtype type = stored.type == dtype::f64 ? dtype::f64 : dtype::f32;
    const tensor_view& delta = reader.at(name + ".delta", type, {linear.out_channels, k});
    for (index_t i = 0; i < delta.elements(); ++i) {
      linear.delta.push_back(number_at(type, delta.data.data(), i));
    }
    if (const std::string broken = detail::adapter_linear_error(linear); !broken.empty()) {
      fail_corrupt(file.where(), "linear '" + name + "': " + broken);
    }
    expected.insert({name + ".columns", name + ".delta"});
    a.linears.emplace(name, std::move(linear));
  }
  for (const std::string& name : reader.names()) {
    if (expected.count(name) == 0) {
      fail_corrupt(file.where(), "tensor '" + name + "' is of no linear that shapes lists");
    }
  }
  return a;
}

}  // namespace QEFT_TARGET
}  // namespace qeft::io
