// SPDX-License-Identifier: Apache-2.0
#include "calibration.hpp"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "elementwise.hpp"
#include "qeft/io/convert.hpp"
#include "qeft/solver/matrix_ops.hpp"

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
    stream.write(exec, i, h);
  }
}

// ---- layer_inputs -------------------------------------------------------------------------------

layer_inputs::layer_inputs(const qeft::on_host& exec, std::string name, index_t in_channels,
                           index_t samples, index_t tokens, reader_pair input,
                           stream_readers stream)
    : exec_(exec),
      name_(std::move(name)),
      in_channels_(in_channels),
      samples_(samples),
      tokens_(tokens),
      input_(std::move(input)),
      stream_(std::move(stream)) {}

const std::vector<double>& layer_inputs::diagonal() const {
  if (diagonal_.empty()) accumulate();
  return diagonal_;
}

qeft::span<const float> layer_inputs::hessian() const {
  if (diagonal_.empty()) accumulate();
  return hessian_;
}

qeft::host_buffer<float> layer_inputs::mismatch(
    qeft::span<const float> w, index_t out_channels,
    const qeft::solver::asymmetric_options& options) const {
  if (stream_.original_after) return mismatch_with_stream(w, out_channels, options);
  if (diagonal_.empty()) accumulate();
  return qeft::solver::output_mismatch(exec_, w, out_channels, in_channels_, input_mismatch_, {},
                                       options);
}

namespace {

/// to = original - here
void subtract(const qeft::on_host& exec, const float* original, const float* here,
              std::vector<float>& difference) {
  float* to = difference.data();
  exec.parallel_for(static_cast<index_t>(difference.size()), 16384, [=](index_t i, index_t end) {
    for (; i < end; ++i) to[i] = original[i] - here[i];
  });
}

/// m -= a W H
void subtract_product(const qeft::on_host& exec, qeft::span<const float> w,
                      qeft::span<const float> h, index_t out_channels, index_t in_channels,
                      double a, float* m) {
  constexpr index_t tile = 64;
  exec.parallel_for(out_channels, tile, [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; n += tile) {
      using qeft::solver::map_rows;
      const index_t rows = std::min(tile, end - n);
      map_rows(m + n * in_channels, rows, in_channels, in_channels).noalias() -=
          static_cast<float>(a) *
          (map_rows(w.data() + n * in_channels, rows, in_channels, in_channels) *
           map_rows(h.data(), in_channels, in_channels, in_channels));
    }
  });
}

}  // namespace

/// The original model has W x_original already: it is what the stream gained, less the bias. So
/// M = 2/T sum (a W x_original + r (h_original - h)) x^T - a W H, without D, whose size is IC^2.
qeft::host_buffer<float> layer_inputs::mismatch_with_stream(
    qeft::span<const float> w, index_t out_channels,
    const qeft::solver::asymmetric_options& options) const {
  const auto a = static_cast<float>(options.input);
  const auto r = static_cast<float>(options.stream);
  std::vector<float> bias = stream_.bias;
  bias.resize(static_cast<std::size_t>(out_channels));
  qeft::solver::cross_accumulator sum(out_channels, in_channels_);
  std::vector<float> e(static_cast<std::size_t>(tokens_ * out_channels));
  for (index_t i = 0; i < samples_; ++i) {
    const float* here = stream_.before.here(i);
    const float* before = stream_.before.original(i);
    const float* after = stream_.original_after(i);
    exec_.parallel_for(tokens_, 16, [&](index_t t, index_t end) {
      for (; t < end; ++t) {
        for (index_t n = 0; n < out_channels; ++n) {
          const index_t at = t * out_channels + n;
          e[static_cast<std::size_t>(at)] =
              a * (after[at] - before[at] - bias[static_cast<std::size_t>(n)]) +
              r * (before[at] - here[at]);
        }
      }
    });
    sum.add(exec_, e.data(), input_.here(i), tokens_);
  }
  qeft::host_buffer<float> m = std::move(sum).finish();
  subtract_product(exec_, w, hessian(), out_channels, in_channels_, options.input, m.data());
  return m;
}

