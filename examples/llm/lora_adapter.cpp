// SPDX-License-Identifier: Apache-2.0
#include "lora_adapter.hpp"

#include <cmath>
#include <nlohmann/json.hpp>

#include "qeft/core/text.hpp"
#include "qeft/io/convert.hpp"
#include "qeft/io/errors.hpp"
#include "qeft/io/json.hpp"
#include "qeft/io/json_fields.hpp"
#include "qeft/io/safetensors.hpp"

namespace qeft_llm {

namespace io = qeft::io;
using nlohmann::json;
using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

constexpr const char* kind = "qeft.lora";
constexpr const char* version = "1";
const std::string prefix = "base_model.model.";
const std::string a_suffix = ".lora_A.weight";
const std::string b_suffix = ".lora_B.weight";

bool has_suffix(const std::string& name, const std::string& suffix) {
  return name.size() > suffix.size() &&
         name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

const std::string& entry(const io::safetensors_file& file, const char* key) {
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) {
    io::fail_corrupt(file.where(), std::string("__metadata__ '") + key + "' is missing");
  }
  return found->second;
}

}  // namespace

std::vector<double> product(const lora_adapter& adapter, const lora_linear& linear) {
  const index_t r = adapter.rank;
  const double scale = adapter.alpha / static_cast<double>(r);
  std::vector<double> all(static_cast<std::size_t>(linear.out_channels * linear.width));
  for (index_t n = 0; n < linear.out_channels; ++n) {
    double* row = all.data() + n * linear.width;
    for (index_t i = 0; i < r; ++i) {
      const double b = scale * static_cast<double>(linear.b[static_cast<std::size_t>(n * r + i)]);
      const float* a = linear.a.data() + i * linear.width;
      for (index_t j = 0; j < linear.width; ++j) row[j] += b * static_cast<double>(a[j]);
    }
  }
  return all;
}

std::map<std::string, lora_linear> lora_linears(const std::vector<parameter>& parameters) {
  std::map<std::string, lora_linear> all;
  for (const parameter& p : parameters) {
    const std::vector<float> values(p.value, p.value + p.size());
    if (has_suffix(p.name, a_suffix)) {
      lora_linear& to = all[p.name.substr(0, p.name.size() - a_suffix.size())];
      to.width = p.columns;
      to.a = values;
    } else if (has_suffix(p.name, b_suffix)) {
      lora_linear& to = all[p.name.substr(0, p.name.size() - b_suffix.size())];
      to.out_channels = p.rows;
      to.b = values;
    }
  }
  return all;
}

bool is_lora_adapter(const std::filesystem::path& path) {
  std::error_code unknown;  // then opening says why
  if (std::filesystem::is_directory(path, unknown)) return false;
  const io::safetensors_reader reader(path);
  const auto& metadata = reader.files().front().metadata();
  const auto found = metadata.find("format");
  return found != metadata.end() && found->second == kind;
}

void write_lora_adapter(const std::filesystem::path& path, const lora_adapter& adapter) {
  io::safetensors_writer writer(
      std::map<std::string, std::string>{{"format", kind},
                                         {"format_version", version},
                                         {"r", std::to_string(adapter.rank)},
                                         {"lora_alpha", json(adapter.alpha).dump()},
                                         {"groupwise", adapter.groupwise ? "true" : "false"},
                                         {"base", adapter.base},
                                         {"architecture", adapter.architecture}});
  for (const auto& [name, linear] : adapter.linears) {
    const std::string a = prefix + name + a_suffix;
    const std::string b = prefix + name + b_suffix;
    io::require_finite(linear.a, a);
    io::require_finite(linear.b, b);
    writer.add(a, io::dtype::f32, {adapter.rank, linear.width}, io::as_bytes(linear.a));
    writer.add(b, io::dtype::f32, {linear.out_channels, adapter.rank}, io::as_bytes(linear.b));
  }
  writer.write(path);
}

lora_adapter read_lora_adapter(const std::filesystem::path& path) {
  const io::safetensors_reader reader(path);
  const io::safetensors_file& file = reader.files().front();
  if (entry(file, "format") != kind || entry(file, "format_version") != version) {
    fail(errc::unsupported, file.where() + ": format and version are " + entry(file, "format") +
                                " and " + entry(file, "format_version") + ", but must be " + kind +
                                " and " + version);
  }
  if (!file.verify_checksum()) io::fail_corrupt(file.where(), "has no checksum");
  lora_adapter adapter;
  const json settings = {
      {"r", io::parse_json(entry(file, "r"), file.where() + ": r")},
      {"lora_alpha", io::parse_json(entry(file, "lora_alpha"), file.where() + ": lora_alpha")}};
  adapter.rank = io::json_fields(settings, file.where()).integer("r", 1, 65536);
  const json& alpha = settings.at("lora_alpha");
  if (!alpha.is_number() || !(alpha.get<double>() > 0) || !std::isfinite(alpha.get<double>())) {
    io::fail_corrupt(file.where(),
                     "lora_alpha is " + io::dump_json(alpha) + ", but must be a positive number");
  }
  adapter.alpha = alpha.get<double>();
  adapter.groupwise = entry(file, "groupwise") == "true";
  adapter.base = entry(file, "base");
  adapter.architecture = entry(file, "architecture");
  for (const std::string& a : reader.names()) {
    if (has_suffix(a, b_suffix)) continue;  // found with its A
    if (a.compare(0, prefix.size(), prefix) != 0 || !has_suffix(a, a_suffix)) {
      io::fail_corrupt(file.where(), "tensor '" + a + "' must be lora_A or lora_B of a linear");
    }
    const std::string name = a.substr(prefix.size(), a.size() - prefix.size() - a_suffix.size());
    const std::string b = prefix + name + b_suffix;
    const auto side = [&](const std::string& tensor, std::size_t at) {
      const std::vector<index_t>& shape = reader.at(tensor).shape;
      return shape.size() == 2 ? shape[at] : 0;
    };
    lora_linear linear{side(b, 0), side(a, 1), {}, {}};
    if (linear.out_channels < 1 || linear.width < 1) {
      io::fail_corrupt(file.where(), "linear '" + name + "' must have rows and columns");
    }
    linear.a = io::to_floats(reader.at(a, io::dtype::f32, {adapter.rank, linear.width}));
    linear.b = io::to_floats(reader.at(b, io::dtype::f32, {linear.out_channels, adapter.rank}));
    io::require_finite(linear.a, a);
    io::require_finite(linear.b, b);
    adapter.linears.emplace(name, std::move(linear));
  }
  if (adapter.linears.size() * 2 != reader.names().size()) {
    io::fail_corrupt(file.where(), "a lora_B has no lora_A");
  }
  return adapter;
}

}  // namespace qeft_llm
