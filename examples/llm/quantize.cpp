// SPDX-License-Identifier: Apache-2.0
// `qeft-llm quantize`: block by block, each with the inputs that the blocks quantised before it
// produce (METHOD section 3), then Offline Global Reordering of the packed model (section 4).
#include "quantize.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "elementwise.hpp"
#include "gradient.hpp"
#include "llama.hpp"
#include "llama_graph.hpp"
#include "progress.hpp"
#include "qeft/io/atomic_directory.hpp"
#include "qeft/io/checkpoint.hpp"
#include "qeft/reorder/permute_matrix.hpp"
#include "qeft/reorder/weak_selection.hpp"
#include "qeft/solver/hessian.hpp"
#include "qeft/solver/quantize_layer.hpp"
#include "sample_store.hpp"
#include "text_windows.hpp"
#include "tokenizer.hpp"

namespace qeft_llm {
namespace {

using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::selection_metric;
using qeft::solver::hessian_accumulator;
using qeft::solver::layer_method;
using qeft::solver::layer_options;
using qeft::solver::layer_report;
using column_list = std::vector<std::int32_t>;  // ascending input columns, original coordinates

/// A quantised linear: in original coordinates with indexed weak columns until it is reordered.
struct quantized_linear {
  packed_matrix matrix;
  layer_report report;
  double rtn_error = -1;  // E under RTN, when compared
};

/// Sums of squares per channel: the diagonal of the Hessian without the rest.
class diagonal_accumulator {
 public:
  explicit diagonal_accumulator(index_t channels) : sum_(static_cast<std::size_t>(channels)) {}
  void add(const float* x, index_t tokens) {
    for (index_t t = 0; t < tokens; ++t) {
      for (auto& s : sum_) {
        s += 2.0 * static_cast<double>(*x) * static_cast<double>(*x);
        ++x;
      }
    }
  }
  const std::vector<double>& result() const noexcept { return sum_; }

 private:
  std::vector<double> sum_;
};

class quantizer {
 public:
  explicit quantizer(const quantize_options& options)
      : o_(options),
        exec_(options.threads),
        source_(options.model),
        config_(source_.config()),
        graph_(describe(config_)) {}

  void run() {
    check_options();
    source_.weights().require(expected_tensors(config_));
    if (!o_.weak_columns_from.empty()) take_weak_columns();
    qeft::io::atomic_directory out(o_.out);
    scratch_ = out.partial().string();
    if (needs_calibration()) {
      rope_ = rope_table(config_, o_.seq_len);
      const tokenizer tok = tokenizer::from_file(o_.model + "/tokenizer.json");
      windows_ = draw_windows(text_windows(tok, o_.calibration, o_.seq_len, o_.samples), o_.samples,
                              o_.seed);
    }
    if (chooses_columns()) {
      if (o_.selection == selection_metric::gradient) find_gradients();
      if (o_.reorder) choose_stream_columns();
    }
    if (needs_hessian()) {
      quantize_with_calibration();
    } else {
      quantize_without_calibration();
    }
    write(out);
    if (o_.compare_rtn) report_comparison();
  }

 private:
  // ---- Options ----------------------------------------------------------------------------------

  void check_options() const {
    const auto broken = [](const char* option, const std::string& value, const std::string& rule) {
      fail(errc::invalid_argument,
           std::string("quantize: ") + option + " is " + value + ", but must be " + rule);
    };
    if (config_.quantization) {
      fail(errc::invalid_argument, "quantize: " + o_.model + " is quantised already");
    }
    if (needs_calibration() && o_.calibration.empty()) {
      broken("--calibration", "missing", "given for this method and choice of weak columns");
    }
    constexpr index_t most_samples = 1 << 20;
    if (o_.samples < 1 || o_.samples > most_samples) {
      broken("--samples", std::to_string(o_.samples),
             "between 1 and " + std::to_string(most_samples));
    }
    if (needs_calibration() && (o_.seq_len < 2 || o_.seq_len > config_.max_position_embeddings)) {
      broken("--seq-len", std::to_string(o_.seq_len),
             "between 2 and the model's max_position_embeddings = " +
                 std::to_string(config_.max_position_embeddings));
    }
    for (const linear_kind kind : all_linears) {
      const linear_shape s = shape_of(config_, kind);
      if (o_.weak_columns < 0 || weak_columns_of(kind) > s.in_channels) {
        broken("--weak-columns", std::to_string(o_.weak_columns),
               "between 0 and the " + std::to_string(s.in_channels) + " input channels of " +
                   linear_name(0, kind));
      }
      check(o_.layer, s.out_channels, s.in_channels);
    }
    if (o_.o_proj_placement == qeft::weak_kind::per_head && !o_.reorder) {
      broken("--weak-placement", "per_head", "indexed when --reorder is off");
    }
  }

