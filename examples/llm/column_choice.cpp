// SPDX-License-Identifier: Apache-2.0
#include "column_choice.hpp"

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

column_list places_of(const column_list& columns, const qeft::permutation& order) {
  const qeft::permutation place = order.inverse();
  column_list places;
  for (const std::int32_t c : columns) places.push_back(static_cast<std::int32_t>(place[c]));
  return places;
}

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

column_choice::column_choice(const quantize_options& options, const qeft::on_host& exec,
                             const model_source& source)
    : o_(options), exec_(exec), source_(source), config_(source.config()) {}

bool column_choice::per_head(linear_kind kind) const {
  return kind == linear_kind::o && o_.o_proj_placement == qeft::weak_kind::per_head;
}

bool column_choice::sorts(linear_kind kind) const {
  return o_.sorts_columns() && (kind != linear_kind::o || per_head(kind));
}

index_t column_choice::count(linear_kind kind) const {
  return per_head(kind) ? qeft::round_up(o_.weak_columns, config_.num_attention_heads)
                        : o_.weak_columns;
}

void column_choice::take_from(const std::filesystem::path& checkpoint) {
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
}

void column_choice::choose_ahead(const token_windows& windows,
                                 const std::filesystem::path& directory) {
  if (o_.selection == selection_metric::gradient) {
    choose_by_gradient(windows);
  } else if (o_.reorder) {
    choose_stream_by_hessian(windows, directory);
  }
}

const column_list& column_choice::weak(index_t block, linear_kind kind,
                                       const layer_inputs* inputs) {
  const std::string name = linear_name(block, kind);
  const auto found = weak_.find(name);
  if (found != weak_.end()) return found->second;
  column_list& columns = weak_[name];
  if (count(kind) > 0) columns = top(kind, by_hessian(block, kind, inputs->diagonal()));
  return columns;
}

const qeft::permutation& column_choice::order(index_t block, linear_kind kind,
                                              const layer_inputs* inputs) {
  const std::string name = linear_name(block, kind);
  const auto found = order_.find(name);
  if (found != order_.end()) return found->second;
  return order_[name] =
             sorts(kind) ? sorted(kind, by_hessian(block, kind, inputs->diagonal()), weak_.at(name))
                         : qeft::permutation::identity(shape_of(config_, kind).in_channels);
}

nlohmann::json column_choice::to_json() const {
  nlohmann::json known = {{"weak", weak_}, {"order", nlohmann::json::object()}};
  for (const auto& [name, order] : order_) known["order"][name] = order.source();
  return known;
}

void column_choice::restore(const nlohmann::json& known) {
  weak_ = known.at("weak").get<std::map<std::string, column_list>>();
  for (const auto& [name, order] : known.at("order").items()) {
    order_[name] = qeft::permutation(order.get<std::vector<std::int32_t>>());
  }
}

/// The sensitivity of a linear's input columns by one of the metrics that the Hessian is part of.
std::vector<double> column_choice::by_hessian(index_t block, linear_kind kind,
                                              const std::vector<double>& diagonal) const {
  if (o_.selection == selection_metric::hessian) return diagonal;
  const linear_shape s = shape_of(config_, kind);
  const std::vector<float> w = weight_of(source_, block, kind);
  return qeft::hessian_perturbation(
      diagonal, qeft::solver::perturbation(exec_, w, s.out_channels, s.in_channels,
                                           options_for(exec_, o_, w, s, {})));
}

column_list column_choice::top(linear_kind kind, const std::vector<double>& sensitivity) const {
  return per_head(kind) ? qeft::top_k_per_head(sensitivity, config_.num_attention_heads,
                                               config_.num_key_value_heads, count(kind))
                        : qeft::top_k(sensitivity, count(kind));
}

qeft::permutation column_choice::sorted(linear_kind kind, const std::vector<double>& sensitivity,
                                        const column_list& weak) const {
  return per_head(kind) ? qeft::by_sensitivity_per_head(sensitivity, config_.num_attention_heads,
                                                        config_.num_key_value_heads, weak)
                        : qeft::by_sensitivity(sensitivity, weak);
}

