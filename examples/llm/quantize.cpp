// SPDX-License-Identifier: Apache-2.0
// `qeft-llm quantize`: checks everything, chooses weak columns, quantises block by block, writes.
#include "quantize.hpp"

#include <cstdio>
#include <optional>
#include <string>
#include <utility>

#include "calibration.hpp"
#include "column_choice.hpp"
#include "llama.hpp"
#include "progress.hpp"
#include "qeft/core/version.hpp"
#include "qeft/io/adapter.hpp"
#include "qeft/io/atomic_directory.hpp"
#include "qeft/solver/quantize_layer.hpp"
#include "quantize_check.hpp"
#include "quantized_writer.hpp"
#include "text_windows.hpp"
#include "tokenizer.hpp"
#include "work_directory.hpp"

namespace qeft_llm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using qeft::index_t;
using qeft::solver::layer_method;

const char* name_of(layer_method m) { return m == layer_method::optq ? "optq" : "rtn"; }
const char* name_of(const qeft::solver::group_search_options& o) {
  return o.method == qeft::solver::search_method::minmax ? "minmax"
         : o.weighted                                    ? "weighted"
                                                         : "grid";
}
const char* name_of(qeft::selection_metric m) {
  return m == qeft::selection_metric::hessian    ? "hessian"
         : m == qeft::selection_metric::gradient ? "gradient"
                                                 : "hessian_perturbation";
}

/// How the model was made, as far as people want to know.
json describe(const quantize_options& o) {
  json p;
  p["method"] = name_of(o.layer.method);
  p["search"] = name_of(o.layer.search);
  p["act_order"] = o.layer.act_order;
  p["static_groups"] = o.layer.static_groups;
  p["reorder"] = o.reorder;
  if (o.sorts_columns()) p["order"] = "sensitivity";
  if (o.is_asymmetric()) p["asymmetric"] = {o.asymmetric.input, o.asymmetric.stream};
  if (o.layer.refine_rounds > 0) p["refine"] = o.layer.refine_rounds;
  if (o.needs_calibration()) {
    p["samples"] = o.samples;
    p["seq_len"] = o.seq_len;
    p["seed"] = o.seed;
  }
  if (o.chooses_ahead()) p["selection"] = name_of(o.selection);
  return p;
}

/// Size and time of the last change of a file, or of what is read of a model's directory.
json state_of(const fs::path& path) {
  json state = json::object();
  const auto add = [&](const fs::path& file) {
    state[file.filename().string()] = {fs::file_size(file),
                                       fs::last_write_time(file).time_since_epoch().count()};
  };
  if (!fs::is_directory(path)) {
    add(path);
    return state;
  }
  for (const auto& entry : fs::directory_iterator(path)) {
    const std::string name = entry.path().filename().string();
    const bool read = entry.path().extension() == ".safetensors" || name == "config.json" ||
                      name == "model.safetensors.index.json" || name == "tokenizer.json";
    if (read && entry.is_regular_file()) add(entry.path());
  }
  return state;
}

/// Everything that the result depends on.
json fingerprint(const quantize_options& o) {
  json f = describe(o);
  f["version"] = {QEFT_VERSION_MAJOR, QEFT_VERSION_MINOR, QEFT_VERSION_PATCH};
  f["bits"] = o.layer.bits;
  f["group_size"] = o.layer.group_size;
  f["zero"] = to_string(o.layer.zero);
  f["search_steps"] = o.layer.search.steps;
  f["search_norm"] = o.layer.search.norm;
  f["damping"] = o.layer.damping.damping;
  f["robust_mean"] = o.layer.damping.robust_mean;
  f["weak_columns"] = o.weak_columns;
  f["weighted"] = o.layer.search.weighted;
  f["selection"] = name_of(o.selection);
  f["order"] = static_cast<int>(o.order);
  f["asymmetric"] = {o.asymmetric.input, o.asymmetric.stream};
  f["refine"] = o.layer.refine_rounds;
  f["o_proj_placement"] = to_string(o.o_proj_placement);
  f["accumulation"] = static_cast<int>(o.accumulation);
  f["compare_rtn"] = o.compare_rtn;
  f["model"] = state_of(o.model);
  if (!o.weak_columns_from.empty()) f["weak_columns_from"] = state_of(o.weak_columns_from);
  if (o.needs_calibration()) f["calibration"] = state_of(o.calibration);
  return f;
}

class quantizer {
 public:
  explicit quantizer(const quantize_options& options)
      : o_(options),
        exec_(options.threads),
        source_(options.model),
        config_(source_.config()),
        columns_(o_, exec_, source_) {}