  bool chooses_columns() const { return o_.weak_columns > 0 && o_.weak_columns_from.empty(); }
  bool needs_hessian() const {
    return o_.layer.method == layer_method::optq || o_.compare_rtn ||
           (chooses_columns() && o_.selection != selection_metric::gradient);
  }
  bool needs_calibration() const { return needs_hessian() || chooses_columns(); }

  bool per_head(linear_kind kind) const {
    return kind == linear_kind::o && o_.o_proj_placement == qeft::weak_kind::per_head;
  }
  /// k of a linear: with per_head placement the next multiple of the heads.
  index_t weak_columns_of(linear_kind kind) const {
    return per_head(kind) ? qeft::round_up(o_.weak_columns, config_.num_attention_heads)
                          : o_.weak_columns;
  }
  static bool reads_stream(linear_kind kind) {
    return kind != linear_kind::o && kind != linear_kind::down;
  }

  // ---- Which columns are weak (METHOD section 2) ------------------------------------------------

  std::vector<float> weight_of(index_t block, linear_kind kind) const {
    const linear_shape s = shape_of(config_, kind);
    return source_.weights().read(linear_name(block, kind) + ".weight",
                                  {s.out_channels, s.in_channels});
  }

  /// The sensitivity of a linear's input columns by the selected metric.
  std::vector<double> sensitivity(index_t block, linear_kind kind,
                                  const std::vector<double>& hessian_diagonal) const {
    switch (o_.selection) {
      case selection_metric::hessian:
        return hessian_diagonal;
      case selection_metric::gradient:
        return gradients_.at(linear_name(block, kind));
      case selection_metric::hessian_perturbation:
        break;
    }
    const linear_shape s = shape_of(config_, kind);
    return qeft::hessian_perturbation(
        hessian_diagonal, qeft::solver::perturbation(exec_, weight_of(block, kind), s.out_channels,
                                                     s.in_channels, o_.layer));
  }

  void find_gradients() {
    progress bar("gradients", o_.samples);
    gradients_ = gradient_sensitivity(exec_, config_, source_.weights(), windows_,
                                      [&](index_t, double) { bar.advance(); });
  }

  /// Global selection: one set of channels of the residual stream for all layers that read it,
  /// found on the full-precision model.
  void choose_stream_columns() {
    qeft::global_selection selection(config_.hidden_size, o_.weak_columns, o_.accumulation);
    const bool by_gradient = o_.selection == selection_metric::gradient;
    // Every sample costs a forward pass through the model.
    constexpr index_t most_samples = 32;
    const index_t samples = by_gradient ? 0 : std::min(o_.samples, most_samples);
    sample_store stream(scratch_, samples, o_.seq_len * config_.hidden_size);
    embed(stream);
    block_cache cache = make_cache();
    progress bar("choosing weak columns", config_.num_hidden_layers);
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      diagonal_accumulator attention(config_.hidden_size);
      diagonal_accumulator mlp(config_.hidden_size);
      if (samples > 0) {
        const block b = load_block(exec_, source_, l);
        std::vector<float> h;
        for (index_t i = 0; i < samples; ++i) {
          stream.read(i, h);
          block_forward(exec_, config_, rope_, b, o_.seq_len, 0, cache, h.data(),
                        [&](linear_kind kind, const float* x, index_t tokens) {
                          if (kind == linear_kind::q) attention.add(x, tokens);
                          if (kind == linear_kind::gate) mlp.add(x, tokens);
                        });
          stream.write(i, h);
        }
      }
      for (const linear_kind kind : {linear_kind::q, linear_kind::k, linear_kind::v}) {
        selection.add(sensitivity(l, kind, attention.result()));
      }
      for (const linear_kind kind : {linear_kind::gate, linear_kind::up}) {
        selection.add(sensitivity(l, kind, mlp.result()));
      }
      bar.advance();
    }
    stream_weak_ = selection.choose();
  }

