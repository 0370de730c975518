// SPDX-License-Identifier: Apache-2.0
// `qeft-llm inspect`.
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "commands.hpp"
#include "config.hpp"
#include "llama.hpp"
#include "qeft/container/matrix_descriptor.hpp"

namespace qeft_llm {

using qeft::index_t;

namespace {

/// A number about a layer that the quantiser left in the config, or NaN.
double recorded(const qeft::io::quantization_config& q, const std::string& layer, const char* key) {
  const auto layers = q.provenance.find("layers");
  if (layers == q.provenance.end() || !layers->is_object() || !layers->contains(layer)) return NAN;
  const auto& report = layers->at(layer);
  const auto found = report.find(key);
  return found != report.end() && found->is_number() ? found->get<double>() : NAN;
}

/// Four digits, or a dash for NaN.
std::string number(double x) {
  if (std::isnan(x)) return "-";
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", x);
  return text;
}

/// What there is to say of a layer.
struct layer_row {
  std::string name;
  linear_shape shape;
  const qeft::matrix_descriptor* format;  // null when it is not quantised
  double bytes;
  double error;      // E = tr(dW H dW^T), which the quantiser recorded, or NaN
  double rtn_error;  // after --compare-rtn, that of RTN
};

std::vector<layer_row> rows_of(const model_config& config) {
  std::vector<layer_row> rows;
  for (index_t l = 0; l < config.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) {
      layer_row row{linear_name(l, kind), shape_of(config, kind), nullptr, 0, NAN, NAN};
      if (config.quantization) row.format = config.quantization->find(row.name);
      if (row.format != nullptr) {
        row.bytes = static_cast<double>(qeft::storage_of(*row.format).total());
        row.error = recorded(*config.quantization, row.name, "output_error");
        row.rtn_error = recorded(*config.quantization, row.name, "rtn_output_error");
      } else {
        row.bytes = 2.0 * static_cast<double>(row.shape.out_channels) *
                    static_cast<double>(row.shape.in_channels);
      }
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

double weights_of(const layer_row& r) {
  return static_cast<double>(r.shape.out_channels) * static_cast<double>(r.shape.in_channels);
}

void print_row(const layer_row& r) {
  const auto oc = static_cast<long long>(r.shape.out_channels);
  const auto ic = static_cast<long long>(r.shape.in_channels);
  if (r.format == nullptr) {
    std::printf("%-36s %7lld %7lld %5d %6s %-10s %-9s %5s %9.3f %11s %7s\n", r.name.c_str(), oc, ic,
                16, "-", "-", "-", "-", 16.0, "-", "-");
    return;
  }
  const qeft::matrix_descriptor& d = *r.format;
  std::printf("%-36s %7lld %7lld %5d %6lld %-10s %-9s %5lld %9.3f %11s %7s\n", r.name.c_str(), oc,
              ic, d.bits, static_cast<long long>(d.group_size), to_string(d.zero),
              to_string(d.weak), static_cast<long long>(d.weak_columns), qeft::bits_per_weight(d),
              number(r.error).c_str(), number(r.error / r.rtn_error).c_str());
}

nlohmann::ordered_json to_json(const layer_row& r) {
  nlohmann::ordered_json j = {{"name", r.name},
                              {"out_channels", r.shape.out_channels},
                              {"in_channels", r.shape.in_channels},
                              {"bits", r.format != nullptr ? r.format->bits : 16},
                              {"bits_per_weight", 8 * r.bytes / weights_of(r)}};
  if (r.format == nullptr) return j;
  j["group_size"] = r.format->group_size;
  j["zero"] = to_string(r.format->zero);
  j["weak"] = to_string(r.format->weak);
  j["weak_columns"] = r.format->weak_columns;
  j["error"] = r.error;  // NaN is written as null
  j["rtn_error"] = r.rtn_error;
  return j;
}

/// The adapters that `merge` added, a list that may be empty.
nlohmann::json adapters_of(const model_config& config) {
  const auto found = config.source.find("qeft_adapters");
  const bool is_list = found != config.source.end() && found->is_array();
  return is_list ? *found : nlohmann::json::array();
}

}  // namespace

int run_inspect(const std::string& path, bool json) {
  std::filesystem::path directory = path;
  if (directory.filename() == "config.json") directory = directory.parent_path();
  if (directory.empty()) directory = ".";
  const model_source source(directory);  // also checks what the checksums tell
  const model_config& config = source.config();
  source.weights().require(expected_tensors(config));

  const std::vector<layer_row> rows = rows_of(config);
  for (const layer_row& r : rows) {  // throws where a layer is not as described
    if (r.format != nullptr) source.matrix(r.name, r.shape.out_channels, r.shape.in_channels);
  }
  double weights = 0;
  double bytes = 0;
  for (const layer_row& r : rows) {
    weights += weights_of(r);
    bytes += r.bytes;
  }
  if (json) {
    nlohmann::ordered_json all = {{"model_type", config.model_type},
                                  {"weights", weights},
                                  {"bytes", bytes},
                                  {"bits_per_weight", 8 * bytes / weights},
                                  {"adapters", adapters_of(config)},
                                  {"layers", nlohmann::ordered_json::array()}};
    for (const layer_row& r : rows) all["layers"].push_back(to_json(r));
    std::printf("%s\n", all.dump().c_str());
    return 0;
  }
  std::printf("%-36s %7s %7s %5s %6s %-10s %-9s %5s %9s %11s %7s\n", "layer", "OC", "IC", "bits",
              "group", "zero", "weak", "k", "bits/w", "E", "E/RTN");
  for (const layer_row& r : rows) print_row(r);
  std::printf("linear layers: %.1f M weights, %.1f MiB, %.3f bits per weight\n", weights / 1e6,
              bytes / 1048576, 8 * bytes / weights);
  for (const nlohmann::json& adapter : adapters_of(config)) {
    std::printf("merged adapter: %s\n", qeft::io::dump_json(adapter).c_str());
  }
  return 0;
}

}  // namespace qeft_llm