  void run() {
    check_options(o_, config_, columns_);
    const auto side = side_files(o_.model);
    if (!o_.weak_columns_from.empty()) {
      columns_.take_from(o_.weak_columns_from);
      check_heads(config_, columns_);
    }
    qeft::io::atomic_directory out(o_.out, qeft::io::leftovers::reuse);
    out.keep(o_.keep_partial);
    work_.emplace(out.partial(), fingerprint(o_));
    out.keep(o_.keep_partial || work_->resumed());  // an error does not cost what a kill left
    check_tensors(source_);
    source_.report_rounding();
    token_windows windows;
    if (o_.needs_calibration()) {
      const tokenizer tok = tokenizer::from_file(o_.model + "/tokenizer.json");
      windows = draw_windows(text_windows(tok, o_.calibration, o_.seq_len, o_.samples), o_.samples,
                             o_.seed);
    }
    if (o_.chooses_ahead()) choose_columns(windows);
    quantize_blocks(windows);
    json how = describe(o_);
    how["model_fingerprint"] = qeft::io::weights_fingerprint(source_.weights().reader());
    const auto written =
        write_quantized_model(out.partial(), o_, source_, columns_, *work_, side, std::move(how));
    done("model");
    work_->remove();
    out.commit();
    report(written);
  }

 private:
  void done(const std::string& step) const {
    if (o_.after_step) o_.after_step(step);
  }

  void choose_columns(const token_windows& windows) {
    if (const auto known = work_->load("columns")) {
      work_->checked([&] { columns_.restore(*known); });
      return;
    }
    columns_.choose_ahead(windows, work_->path());
    work_->store("columns", columns_.to_json());
    done("weak columns");
  }

  void quantize_blocks(const token_windows& windows) {
    const auto progress_file = work_->load("blocks");
    const index_t finished = work_->checked([&] {
      const index_t n = progress_file ? progress_file->at("finished").get<index_t>() : 0;
      if (n >= 0 && n <= config_.num_hidden_layers) return n;
      qeft::fail(qeft::errc::corrupt_file,
                 "blocks.json: finished is " + std::to_string(n) + ", but the model has " +
                     std::to_string(config_.num_hidden_layers) + " blocks");
    });
    if (work_->resumed()) {
      std::fprintf(stderr, "going on with what an interrupted run left: %lld of %lld blocks\n",
                   static_cast<long long>(finished),
                   static_cast<long long>(config_.num_hidden_layers));
    }
    for (index_t l = 0; l < finished; ++l) {
      for (const linear_kind kind : all_linears) recall(l, kind);
    }
    progress bar("quantising", 7 * (config_.num_hidden_layers - finished));
    const auto quantize = [&](index_t l, linear_kind kind, const layer_inputs* inputs) {
      finished_linear done = work_->has_linear(linear_name(l, kind))
                                 ? recall(l, kind)
                                 : quantize_linear(l, kind, inputs);
      bar.advance();
      return linear_replacement{std::move(done.matrix), std::move(done.order)};
    };
    std::optional<calibration> samples;
    if (o_.needs_hessian()) {
      samples.emplace(exec_, source_, windows, work_->path(), o_.is_asymmetric(), finished);
    }
    for (index_t l = finished; l < config_.num_hidden_layers; ++l) {
      if (samples) {
        samples->run_block([&](index_t block, linear_kind kind, const layer_inputs& inputs) {
          return quantize(block, kind, &inputs);
        });
      } else {
        for (const linear_kind kind : all_linears) quantize(l, kind, nullptr);
      }
      work_->store("blocks", {{"finished", l + 1}});
      done("block " + std::to_string(l));
    }
  }

  /// A linear that an earlier run finished.
  finished_linear recall(index_t l, linear_kind kind) {
    const std::string name = linear_name(l, kind);
    finished_linear done = work_->load_linear(name);
    column_list weak;
    for (const std::int32_t i : done.matrix.weak_index()) {
      weak.push_back(static_cast<std::int32_t>(done.order[i]));
    }
    columns_.set(name, std::move(weak), done.order);
    return done;
  }

  /// What the solver is given of a linear, with its columns in their order.
  struct layer_problem {
    std::vector<float> w;               // (OC, IC)
    std::vector<float> hessian;         // (IC, IC), or empty
    qeft::host_buffer<float> mismatch;  // (OC, IC), or empty
    column_list weak;
  };

  /// @param inputs null when no Hessian is needed
  layer_problem problem_of(index_t l, linear_kind kind, const layer_inputs* inputs) {
    const linear_shape s = shape_of(config_, kind);
    layer_problem p;
    p.w = weight_of(source_, l, kind);
    const column_list& weak = columns_.weak(l, kind, inputs);
    const qeft::permutation& order = columns_.order(l, kind, inputs);
    if (inputs != nullptr) {
      const auto h = inputs->hessian();
      p.hessian.assign(h.begin(), h.end());
    }
    if (o_.is_asymmetric()) {
      p.mismatch = inputs->mismatch(p.w, s.out_channels, o_.asymmetric);
    }
    p.weak = places_of(weak, order);
    if (order.is_identity()) return p;
    using values = qeft::span<float>;
    qeft::permute_columns(order, values(p.w), s.out_channels);
    if (!p.hessian.empty()) {
      qeft::permute_columns(order, values(p.hessian), s.in_channels);
      qeft::permute_rows(order, values(p.hessian), s.in_channels);
    }
    if (!p.mismatch.empty()) {
      qeft::permute_columns(order, values(p.mismatch), s.out_channels);
    }
    return p;
  }