  /// The weak columns of a linear, found when it is its turn.
  /// @param hessian_diagonal (IC); not used by layers that follow the stream
  column_list choose_columns(index_t block, linear_kind kind,
                             const std::vector<double>& hessian_diagonal) const {
    const index_t k = weak_columns_of(kind);
    if (k == 0) return {};
    if (reads_stream(kind) && o_.reorder) return stream_weak_;
    const auto s = sensitivity(block, kind, hessian_diagonal);
    return per_head(kind) ? qeft::top_k_per_head(s, config_.num_attention_heads,
                                                 config_.num_key_value_heads, k)
                          : qeft::top_k(s, k);
  }

  /// --weak-columns-from: the choice of another checkpoint of the same architecture, checked before
  /// any work is done.
  void take_weak_columns() {
    const std::string what = "quantize: --weak-columns-from " + o_.weak_columns_from;
    const model_source base(o_.weak_columns_from);
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      for (const linear_kind kind : all_linears) {
        const std::string name = linear_name(l, kind);
        const auto& q = base.config().quantization;
        const auto* d = q ? q->find(name) : nullptr;
        const linear_shape s = shape_of(config_, kind);
        if (d == nullptr || d->in_channels != s.in_channels || d->out_channels != s.out_channels) {
          fail(errc::invalid_argument,
               what + " has no quantised layer " + name + " of the same shape");
        }
        weak_[name] = qeft::io::read_linear(base.weights().reader(), name, *d).weak_index;
        if (o_.reorder && reads_stream(kind) &&
            weak_[name] != weak_.at(linear_name(0, linear_kind::q))) {
          fail(errc::invalid_argument, what + ": the weak columns of " + name +
                                           " are not those of the first layer, but all layers that "
                                           "read the residual stream must share them unless "
                                           "--reorder is off");
        }
      }
    }
    make_plan();  // throws when those of o_proj do not suit per_head
  }

  // ---- Quantisation
  // -------------------------------------------------------------------------------

  block_cache make_cache() const {
    return {config_.num_key_value_heads, config_.head_dim, o_.seq_len};
  }

  void embed(sample_store& stream) const {
    if (stream.samples() == 0) return;
    const linear embedding(
        exec_, source_.matrix("model.embed_tokens", config_.vocab_size, config_.hidden_size));
    std::vector<float> h(static_cast<std::size_t>(o_.seq_len * config_.hidden_size));
    for (index_t i = 0; i < stream.samples(); ++i) {
      float* row = h.data();
      for (const int id : windows_[static_cast<std::size_t>(i)]) {
        embedding.read_row(id, row);
        row += config_.hidden_size;
      }
      stream.write(i, h);
    }
  }

