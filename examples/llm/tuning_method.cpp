// SPDX-License-Identifier: Apache-2.0
#include "tuning_method.hpp"

#include <algorithm>
#include <memory>
#include <utility>

#include "nf4.hpp"
#include "round_to_nearest.hpp"
#include "tuned_model.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::text;

namespace {

// Of the Platypus-style base.
constexpr int base_bits = 8;
constexpr index_t base_group_size = 128;

bool is_mlp(const std::string& name) { return name.find(".mlp.") != std::string::npos; }

}  // namespace

const char* to_string(tuning_method method) {
  switch (method) {
    case tuning_method::qeft:
      return "qeft";
    case tuning_method::owq:
      return "owq";
    case tuning_method::lora:
      return "lora";
    case tuning_method::qlora:
      return "qlora";
    case tuning_method::qa_lora:
      return "qa-lora";
    case tuning_method::platypus:
      break;
  }
  return "platypus";
}

bool tunes_weak_columns(tuning_method method) {
  return method == tuning_method::qeft || method == tuning_method::owq;
}

void check_model(tuning_method method, const model_config& config, const std::string& model) {
  const auto refuse = [&](const std::string& what, const std::string& rule) {
    fail(errc::invalid_argument, text("finetune: --model is ", model, ", ", what, ", but for ",
                                      "--method ", to_string(method), " must be ", rule));
  };
  const bool wants_quantised = tunes_weak_columns(method) || method == tuning_method::qa_lora;
  if (!wants_quantised) {
    if (config.quantization) refuse("which is quantised", "a model in full precision");
    return;
  }
  if (!config.quantization) {
    refuse("which is not quantised", "what `qeft-llm quantize` wrote");
  }
  const auto& layers = config.quantization->layers;
  const auto has_weak = [](const auto& layer) { return layer.second.weak_columns > 0; };
  if (tunes_weak_columns(method) && std::none_of(layers.begin(), layers.end(), has_weak)) {
    refuse("which has no weak columns", "quantised with --weak-columns");
  }
  for (const auto& [name, d] : layers) {
    if (method == tuning_method::owq && d.weak != qeft::weak_kind::indexed) {
      refuse(text("whose ", name, " has weak columns of kind ", qeft::to_string(d.weak)),
             "quantised with --reorder off");
    }
    if (method == tuning_method::qa_lora && d.zero != qeft::zero_kind::scaled) {
      refuse(text("whose ", name, " has zero points of kind ", qeft::to_string(d.zero)),
             "quantised with --zero scaled");
    }
  }
}

linear_maker linears_of(tuning_method method, const qeft::on_host& exec, const model_config& config,
                        const lora_options& options) {
  if (tunes_weak_columns(method)) return weak_column_tuning(exec, config);
  return [=](const std::string& name, const packed_matrix& weight,
             std::vector<float> bias) -> std::unique_ptr<tuned_linear> {
    std::unique_ptr<tuned_linear> base;
    column_groups groups;
    if (method == tuning_method::qlora) {
      base = std::make_unique<nf4_linear>(weight, std::move(bias));
    } else if (method == tuning_method::platypus) {
      base = std::make_unique<frozen>(
          exec, round_to_nearest(exec, weight, base_bits, base_group_size), std::move(bias));
      if (!is_mlp(name)) return base;
    } else {
      base = std::make_unique<frozen>(exec, weight, std::move(bias));
    }
    if (method == tuning_method::qa_lora) {
      // A layer that is not quantised, or has no dense columns, has no zero points to adapt.
      if (weight.descriptor().dense_columns() == 0) return base;
      groups = groups_of(weight.descriptor(), weight.weak_index());
    }
    return std::make_unique<lora>(std::move(base), name, options, std::move(groups));
  };
}

}  // namespace qeft_llm
