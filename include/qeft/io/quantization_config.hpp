// SPDX-License-Identifier: Apache-2.0
// The `quantization_config` entry of a checkpoint's config.json: which linears are quantised, and
// how.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "qeft/container/matrix_descriptor.hpp"
#include "qeft/core/version.hpp"
#include "qeft/io/json_fields.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// The JSON holds `quant_method` "qeft", `format_version`, the default format, and for each linear
/// its shape and what differs from the default:
///   {"quant_method": "qeft", "format_version": 1, "bits": 4, "group_size": 128, "zero": "integer",
///    "scalar": "f16", "weak": "tail", "weak_columns": 16, "heads": 1,
///    "layers": {"model.layers.0.self_attn.q_proj": {"out_channels": 576, "in_channels": 576},
///    ...}, "provenance": {...}}
struct quantization_config {
  matrix_descriptor defaults;                       // its channels are not used
  std::map<std::string, matrix_descriptor> layers;  // by the name of the linear, without ".weight"
  nlohmann::json provenance = nlohmann::json::object();  // how it was made, for people; any object

  /// The descriptor of a linear, or null when it is not quantised.
  const matrix_descriptor* find(const std::string& name) const {
    const auto found = layers.find(name);
    return found == layers.end() ? nullptr : &found->second;
  }
};

namespace detail {

/// The fields of a format that differ from `base`, or all of them.
inline nlohmann::json format_to_json(const matrix_descriptor& d, const matrix_descriptor* base) {
  nlohmann::json j = nlohmann::json::object();
  if (!base || d.bits != base->bits) j["bits"] = d.bits;
  if (!base || d.group_size != base->group_size) j["group_size"] = d.group_size;
  if (!base || d.zero != base->zero) j["zero"] = to_string(d.zero);
  if (!base || d.scalar != base->scalar) j["scalar"] = to_string(d.scalar);
  if (!base || d.weak != base->weak) j["weak"] = to_string(d.weak);
  if (!base || d.weak_columns != base->weak_columns) j["weak_columns"] = d.weak_columns;
  if (!base || d.heads != base->heads) j["heads"] = d.heads;
  return j;
}

/// The enumerator of `candidates` that to_string() names like the value of `key`.
template <class Enum, std::size_t N>
Enum enum_from_json(const json_fields& fields, const char* key, Enum absent,
                    const Enum (&candidates)[N]) {
  if (!fields.has(key)) return absent;
  const std::string text = fields.text(key);
  std::string names;
  for (const Enum candidate : candidates) {
    if (text == to_string(candidate)) return candidate;
    names += std::string(names.empty() ? "" : ", ") + to_string(candidate);
  }
  fields.refuse(key, "one of " + names);
}

inline matrix_descriptor format_from_json(const json_fields& fields, matrix_descriptor d) {
  constexpr index_t limit = index_t{1} << 30;  // validate() has the exact rules
  d.bits = static_cast<int>(fields.integer_or("bits", d.bits, 1, 16));
  d.group_size = fields.integer_or("group_size", d.group_size, -1, limit);
  d.zero = enum_from_json(fields, "zero", d.zero,
                          {zero_kind::symmetric, zero_kind::integer, zero_kind::scaled});
  d.scalar = enum_from_json(fields, "scalar", d.scalar, {scalar_kind::half, scalar_kind::bf16});
  d.weak =
      enum_from_json(fields, "weak", d.weak,
                     {weak_kind::none, weak_kind::tail, weak_kind::indexed, weak_kind::per_head});
  d.weak_columns = fields.integer_or("weak_columns", d.weak_columns, 0, limit);
  d.heads = fields.integer_or("heads", d.heads, 1, limit);
  return d;
}

}  // namespace detail

/// The JSON of config.json's `quantization_config`.
inline nlohmann::json to_json(const quantization_config& config) {
  nlohmann::json j = detail::format_to_json(config.defaults, nullptr);
  j["quant_method"] = "qeft";
  j["format_version"] = checkpoint_format_version;
  j["provenance"] = config.provenance;
  nlohmann::json& layers = j["layers"] = nlohmann::json::object();
  for (const auto& [name, d] : config.layers) {
    nlohmann::json& layer = layers[name] = detail::format_to_json(d, &config.defaults);
    layer["out_channels"] = d.out_channels;
    layer["in_channels"] = d.in_channels;
  }
  return j;
}

/// The counterpart of to_json. Throws errc::unsupported for another method or a newer format and
/// errc::corrupt_file for whatever breaks a rule, naming layer, key and value.
/// @param where names the JSON in errors, for example the path of config.json
inline quantization_config quantization_config_from_json(const nlohmann::json& j,
                                                         const std::string& where) {
  const json_fields fields(j, where + ": quantization_config");
  const std::string method = fields.text("quant_method");
  if (method != "qeft") {
    fail(errc::unsupported,
         fields.where() + ": quant_method is \"" + method + "\", but only \"qeft\" can be read");
  }
  const index_t version = fields.integer("format_version", 1, std::numeric_limits<index_t>::max());
  if (version > checkpoint_format_version) {
    fail(errc::unsupported, fields.where() + ": format_version is " + std::to_string(version) +
                                ", but this program reads up to " +
                                std::to_string(checkpoint_format_version));
  }
  quantization_config config;
  config.defaults = detail::format_from_json(fields, {});
  if (!is_supported_bits(config.defaults.bits)) fields.refuse("bits", "2, 3, 4 or 8");
  if (!is_supported_group_size(config.defaults.group_size)) {
    fields.refuse("group_size", "a positive multiple of 32, or -1");
  }
  if (fields.has("provenance")) {
    config.provenance = *fields.find("provenance");
    if (!config.provenance.is_object()) fields.refuse("provenance", "an object");
  }
  if (!fields.has("layers")) fields.refuse("layers", "an object");
  const json_fields layers(*fields.find("layers"), fields.where() + ": layers");
  for (const auto& [name, entry] : layers.object().items()) {
    const json_fields layer(entry, layers.where() + ": " + name);
    matrix_descriptor d = detail::format_from_json(layer, config.defaults);
    d.out_channels = layer.integer("out_channels", 1, index_t{1} << 30);
    d.in_channels = layer.integer("in_channels", 1, index_t{1} << 30);
    const status valid = validate(d);
    if (!valid.ok()) fail_corrupt(layer.where(), valid.message());
    config.layers.emplace(name, d);
  }
  return config;
}

}  // namespace QEFT_TARGET
}  // namespace qeft::io
