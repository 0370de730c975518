// SPDX-License-Identifier: Apache-2.0
#include "weak_choice.hpp"

#include <utility>

#include "gradient.hpp"
#include "progress.hpp"
#include "qeft/io/checkpoint.hpp"
#include "qeft/reorder/weak_selection.hpp"
#include "qeft/solver/quantize_layer.hpp"
#include "qeft/solver/scalar_choice.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::selection_metric;

bool reads_stream(linear_kind kind) { return kind != linear_kind::o && kind != linear_kind::down; }

std::vector<float> weight_of(const model_source& source, index_t block, linear_kind kind) {
  const linear_shape s = shape_of(source.config(), kind);
  return source.weights().read(linear_name(block, kind) + ".weight",
                               {s.out_channels, s.in_channels});
}

qeft::solver::layer_options options_for(const qeft::on_host& exec, const quantize_options& options,
                                        const std::vector<float>& weight, linear_shape shape,
                                        const column_list& weak) {
  qeft::solver::layer_options o = options.layer;
  o.weak_columns = weak;
  o.scalar = qeft::solver::choose_scalar(exec, weight, shape.out_channels, shape.in_channels, o);
  return o;
}

weak_choice::weak_choice(const quantize_options& options, const qeft::on_host& exec,
                         const model_source& source)
    : o_(options), exec_(exec), source_(source), config_(source.config()) {}

bool weak_choice::per_head(linear_kind kind) const {
  return kind == linear_kind::o && o_.o_proj_placement == qeft::weak_kind::per_head;
}

index_t weak_choice::count(linear_kind kind) const {
  return per_head(kind) ? qeft::round_up(o_.weak_columns, config_.num_attention_heads)
                        : o_.weak_columns;
}

void weak_choice::take_from(const std::filesystem::path& checkpoint) {
  const std::string what = "quantize: --weak-columns-from " + checkpoint.string();
  const model_source base(checkpoint);
  const auto& quantization = base.config().quantization;
  for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) {
      const std::string name = linear_name(l, kind);
      const auto* d = quantization ? quantization->find(name) : nullptr;
      const linear_shape s = shape_of(config_, kind);
      if (d == nullptr || d->in_channels != s.in_channels || d->out_channels != s.out_channels) {
        fail(errc::invalid_argument,
             what + " has no quantised layer " + name + " of the same shape");
      }
      known_[name] = qeft::io::read_linear(base.weights().reader(), name, *d).weak_index;
      if (o_.reorder && reads_stream(kind) &&
          known_[name] != known_.at(linear_name(0, linear_kind::q))) {
        fail(errc::invalid_argument, what + ": the weak columns of " + name +
                                         " are not those of the first layer, but all layers that "
                                         "read the residual stream must share them unless "
                                         "--reorder is off");
      }
    }
  }
}

void weak_choice::choose_ahead(const token_windows& windows,
                               const std::filesystem::path& directory) {
  if (o_.selection == selection_metric::gradient) {
    choose_by_gradient(windows);
  } else if (o_.reorder) {
    choose_stream_by_hessian(windows, directory);
  }
}

const column_list& weak_choice::of(index_t block, linear_kind kind, const layer_inputs* inputs) {
  const std::string name = linear_name(block, kind);
  const auto found = known_.find(name);
  if (found != known_.end()) return found->second;
  column_list& columns = known_[name];
  if (count(kind) > 0) columns = top(kind, by_hessian(block, kind, inputs->diagonal()));
  return columns;
}

void weak_choice::restore(const nlohmann::json& known) {
  known_ = known.get<std::map<std::string, column_list>>();
}

/// The sensitivity of a linear's input columns by one of the metrics that the Hessian is part of.
std::vector<double> weak_choice::by_hessian(index_t block, linear_kind kind,
                                            const std::vector<double>& diagonal) const {
  if (o_.selection == selection_metric::hessian) return diagonal;
  const linear_shape s = shape_of(config_, kind);
  const std::vector<float> w = weight_of(source_, block, kind);
  return qeft::hessian_perturbation(
      diagonal, qeft::solver::perturbation(exec_, w, s.out_channels, s.in_channels,
                                           options_for(exec_, o_, w, s, {})));
}

column_list weak_choice::top(linear_kind kind, const std::vector<double>& sensitivity) const {
  return per_head(kind) ? qeft::top_k_per_head(sensitivity, config_.num_attention_heads,
                                               config_.num_key_value_heads, count(kind))
                        : qeft::top_k(sensitivity, count(kind));
}

void weak_choice::set_stream(const column_list& columns) {
  for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) {
      if (reads_stream(kind)) known_[linear_name(l, kind)] = columns;
    }
  }
}

void weak_choice::choose_by_gradient(const token_windows& windows) {
  progress bar("gradients", o_.samples);
  const column_sensitivities found = gradient_sensitivity(
      exec_, config_, source_.weights(), windows, [&](index_t, double) { bar.advance(); });
  qeft::global_selection selection(config_.hidden_size, o_.weak_columns, o_.accumulation);
  for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) {
      const std::vector<double>& sensitivity = found.at(linear_name(l, kind));
      if (o_.reorder && reads_stream(kind)) {
        selection.add(sensitivity);
      } else {
        known_[linear_name(l, kind)] = top(kind, sensitivity);
      }
    }
  }
  if (o_.reorder) set_stream(selection.choose());
}

void weak_choice::choose_stream_by_hessian(const token_windows& windows,
                                           const std::filesystem::path& directory) {
  const auto samples = static_cast<index_t>(windows.size());
  const auto tokens = static_cast<index_t>(windows.at(0).size());
  const rope_table rope(config_, tokens);
  block_cache cache(config_.num_key_value_heads, config_.head_dim, tokens);
  sample_store stream(directory / "stream.0", samples, tokens * config_.hidden_size);
  embed(exec_, source_, windows, stream);
  qeft::global_selection selection(config_.hidden_size, o_.weak_columns, o_.accumulation);
  progress bar("choosing weak columns", config_.num_hidden_layers);
  for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
    const block b = load_block(exec_, source_, l);
    // q, k and v have the same input, gate and up as well.
    qeft::solver::diagonal_accumulator attention(config_.hidden_size);
    qeft::solver::diagonal_accumulator mlp(config_.hidden_size);
    std::vector<float> h;
    for (index_t i = 0; i < samples; ++i) {
      stream.read(i, h);
      block_forward(exec_, config_, rope, b, tokens, 0, cache, h.data(),
                    [&](linear_kind kind, const float* x, index_t n) {
                      require_finite_activations(linear_name(l, kind), i, x, n,
                                                 shape_of(config_, kind).in_channels);
                      if (kind == linear_kind::q) attention.add(exec_, x, n);
                      if (kind == linear_kind::gate) mlp.add(exec_, x, n);
                    });
      stream.write(i, h);
    }
    for (const linear_kind kind : {linear_kind::q, linear_kind::k, linear_kind::v}) {
      selection.add(by_hessian(l, kind, attention.diagonal()));
    }
    for (const linear_kind kind : {linear_kind::gate, linear_kind::up}) {
      selection.add(by_hessian(l, kind, mlp.diagonal()));
    }
    bar.advance();
  }
  set_stream(selection.choose());
}

}  // namespace qeft_llm