  /// Quantises one linear and puts it into the block, so that what follows is calibrated with it.
  void quantize(index_t l, linear_kind kind, const std::vector<double>& diagonal,
                qeft::span<const float> hessian, block* b) {
    const linear_shape s = shape_of(config_, kind);
    const std::string name = linear_name(l, kind);
    const std::vector<float> w = weight_of(l, kind);
    if (o_.weak_columns_from.empty()) weak_[name] = choose_columns(l, kind, diagonal);
    layer_options options = o_.layer;
    options.weak_columns = weak_.at(name);
    quantized_linear q;
    auto result =
        qeft::solver::quantize_layer(exec_, w, s.out_channels, s.in_channels, hessian, options);
    q.matrix = std::move(result.matrix);
    q.report = std::move(result.report);
    if (o_.compare_rtn) {
      options.method = layer_method::rtn;
      const auto rtn =
          qeft::solver::quantize_layer(exec_, w, s.out_channels, s.in_channels, hessian, options);
      q.rtn_error = rtn.report.output_error.value_or(-1);
    }
    if (q.report.damping > o_.layer.damping.damping) {
      std::fprintf(stderr, "%s: the Hessian needed a damping of %g\n", name.c_str(),
                   q.report.damping);
    }
    if (b != nullptr) linear_of(*b, kind).replace_weight(exec_, q.matrix);
    linears_.emplace(name, std::move(q));
  }

