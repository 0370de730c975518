// SPDX-License-Identifier: Apache-2.0
// `qeft-llm inspect`.
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>

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

}  // namespace

int run_inspect(const std::string& path) {
  std::filesystem::path directory = path;
  if (directory.filename() == "config.json") directory = directory.parent_path();
  const model_source source(directory);  // also checks what the checksums tell
  const model_config& config = source.config();
  if (!config.quantization) source.weights().require(expected_tensors(config));

  std::printf("%-36s %7s %7s %5s %6s %-10s %-9s %5s %9s %11s %7s\n", "layer", "OC", "IC", "bits",
              "group", "zero", "weak", "k", "bits/w", "E", "E/RTN");
  double weights = 0;
  double bytes = 0;
  for (index_t l = 0; l < config.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) {
      const std::string name = linear_name(l, kind);
      const linear_shape s = shape_of(config, kind);
      const auto* d = config.quantization ? config.quantization->find(name) : nullptr;
      const auto oc = static_cast<long long>(s.out_channels);
      const auto ic = static_cast<long long>(s.in_channels);
      const double count = static_cast<double>(oc) * static_cast<double>(ic);
      weights += count;
      if (d == nullptr) {
        bytes += 2 * count;
        std::printf("%-36s %7lld %7lld %5d %6s %-10s %-9s %5s %9.3f %11s %7s\n", name.c_str(), oc,
                    ic, 16, "-", "-", "-", "-", 16.0, "-", "-");
        continue;
      }
      bytes += static_cast<double>(qeft::storage_of(*d).total());
      // E = tr(dW H dW^T) and, after --compare-rtn, that of RTN, which the quantiser recorded.
      const double loss = recorded(*config.quantization, name, "output_error");
      const double rtn = recorded(*config.quantization, name, "rtn_output_error");
      std::printf("%-36s %7lld %7lld %5d %6lld %-10s %-9s %5lld %9.3f %11s %7s\n", name.c_str(), oc,
                  ic, d->bits, static_cast<long long>(d->group_size), to_string(d->zero),
                  to_string(d->weak), static_cast<long long>(d->weak_columns),
                  qeft::bits_per_weight(*d), number(loss).c_str(), number(loss / rtn).c_str());
    }
  }
  std::printf("linear layers: %.1f M weights, %.1f MiB, %.3f bits per weight\n", weights / 1e6,
              bytes / 1048576, 8 * bytes / weights);
  return 0;
}

}  // namespace qeft_llm
