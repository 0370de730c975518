// SPDX-License-Identifier: Apache-2.0
#include "calibration.hpp"

#include <initializer_list>
#include <string>
#include <utility>

#include "elementwise.hpp"
#include "qeft/io/convert.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

void embed(const qeft::on_host& exec, const model_source& source, const token_windows& windows,
           sample_store& stream) {
  const model_config& config = source.config();
  const linear embedding(
      exec, source.matrix("model.embed_tokens", config.vocab_size, config.hidden_size));
  std::vector<float> h(static_cast<std::size_t>(stream.sample_size()));
  for (index_t i = 0; i < stream.samples(); ++i) {
    float* row = h.data();
    for (const int id : windows[static_cast<std::size_t>(i)]) {
      embedding.read_row(id, row);
      row += config.hidden_size;
    }
    stream.write(i, h);
  }
}

// ---- layer_inputs -------------------------------------------------------------------------------

layer_inputs::layer_inputs(const qeft::on_host& exec, std::string name, index_t in_channels,
                           index_t samples, index_t tokens, reader read)
    : exec_(exec),
      name_(std::move(name)),
      in_channels_(in_channels),
      samples_(samples),
      tokens_(tokens),
      read_(std::move(read)) {}

const std::vector<double>& layer_inputs::diagonal() const {
  if (diagonal_.empty()) accumulate();
  return diagonal_;
}

qeft::span<const float> layer_inputs::hessian() const {
  if (diagonal_.empty()) accumulate();
  return hessian_;
}

void layer_inputs::accumulate() const {
  qeft::solver::hessian_accumulator sum(in_channels_);
  for (index_t i = 0; i < samples_; ++i) {
    const float* x = read_(i);
    require_finite_activations(name_, i, x, tokens_, in_channels_);
    sum.add(exec_, x, tokens_);
  }
  diagonal_ = sum.diagonal();
  try {
    hessian_ = std::move(sum).finish();
  } catch (const qeft::error& e) {
    fail(e.code(), name_ +
                       ": the activations of the model are so large that their squares overflow "
                       "FP32 (" +
                       e.what() + ")");
  }
}

void require_finite_activations(const std::string& layer, index_t sample, const float* x,
                                index_t tokens, index_t channels) {
  const index_t at = qeft::io::find_not_finite({x, tokens * channels});
  if (at < 0) return;
  fail(errc::not_finite, layer + ": the activations of the model are not finite: its input is " +
                             std::to_string(x[at]) + " at token " + std::to_string(at / channels) +
                             ", channel " + std::to_string(at % channels) +
                             " of calibration sample " + std::to_string(sample));
}

// ---- calibration --------------------------------------------------------------------------------

calibration::calibration(const qeft::on_host& exec, const model_source& source,
                         const token_windows& windows, const std::filesystem::path& directory,
                         index_t first)
    : exec_(exec),
      source_(source),
      samples_(static_cast<index_t>(windows.size())),
      tokens_(static_cast<index_t>(windows.at(0).size())),
      rope_(source.config(), tokens_),
      cache_(source.config().num_key_value_heads, source.config().head_dim, tokens_),
      block_(first),
      streams_{{directory / "stream.0", samples_, tokens_ * source.config().hidden_size},
               {directory / "stream.1", samples_, tokens_ * source.config().hidden_size}},
      attention_(directory / "attention", samples_,
                 tokens_ * shape_of(source.config(), linear_kind::o).in_channels),
      inner_(directory / "inner", samples_,
             tokens_ * shape_of(source.config(), linear_kind::down).in_channels) {
  if (first == 0) embed(exec, source, windows, streams_[0]);
}

void calibration::run_block(const replace_linear& replace) {
  const model_config& config = source_.config();
  const index_t hidden = config.hidden_size;
  const auto epsilon = static_cast<float>(config.rms_norm_eps);
  const sample_store& before = streams_[block_ % 2];
  sample_store& after = streams_[(block_ + 1) % 2];
  block b = load_block(exec_, source_, block_);

  std::vector<float> h;  // the stream of a sample
  std::vector<float> a;  // the input of a linear that writes to it
  std::vector<float> x(static_cast<std::size_t>(tokens_ * hidden));
  const auto norm_of = [&](const sample_store& stream, const std::vector<float>& weight) {
    return [&](index_t i) -> const float* {
      stream.read(i, h);
      rms_norm(exec_, h.data(), weight.data(), epsilon, tokens_, hidden, x.data());
      return x.data();
    };
  };
  const auto stored = [&](const sample_store& inputs) {
    return [&](index_t i) -> const float* {
      inputs.read(i, a);
      return a.data();
    };
  };
  /// Linears that share their input.
  const auto replace_all = [&](std::initializer_list<linear_kind> kinds,
                               const layer_inputs::reader& read) {
    const linear_kind first = *kinds.begin();
    const layer_inputs inputs(exec_, linear_name(block_, first),
                              shape_of(config, first).in_channels, samples_, tokens_, read);
    for (const linear_kind kind : kinds) {
      linear_of(b, kind).replace_weight(exec_, replace(block_, kind, inputs));
    }
  };
  const auto for_each_sample = [&](const auto& body) {
    for (index_t i = 0; i < samples_; ++i) body(i);
  };
  /// to[i] = from[i] + w(inputs[i])
  const auto add_output = [&](const sample_store& from, const linear& w, const sample_store& inputs,
                              sample_store& to) {
    for_each_sample([&](index_t i) {
      from.read(i, h);
      inputs.read(i, a);
      w.forward(exec_, a.data(), tokens_, x.data());
      add(exec_, x.data(), tokens_ * hidden, h.data());
      to.write(i, h);
    });
  };
  const auto attention_in = norm_of(before, b.attention_norm);
  const auto mlp_in = norm_of(after, b.mlp_norm);

  replace_all({linear_kind::q, linear_kind::k, linear_kind::v}, attention_in);
  for_each_sample([&](index_t i) {
    a.resize(static_cast<std::size_t>(attention_.sample_size()));
    attend(exec_, config, rope_, b, attention_in(i), tokens_, 0, cache_, a.data());
    attention_.write(i, a);
  });
  replace_all({linear_kind::o}, stored(attention_));
  add_output(before, b.o, attention_, after);
  replace_all({linear_kind::gate, linear_kind::up}, mlp_in);
  for_each_sample([&](index_t i) {
    a.resize(static_cast<std::size_t>(inner_.sample_size()));
    mlp_inner(exec_, b, mlp_in(i), tokens_, a.data());
    inner_.write(i, a);
  });
  replace_all({linear_kind::down}, stored(inner_));
  add_output(after, b.down, inner_, after);
  after.sync();
  ++block_;
}

}  // namespace qeft_llm