  void quantize_without_calibration() {
    progress bar("quantising", config_.num_hidden_layers);
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      for (const linear_kind kind : all_linears) quantize(l, kind, {}, {}, nullptr);
      bar.advance();
    }
  }

  void quantize_with_calibration() {
    const index_t n = o_.seq_len;
    sample_store stream(scratch_, o_.samples, n * config_.hidden_size);
    sample_store attention(scratch_, o_.samples,
                           n * config_.num_attention_heads * config_.head_dim);
    sample_store inner(scratch_, o_.samples, n * config_.intermediate_size);
    embed(stream);
    progress bar("quantising", 4 * config_.num_hidden_layers);
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      quantize_block(l, stream, attention, inner, bar);
    }
  }

  /// True-sequential: q k v, then o, then gate up, then down, each with the inputs that the
  /// quantised layers before it produce. One sample is resident at a time.
  void quantize_block(index_t l, sample_store& stream, sample_store& attention, sample_store& inner,
                      progress& bar) {
    const index_t n = o_.seq_len;
    const index_t hidden = config_.hidden_size;
    const auto epsilon = static_cast<float>(config_.rms_norm_eps);
    block b = load_block(exec_, source_, l);
    block_cache cache = make_cache();
    std::vector<float> h;
    std::vector<float> a;
    std::vector<float> x(static_cast<std::size_t>(n * hidden));
    const auto normed = [&](const std::vector<float>& weight) {
      rms_norm(exec_, h.data(), weight.data(), epsilon, n, hidden, x.data());
      return x.data();
    };
    const auto add_output = [&](const linear& w) {  // h += w(a)
      w.forward(exec_, a.data(), n, x.data());
      add(exec_, x.data(), n * hidden, h.data());
    };
    // Runs `step(sample)` on all samples, which returns the layers' input, and quantises the
    // layers.
    const auto calibrate = [&](std::initializer_list<linear_kind> kinds, auto&& step) {
      hessian_accumulator accumulator(shape_of(config_, *kinds.begin()).in_channels);
      for (index_t i = 0; i < o_.samples; ++i) accumulator.add(exec_, step(i), n);
      const std::vector<double> diagonal = accumulator.diagonal();
      const auto hessian = std::move(accumulator).finish();
      for (const linear_kind kind : kinds) quantize(l, kind, diagonal, hessian, &b);
      bar.advance();
    };

    calibrate({linear_kind::q, linear_kind::k, linear_kind::v}, [&](index_t i) {
      stream.read(i, h);
      return normed(b.attention_norm);
    });
    calibrate({linear_kind::o}, [&](index_t i) {
      stream.read(i, h);
      a.resize(static_cast<std::size_t>(n * b.o.in_channels()));
      attend(exec_, config_, rope_, b, normed(b.attention_norm), n, 0, cache, a.data());
      attention.write(i, a);
      return a.data();
    });
    calibrate({linear_kind::gate, linear_kind::up}, [&](index_t i) {
      stream.read(i, h);
      attention.read(i, a);
      add_output(b.o);
      stream.write(i, h);
      return normed(b.mlp_norm);
    });
    calibrate({linear_kind::down}, [&](index_t i) {
      stream.read(i, h);
      a.resize(static_cast<std::size_t>(n * config_.intermediate_size));
      mlp_inner(exec_, b, normed(b.mlp_norm), n, a.data());
      inner.write(i, a);
      return a.data();
    });
    for (index_t i = 0; i < o_.samples; ++i) {
      stream.read(i, h);
      inner.read(i, a);
      add_output(b.down);
      stream.write(i, h);
    }
  }

  // ---- Reordering and output
  // ----------------------------------------------------------------------

  /// Brings the weak columns of every layer to the tail (o_proj: to the tails of its heads, or not
  /// at all) by permuting channel spaces.
  qeft::reorder_plan make_plan() const {
    qeft::reorder_plan plan(graph_.graph);
    if (!o_.reorder) return plan;
    const auto weak_of = [&](index_t l, linear_kind kind) -> const column_list& {
      return weak_.at(linear_name(l, kind));
    };
    plan.set(graph_.stream, qeft::weak_last(config_.hidden_size, weak_of(0, linear_kind::q)));
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      const auto at = static_cast<std::size_t>(l);
      plan.set(graph_.mlp[at],
               qeft::weak_last(config_.intermediate_size, weak_of(l, linear_kind::down)));
      if (o_.o_proj_placement == qeft::weak_kind::per_head) {
        // The query heads of a value head share their weak channels: take the first of each group.
        const index_t repeats = config_.num_attention_heads / config_.num_key_value_heads;
        column_list value;
        for (const std::int32_t c : weak_of(l, linear_kind::o)) {
          const index_t head = c / config_.head_dim;
          if (head % repeats == 0) {
            value.push_back(static_cast<std::int32_t>(head / repeats * config_.head_dim +
                                                      c % config_.head_dim));
          }
        }
        plan.set(graph_.value[at],
                 qeft::weak_last_per_head(config_.num_key_value_heads * config_.head_dim,
                                          config_.num_key_value_heads, value));
      }
    }
    return plan;
  }

  static packed_matrix reordered(const qeft::reorder_plan& plan, const std::string& name,
                                 const packed_matrix& m, index_t heads = 1) {
    packed_matrix result = m;
    if (const auto* rows = plan.rows(name); rows != nullptr && !rows->is_identity()) {
      result = qeft::permute_rows(*rows, result);
    }
    if (const auto* columns = plan.columns(name); columns != nullptr && !columns->is_identity()) {
      result = qeft::permute_columns(*columns, result, heads);
    }
    return result;
  }

  void write(qeft::io::atomic_directory& out) {
    namespace io = qeft::io;
    const qeft::reorder_plan plan = make_plan();
    io::safetensors_writer writer(std::map<std::string, std::string>{{"format", "pt"}});
    std::vector<std::vector<float>> vectors;  // kept until the file is written
    std::vector<packed_matrix> matrices;
    vectors.reserve(16 + 16 * static_cast<std::size_t>(config_.num_hidden_layers));
    matrices.reserve(2);

    const auto add_full_precision = [&](const std::string& name) {
      matrices.push_back(
          reordered(plan, name, source_.matrix(name, config_.vocab_size, config_.hidden_size)));
      writer.add(name + ".weight", io::dtype_of(matrices.back().descriptor().scalar),
                 {config_.vocab_size, config_.hidden_size}, matrices.back().weak());
    };
    // A norm or a bias: its channels run over the columns of the described tensor.
    const auto add_vector = [&](const std::string& tensor, const std::string& described,
                                index_t size) {
      vectors.push_back(source_.vector(tensor, size));
      if (const auto* p = plan.columns(described)) {
        qeft::permute_columns(*p, qeft::span<float>(vectors.back()));
      }
      writer.add(tensor, io::dtype::f32, {size},
                 {reinterpret_cast<const std::byte*>(vectors.back().data()), 4 * size});
    };

    add_full_precision("model.embed_tokens");
    if (!config_.tie_word_embeddings) add_full_precision("lm_head");
    add_vector("model.norm.weight", "model.norm", config_.hidden_size);
    io::quantization_config quantization;
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      const std::string block = "model.layers." + std::to_string(l);
      for (const char* norm : {".input_layernorm", ".post_attention_layernorm"}) {
        add_vector(block + norm + ".weight", block + norm, config_.hidden_size);
      }
      for (const linear_kind kind : all_linears) {
        const std::string name = linear_name(l, kind);
        quantized_linear& q = linears_.at(name);
        q.matrix =
            reordered(plan, name, q.matrix, per_head(kind) ? config_.num_attention_heads : 1);
        io::add_linear(writer, name, q.matrix, weak_.at(name));
        quantization.layers[name] = q.matrix.descriptor();
        auto& report = quantization.provenance["layers"][name];
        if (q.report.output_error) report["loss"] = *q.report.output_error;
        if (q.rtn_error >= 0) report["rtn_loss"] = q.rtn_error;
        if (q.report.squared_error) report["squared_error"] = *q.report.squared_error;
        report["damping"] = q.report.damping;
        report["dead_inputs"] = q.report.dead_inputs.size();
        const std::string bias = name + ".bias";
        if (source_.weights().contains(bias)) {
          add_vector(bias, bias, shape_of(config_, kind).out_channels);
        }
      }
    }
    const auto add_permutation = [&](const std::string& space, const qeft::permutation& p) {
      if (!p.is_identity()) io::add_permutation(writer, space, p);
    };
    add_permutation("stream", plan.of(graph_.stream));
    for (std::size_t l = 0; l < graph_.mlp.size(); ++l) {
      add_permutation("mlp." + std::to_string(l), plan.of(graph_.mlp[l]));
      add_permutation("value." + std::to_string(l), plan.of(graph_.value[l]));
    }
    quantization.defaults = quantization.layers.begin()->second;
    auto& provenance = quantization.provenance;
    provenance["method"] = o_.layer.method == layer_method::optq ? "optq" : "rtn";
    provenance["search"] =
        o_.layer.search.method == qeft::solver::search_method::grid ? "grid" : "minmax";
    provenance["act_order"] = o_.layer.act_order;
    provenance["static_groups"] = o_.layer.static_groups;
    provenance["reorder"] = o_.reorder;
    if (needs_calibration()) {
      provenance["samples"] = o_.samples;
      provenance["seq_len"] = o_.seq_len;
      provenance["seed"] = o_.seed;
    }
    if (chooses_columns()) {
      provenance["selection"] = o_.selection == selection_metric::hessian ? "hessian"
                                : o_.selection == selection_metric::gradient
                                    ? "gradient"
                                    : "hessian_perturbation";
    }

    const std::filesystem::path from = o_.model;
    writer.write_directory(out.partial());
    nlohmann::json config = config_.source;
    config["quantization_config"] = io::to_json(quantization);
    io::write_text_file(out.partial() / "config.json", config.dump(2) + "\n");
    for (const char* file : {"tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                             "special_tokens_map.json", "added_tokens.json", "vocab.json",
                             "merges.txt", "chat_template.jinja", "generation_config.json"}) {
      if (std::filesystem::exists(from / file)) io::copy_file(from / file, out.partial() / file);
    }
    out.commit();
  }

  /// E = tr(dW H dW^T) against that of RTN; inspect shows every layer.
  void report_comparison() const {
    int better = 0;
    for (const auto& [name, q] : linears_) better += *q.report.output_error < q.rtn_error ? 1 : 0;
    std::fprintf(stderr, "E is below that of RTN on %d of %zu layers\n", better, linears_.size());
  }

  quantize_options o_;
  qeft::on_host exec_;
  model_source source_;
  model_config config_;
  rope_table rope_;
  llama_graph graph_;
  std::string scratch_;  // directory for activations
  std::vector<std::vector<int>> windows_;
  column_sensitivities gradients_;           // selection by gradient only
  column_list stream_weak_;                  // global selection only
  std::map<std::string, column_list> weak_;  // of every linear, once it is known
  std::map<std::string, quantized_linear> linears_;
};

}  // namespace

int run_quantize(const quantize_options& options) {
  quantizer(options).run();
  return 0;
}

}  // namespace qeft_llm