/// The sensitivity of the residual stream's channels over all linears that read it.
class column_choice::stream_sensitivity {
 public:
  explicit stream_sensitivity(const column_choice& c)
      : weak_(c.config_.hidden_size, c.o_.chooses_columns() ? c.o_.weak_columns : 0,
              c.o_.accumulation),
        order_(c.config_.hidden_size, 0, qeft::accumulation::all_columns) {}

  void add(const std::vector<double>& of_linear) {
    weak_.add(of_linear);
    order_.add(of_linear);
  }
  column_list weak() const { return weak_.choose(); }
  const std::vector<double>& sum() const { return order_.sum(); }

 private:
  qeft::global_selection weak_;
  qeft::global_selection order_;
};

void column_choice::set_stream(const stream_sensitivity& sensitivity) {
  for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) {
      if (!reads_stream(kind)) continue;
      const std::string name = linear_name(l, kind);
      if (o_.chooses_columns()) weak_[name] = sensitivity.weak();
      if (sorts(kind)) order_[name] = sorted(kind, sensitivity.sum(), weak(l, kind, nullptr));
    }
  }
}

void column_choice::choose_by_gradient(const token_windows& windows) {
  progress bar("gradients", o_.samples);
  const column_sensitivities found = gradient_sensitivity(
      exec_, config_, source_.weights(), windows, [&](index_t, double) { bar.advance(); });
  stream_sensitivity stream(*this);
  for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) {
      const std::string name = linear_name(l, kind);
      const std::vector<double>& sensitivity = found.at(name);
      if (o_.reorder && reads_stream(kind)) {
        stream.add(sensitivity);
        continue;
      }
      if (o_.chooses_columns()) weak_[name] = top(kind, sensitivity);
      if (sorts(kind)) order_[name] = sorted(kind, sensitivity, weak(l, kind, nullptr));
    }
  }
  if (o_.reorder) set_stream(stream);
}

void column_choice::choose_stream_by_hessian(const token_windows& windows,
                                             const std::filesystem::path& directory) {
  const auto samples = static_cast<index_t>(windows.size());
  const auto tokens = static_cast<index_t>(windows.at(0).size());
  const rope_table rope(config_, tokens);
  block_cache cache(config_.num_key_value_heads, config_.head_dim, tokens);
  sample_store stream(directory / "stream.0", samples, tokens * config_.hidden_size);
  embed(exec_, source_, windows, stream);
  stream_sensitivity sensitivity(*this);
  progress bar("choosing weak columns", config_.num_hidden_layers);
  for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
    const block b = load_block(exec_, source_, l);
    // q, k and v have the same input, gate and up as well.
    qeft::solver::diagonal_accumulator attention(config_.hidden_size);
    qeft::solver::diagonal_accumulator mlp(config_.hidden_size);
    std::vector<float> h;
    for (index_t i = 0; i < samples; ++i) {
      stream.read(exec_, i, h);
      block_forward(exec_, config_, rope, b, tokens, 0, cache, h.data(),
                    [&](linear_kind kind, const float* x, index_t n) {
                      const index_t channels = shape_of(config_, kind).in_channels;
                      const std::string name = linear_name(l, kind);
                      if (kind == linear_kind::q) {
                        add_sample(exec_, attention, name, i, x, n, channels);
                      } else if (kind == linear_kind::gate) {
                        add_sample(exec_, mlp, name, i, x, n, channels);
                      } else if (kind == linear_kind::o || kind == linear_kind::down) {
                        require_finite_activations(name, i, x, n, channels);
                      }
                    });
      stream.write(exec_, i, h);
    }
    for (const linear_kind kind : {linear_kind::q, linear_kind::k, linear_kind::v}) {
      sensitivity.add(by_hessian(l, kind, attention.diagonal()));
    }
    for (const linear_kind kind : {linear_kind::gate, linear_kind::up}) {
      sensitivity.add(by_hessian(l, kind, mlp.diagonal()));
    }
    bar.advance();
  }
  set_stream(sensitivity);
}

}  // namespace qeft_llm
