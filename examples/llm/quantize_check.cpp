// SPDX-License-Identifier: Apache-2.0
#include "quantize_check.hpp"

#include <algorithm>
#include <filesystem>

#include "progress.hpp"
#include "qeft/io/mapped_file.hpp"
#include "qeft/solver/scalar_choice.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

[[noreturn]] void refuse(const char* option, const std::string& value, const std::string& rule) {
  fail(errc::invalid_argument,
       std::string("quantize: ") + option + " is " + value + ", but must be " + rule);
}

/// The weights of a linear that is to be quantised: (OC, IC).
void check_range(const tensor_spec& t, const std::vector<float>& values) {
  constexpr float limit = qeft::solver::largest_weight(qeft::scalar_kind::bf16);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] <= limit && values[i] >= -limit) continue;
    fail(errc::not_finite, "tensor " + t.name + ", element " + std::to_string(i) + ": " +
                               std::to_string(values[i]) +
                               " overflows group scales, which hold weights up to 2^117, in BF16");
  }
}

}  // namespace

void check_options(const quantize_options& o, const model_config& config,
                   const column_choice& weak) {
  if (config.quantization) {
    fail(errc::invalid_argument, "quantize: " + o.model + " is quantised already");
  }
  if (o.needs_calibration() && o.calibration.empty()) {
    refuse("--calibration", "missing",
           "given for this method, choice and order of columns, and refinement");
  }
  constexpr index_t most_samples = 1 << 20;
  if (o.samples < 1 || o.samples > most_samples) {
    refuse("--samples", std::to_string(o.samples), "between 1 and " + std::to_string(most_samples));
  }
  if (o.needs_calibration() && (o.seq_len < 2 || o.seq_len > config.max_position_embeddings)) {
    refuse("--seq-len", std::to_string(o.seq_len),
           "between 2 and the model's max_position_embeddings = " +
               std::to_string(config.max_position_embeddings));
  }
  for (const linear_kind kind : all_linears) {
    const linear_shape s = shape_of(config, kind);
    if (o.weak_columns < 0 || weak.count(kind) > s.in_channels) {
      refuse("--weak-columns", std::to_string(o.weak_columns),
             "between 0 and the " + std::to_string(s.in_channels) + " input channels of " +
                 linear_name(0, kind));
    }
    qeft::solver::check(o.layer, s.out_channels, s.in_channels);
  }
  qeft::solver::check(o.asymmetric);
  const bool optq = o.layer.method == qeft::solver::layer_method::optq;
  if (o.is_asymmetric() && !optq) {
    refuse("--asymmetric", std::to_string(o.asymmetric.input), "0 unless --method is optq");
  }
  if (o.layer.search.weighted &&
      !(optq && o.layer.search.method == qeft::solver::search_method::grid)) {
    refuse("--search-weights", "solver", "equal unless --method is optq and --search is grid");
  }
  if (o.order == column_order::sensitivity && !o.reorder) {
    refuse("--order", "sensitivity", "natural when --reorder is off");
  }
  if (o.o_proj_placement == qeft::weak_kind::per_head && !o.reorder) {
    refuse("--weak-placement", "per_head", "indexed when --reorder is off");
  }
}

std::vector<std::filesystem::path> side_files(const std::filesystem::path& model) {
  std::vector<std::filesystem::path> found;
  for (const char* name : {"tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                           "special_tokens_map.json", "added_tokens.json", "vocab.json",
                           "merges.txt", "chat_template.jinja", "generation_config.json"}) {
    const std::filesystem::path file = model / name;
    std::error_code unknown;  // then opening says why
    if (!exists(std::filesystem::symlink_status(file, unknown))) continue;
    qeft::io::mapped_file{file};
    found.push_back(file);
  }
  const std::filesystem::path templates = model / "additional_chat_templates";
  if (std::filesystem::is_directory(templates)) {
    for (const auto& entry : std::filesystem::directory_iterator(templates)) {
      if (entry.path().extension() != ".jinja") continue;
      qeft::io::mapped_file{entry.path()};
      found.push_back(entry.path());
    }
    std::sort(found.begin(), found.end());
  }
  return found;
}

void check_tensors(const model_source& source) {
  const model_config& config = source.config();
  const std::vector<tensor_spec> tensors = expected_tensors(config);
  source.weights().require(tensors);
  progress bar("checking the model", static_cast<index_t>(tensors.size()));
  for (const tensor_spec& t : tensors) {
    if (t.shape.size() == 1) {
      source.vector(t.name, t.shape[0]);
    } else if (t.name == "model.embed_tokens.weight" || t.name == "lm_head.weight") {
      // They stay in full precision.
      source.matrix(t.name.substr(0, t.name.rfind(".weight")), t.shape[0], t.shape[1]);
    } else {
      check_range(t, source.weights().read(t.name, t.shape));
    }
    bar.advance();
  }
}

}  // namespace qeft_llm