  /// @param inputs null when no Hessian is needed
  finished_linear quantize_linear(index_t l, linear_kind kind, const layer_inputs* inputs) {
    const std::string name = linear_name(l, kind);
    const linear_shape s = shape_of(config_, kind);
    finished_linear result;
    try {
      const layer_problem problem = problem_of(l, kind, inputs);
      result.order = columns_.order(name);
      auto options = options_for(exec_, o_, problem.w, s, problem.weak);
      const auto solve = [&](qeft::span<const float> w, qeft::span<const float> mismatch) {
        return qeft::solver::quantize_layer(exec_, w, s.out_channels, s.in_channels,
                                            problem.hessian, options, mismatch);
      };
      auto solved = solve(problem.w, problem.mismatch);
      result.matrix = std::move(solved.matrix);
      result.report = report_of(solved.report);
      if (solved.report.damping > o_.layer.damping.damping) {
        std::fprintf(stderr, "%s: the Hessian needed a damping of %g\n", name.c_str(),
                     solved.report.damping);
      }
      if (options.scalar != o_.layer.scalar) {
        std::fprintf(stderr, "%s: FP16 would lose; scales and weak columns are BF16\n",
                     name.c_str());
      }
      if (o_.compare_rtn) {
        options.method = layer_method::rtn;
        options.refine_rounds = 0;
        const qeft::span<const float> target =
            solved.target.empty() ? qeft::span<const float>(problem.w) : solved.target;
        result.report["rtn_output_error"] = solve(target, {}).report.output_error.value();
      }
    } catch (const qeft::error& e) {
      qeft::fail(e.code(), name + ": " + e.what());
    }
    work_->store_linear(name, result);
    done(name);
    return result;
  }

  static json report_of(const qeft::solver::layer_report& r) {
    json report;
    if (r.output_error) report["output_error"] = *r.output_error;
    if (r.squared_error) report["squared_error"] = *r.squared_error;
    report["damping"] = r.damping;
    report["dead_inputs"] = r.dead_inputs.size();
    return report;
  }

  void report(const qeft::io::quantization_config& written) const {
    const json& layers = written.provenance.at("layers");
    if (o_.compare_rtn) {  // E = tr(dW H dW^T); inspect shows every layer
      int better = 0;
      for (const json& r : layers)
        better += r.at("output_error") < r.at("rtn_output_error") ? 1 : 0;
      std::fprintf(stderr, "E is below that of RTN on %d of %zu layers\n", better, layers.size());
    }
    if (o_.json) print_json(written);
  }

  /// One object on stdout: how the model was made, and a table of its layers.
  void print_json(const qeft::io::quantization_config& written) const {
    json result = written.provenance;
    result["out"] = o_.out;
    result["layers"] = json::array();
    double weights = 0;
    double bytes = 0;
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      for (const linear_kind kind : all_linears) {
        const std::string name = linear_name(l, kind);
        const qeft::matrix_descriptor& d = written.layers.at(name);
        json layer = written.provenance.at("layers").at(name);
        layer["name"] = name;
        layer["out_channels"] = d.out_channels;
        layer["in_channels"] = d.in_channels;
        layer["bits"] = d.bits;
        layer["group_size"] = d.group_size;
        layer["zero"] = to_string(d.zero);
        layer["scalar"] = to_string(d.scalar);
        layer["weak"] = to_string(d.weak);
        layer["weak_columns"] = columns_.weak(name);
        layer["bits_per_weight"] = qeft::bits_per_weight(d);
        result["layers"].push_back(std::move(layer));
        weights += static_cast<double>(d.out_channels) * static_cast<double>(d.in_channels);
        bytes += static_cast<double>(qeft::storage_of(d).total());
      }
    }
    result["bits_per_weight"] = 8 * bytes / weights;
    std::printf("%s\n", result.dump(1, ' ', false, json::error_handler_t::replace).c_str());
  }

  quantize_options o_;
  qeft::on_host exec_;
  model_source source_;
  const model_config& config_;
  column_choice columns_;
  std::optional<work_directory> work_;
};

}  // namespace

int run_quantize(const quantize_options& options) {
  quantizer(options).run();
  return 0;
}

}  // namespace qeft_llm