void layer_inputs::accumulate() const {
  qeft::solver::hessian_accumulator sum(in_channels_);
  std::optional<qeft::solver::cross_accumulator> mismatch;
  std::vector<float> dx;
  if (input_.original && !stream_.original_after) {
    mismatch.emplace(in_channels_, in_channels_);
    dx.resize(static_cast<std::size_t>(tokens_ * in_channels_));
  }
  for (index_t i = 0; i < samples_; ++i) {
    const float* x = input_.here(i);
    add_sample(exec_, sum, name_, i, x, tokens_, in_channels_);
    if (!mismatch) continue;
    subtract(exec_, input_.original(i), x, dx);
    mismatch->add(exec_, dx.data(), x, tokens_);
  }
  diagonal_ = sum.diagonal();
  try {
    hessian_ = std::move(sum).finish();
    if (mismatch) input_mismatch_ = std::move(*mismatch).finish();
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

calibration::activations::activations(const std::filesystem::path& directory,
                                      const model_config& config, index_t samples, index_t tokens)
    : streams{{directory / "stream.0", samples, tokens * config.hidden_size},
              {directory / "stream.1", samples, tokens * config.hidden_size}},
      middle(directory / "middle", samples, tokens * config.hidden_size),
      attention(directory / "attention", samples,
                tokens * shape_of(config, linear_kind::o).in_channels),
      inner(directory / "inner", samples,
            tokens * shape_of(config, linear_kind::down).in_channels) {}

calibration::calibration(const qeft::on_host& exec, const model_source& source,
                         const token_windows& windows, const std::filesystem::path& directory,
                         bool beside, index_t first)
    : exec_(exec),
      source_(source),
      samples_(static_cast<index_t>(windows.size())),
      tokens_(static_cast<index_t>(windows.at(0).size())),
      rope_(source.config(), tokens_),
      cache_(source.config().num_key_value_heads, source.config().head_dim, tokens_),
      block_(first),
      here_(directory, source.config(), samples_, tokens_) {
  if (beside) {
    std::filesystem::create_directories(directory / "original");
    original_.emplace(directory / "original", source.config(), samples_, tokens_);
  }
  if (first > 0) return;
  embed(exec, source, windows, here_.streams[0]);
  if (original_) embed(exec, source, windows, original_->streams[0]);
}

/// A block at work on all samples of one model, phase by phase, from file to file.
class calibration::phases {
 public:
  phases(calibration& c, block& b, activations& at)
      : c_(c),
        b_(b),
        before_(at.streams[c.block_ % 2]),
        middle_(at.middle),
        after_(at.streams[(c.block_ + 1) % 2]),
        attention_(at.attention),
        inner_(at.inner) {}

  // What the linears read, and the stream before, between and after attention and MLP.
  sample_reader attention_input() const { return normed(before_, b_.attention_norm); }
  sample_reader o_input() const { return stored(attention_); }
  sample_reader stream_before() const { return stored(before_); }
  sample_reader stream_between() const { return stored(middle_); }
  sample_reader stream_after() const { return stored(after_); }
  sample_reader mlp_input() const { return normed(middle_, b_.mlp_norm); }
  sample_reader down_input() const { return stored(inner_); }

  void attend() {
    fill(attention_, attention_input(), [&](const float* x, float* out) {
      qeft_llm::attend(c_.exec_, c_.source_.config(), c_.rope_, b_, x, c_.tokens_, 0, c_.cache_,
                       out);
    });
  }
  void add_attention() { add_output(before_, b_.o, attention_, middle_); }
  void multiply() {
    fill(inner_, mlp_input(),
         [&](const float* x, float* out) { mlp_inner(c_.exec_, b_, x, c_.tokens_, out); });
  }
  void add_mlp() {
    add_output(middle_, b_.down, inner_, after_);
    after_.sync();
  }

 private:
  index_t stream_size() const { return c_.tokens_ * c_.source_.config().hidden_size; }

  sample_reader stored(const sample_store& from) const {
    return [this, &from, x = std::vector<float>()](index_t i) mutable -> const float* {
      from.read(c_.exec_, i, x);
      return x.data();
    };
  }
  sample_reader normed(const sample_store& stream, const std::vector<float>& weight) const {
    return [this, &weight, h = stored(stream),
            x = std::vector<float>(static_cast<std::size_t>(stream_size()))](
               index_t i) mutable -> const float* {
      const model_config& config = c_.source_.config();
      rms_norm(c_.exec_, h(i), weight.data(), static_cast<float>(config.rms_norm_eps), c_.tokens_,
               config.hidden_size, x.data());
      return x.data();
    };
  }

  /// to[i] = what compute(x, out) makes of input i
  template <class Compute>
  void fill(sample_store& to, const sample_reader& input, const Compute& compute) const {
    std::vector<float> out(static_cast<std::size_t>(to.sample_size()));
    for (index_t i = 0; i < c_.samples_; ++i) {
      compute(input(i), out.data());
      to.write(c_.exec_, i, out);
    }
  }
  /// to[i] = from[i] + w(inputs[i])
  void add_output(const sample_store& from, const linear& w, const sample_store& inputs,
                  sample_store& to) const {
    std::vector<float> h;
    std::vector<float> x;
    std::vector<float> y(static_cast<std::size_t>(stream_size()));
    for (index_t i = 0; i < c_.samples_; ++i) {
      from.read(c_.exec_, i, h);
      inputs.read(c_.exec_, i, x);
      w.forward(c_.exec_, x.data(), c_.tokens_, y.data());
      add(c_.exec_, y.data(), stream_size(), h.data());
      to.write(c_.exec_, i, h);
    }
  }

  calibration& c_;
  block& b_;
  const sample_store& before_;
  sample_store& middle_;
  sample_store& after_;
  sample_store& attention_;
  sample_store& inner_;
};

void calibration::run_block(const replace_linear& replace) {
  const model_config& config = source_.config();
  block b = load_block(exec_, source_, block_);
  std::optional<phases> original;
  if (original_) {
    original.emplace(*this, b, *original_);
    original->attend();
    original->add_attention();
    original->multiply();
    original->add_mlp();
  }
  phases here(*this, b, here_);
  using reader = sample_reader (phases::*)() const;
  const auto read = [&](reader what) {
    return reader_pair{(here.*what)(), original ? ((*original).*what)() : sample_reader()};
  };
  /// The stream around a linear that adds to it.
  const auto around = [&](linear_kind kind, reader before, reader after) {
    if (!original) return stream_readers();
    std::vector<float> bias;
    if (has_bias(config, kind)) {
      bias = source_.vector(linear_name(block_, kind) + ".bias", config.hidden_size);
    }
    return stream_readers{read(before), ((*original).*after)(), std::move(bias)};
  };
  /// Linears that share their input.
  const auto replace_all = [&](std::initializer_list<linear_kind> kinds, reader_pair input,
                               stream_readers stream = {}) {
    const linear_kind first = *kinds.begin();
    const layer_inputs inputs(exec_, linear_name(block_, first),
                              shape_of(config, first).in_channels, samples_, tokens_,
                              std::move(input), std::move(stream));
    for (const linear_kind kind : kinds) {
      const linear_replacement by = replace(block_, kind, inputs);
      linear_of(b, kind).replace_weight(exec_, by.weight, by.order);
    }
  };

  replace_all({linear_kind::q, linear_kind::k, linear_kind::v}, read(&phases::attention_input));
  here.attend();
  replace_all({linear_kind::o}, read(&phases::o_input),
              around(linear_kind::o, &phases::stream_before, &phases::stream_between));
  here.add_attention();
  replace_all({linear_kind::gate, linear_kind::up}, read(&phases::mlp_input));
  here.multiply();
  replace_all({linear_kind::down}, read(&phases::down_input),
              around(linear_kind::down, &phases::stream_between, &phases::stream_after));
  here.add_mlp();
  ++block_;
}

}  // namespace qeft_llm
