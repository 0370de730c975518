// SPDX-License-Identifier: Apache-2.0
#include "tuned_model.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "elementwise.hpp"
#include "qeft/core/text.hpp"
#include "qeft/io/convert.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::text;

namespace {

// Rows of logits held at a time: 128 x 49152 floats are 24 MiB.
constexpr index_t logit_rows = 128;

void check_sample(const model_config& config, const training_sample& sample) {
  const auto count = static_cast<index_t>(sample.tokens.size());
  if (count < 2 || count > config.max_position_embeddings) {
    fail(errc::invalid_argument,
         text("tuned_model: the sample has ", count, " tokens, but must have between 2 and ",
              config.max_position_embeddings));
  }
  if (sample.counted.size() != sample.tokens.size() || sample.counted[0] != 0) {
    fail(errc::invalid_argument,
         text("tuned_model: counted has ", static_cast<index_t>(sample.counted.size()),
              " elements, but must have ", count, ", the first of them false"));
  }
  for (const int token : sample.tokens) {
    if (token >= 0 && token < config.vocab_size) continue;
    fail(errc::invalid_argument, text("tuned_model: the sample holds token ", token,
                                      ", but the vocabulary has ", config.vocab_size));
  }
}

/// -log softmax(logits)[target]; the logits become the gradient of that.
double cross_entropy_of(float* logits, index_t vocabulary, int target) {
  const float largest = *std::max_element(logits, logits + vocabulary);
  const double of_target = static_cast<double>(logits[target]) - static_cast<double>(largest);
  for (index_t v = 0; v < vocabulary; ++v) logits[v] = exp_clamped(logits[v] - largest);
  double sum = 0;
  for (index_t v = 0; v < vocabulary; ++v) sum += static_cast<double>(logits[v]);
  const auto factor = static_cast<float>(1 / sum);
  for (index_t v = 0; v < vocabulary; ++v) logits[v] *= factor;
  logits[target] -= 1.0F;
  return std::log(sum) - of_target;
}

}  // namespace

tensor_reader reader_of(const model_source& source) {
  return {[&source](const std::string& name, index_t out_channels, index_t in_channels) {
            return source.matrix(name, out_channels, in_channels);
          },
          [&source](const std::string& name, index_t size) { return source.vector(name, size); }};
}

linear_maker weak_column_tuning(const qeft::on_host& exec, const model_config& config) {
  return [exec, &config](const std::string& name, const packed_matrix& weight,
                         std::vector<float> bias) -> std::unique_ptr<tuned_linear> {
    const bool quantised = config.quantization && config.quantization->find(name) != nullptr;
    if (!quantised || weight.descriptor().weak_columns == 0) {
      return std::make_unique<frozen>(exec, weight, std::move(bias));
    }
    return std::make_unique<weak_tuning>(exec, weight, std::move(bias));
  };
}

logits_loss cross_entropy(const qeft::on_host& exec, const std::vector<int>& tokens,
                          index_t vocabulary) {
  return [exec, &tokens, vocabulary](qeft::span<const index_t> positions, float* logits,
                                     double* losses) {
    exec.parallel_for(positions.size(), 1, [&](index_t i, index_t end) {
      for (; i < end; ++i) {
        losses[i] = cross_entropy_of(logits + i * vocabulary, vocabulary,
                                     tokens[static_cast<std::size_t>(positions[i])]);
      }
    });
  };
}

tuned_model::tuned_model(const qeft::on_host& exec, const model_source& source,
                         const tuning_options& options)
    : tuned_model(exec, source.config(), reader_of(source),
                  weak_column_tuning(exec, source.config()), options) {
  source.report_rounding();
}

tuned_model::tuned_model(const qeft::on_host& exec, const model_config& config,
                         const tensor_reader& read, const linear_maker& make,
                         const tuning_options& options)
    : exec_(exec), config_(config), options_(options) {
  const index_t hidden = config.hidden_size;
  embedding_ = linear(exec, read.matrix("model.embed_tokens", config.vocab_size, hidden));
  for (index_t l = 0; l < config.num_hidden_layers; ++l) {
    blocks_.push_back(load_tuned_block(config, read, make, l));
    blocks_.back().add_parameters(l, options.norms, parameters_);
  }
  norm_.value = read.vector("model.norm.weight", hidden);
  if (options.norms) norm_.train("model.norm.weight", parameters_);
  if (!config.tie_word_embeddings) {
    head_ = linear(exec, read.matrix("lm_head", config.vocab_size, hidden));
  }
}

void tuned_model::clear_gradients() {
  for (const parameter& p : parameters_) std::fill_n(p.gradient, p.size(), 0.0F);
}

index_t tuned_model::saved_channels() const {
  index_t sum = 0;
  for (const tuned_block& b : blocks_) {
    for (const linear_kind kind : all_linears) sum += b[kind].saved_channels();
  }
  return sum;
}

void tuned_model::update() {
  for (std::size_t l = 0; l < blocks_.size(); ++l) {
    for (const linear_kind kind : all_linears) {
      try {
        blocks_[l][kind].update(exec_);
      } catch (const qeft::error& e) {
        fail(e.code(), linear_name(static_cast<index_t>(l), kind) + ": " + e.what());
      }
    }
  }
}

double tuned_model::backward(const training_sample& sample, double factor) {
  return backward(sample, factor, cross_entropy(exec_, sample.tokens, config_.vocab_size));
}

double tuned_model::loss(const training_sample& sample) {
  return loss(sample, cross_entropy(exec_, sample.tokens, config_.vocab_size));
}

double tuned_model::loss(const training_sample& sample, const logits_loss& loss) {
  prepare(sample);
  floats stream = embed(sample.tokens);
  for (std::size_t l = 0; l < blocks_.size(); ++l) run_block(l, stream, sample, nullptr);
  return head_pass(sample, stream, loss, 0, nullptr);
}

double tuned_model::backward(const training_sample& sample, double factor,
                             const logits_loss& loss) {
  prepare(sample);
  const auto tokens = static_cast<index_t>(sample.tokens.size());
  std::vector<floats> inputs;  // of each block
  std::vector<block_tape> tapes(options_.keep_tapes ? blocks_.size() : 0);
  floats stream = embed(sample.tokens);
  for (std::size_t l = 0; l < blocks_.size(); ++l) {
    inputs.push_back(stream);
    run_block(l, stream, sample, options_.keep_tapes ? &tapes[l] : nullptr);
  }
  floats d_stream(stream.size());
  const double total = head_pass(sample, stream, loss, factor, &d_stream);
  for (std::size_t l = blocks_.size(); l-- > 0;) {
    const block_pass block = pass(l, tokens);
    block_tape tape = options_.keep_tapes ? std::move(tapes[l]) : block.record(inputs[l].data());
    block.backward(inputs[l].data(), tape, d_stream.data());
    inputs.pop_back();
  }
  return total;
}

void tuned_model::prepare(const training_sample& sample) {
  check_sample(config_, sample);
  const auto tokens = static_cast<index_t>(sample.tokens.size());
  if (tokens <= positions_) return;
  rope_ = rope_table(config_, tokens);
  positions_ = tokens;
}

floats tuned_model::embed(const std::vector<int>& tokens) const {
  floats stream(tokens.size() * static_cast<std::size_t>(config_.hidden_size));
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    embedding_.read_row(tokens[t], stream.data() + static_cast<index_t>(t) * config_.hidden_size);
  }
  return stream;
}

block_pass tuned_model::pass(std::size_t block, index_t tokens) {
  return {exec_, config_, rope_, blocks_[block], tokens};
}

void tuned_model::run_block(std::size_t block, floats& stream, const training_sample& sample,
                            block_tape* tape) {
  pass(block, static_cast<index_t>(sample.tokens.size())).forward(stream.data(), tape);
  const qeft::span<const float> all(stream.data(), static_cast<index_t>(stream.size()));
  if (qeft::io::find_not_finite(all) < 0) return;
  fail(errc::not_finite, "model.layers." + std::to_string(block) +
                             ": the activations of the model are not finite behind this block");
}

/// Final norm, head and loss of the counted tokens, some at a time. Adds the gradient of
/// factor * loss to d_stream, unless that is null.
double tuned_model::head_pass(const training_sample& sample, const floats& stream,
                              const logits_loss& loss, double factor, floats* d_stream) {
  std::vector<index_t> positions;
  for (std::size_t t = 1; t < sample.counted.size(); ++t) {
    if (sample.counted[t] != 0) positions.push_back(static_cast<index_t>(t));
  }
  double total = 0;
  const auto count = static_cast<index_t>(positions.size());
  for (index_t first = 0; first < count; first += logit_rows) {
    const index_t rows = std::min(logit_rows, count - first);
    total += head_piece({positions.data() + first, rows}, stream, loss, factor, d_stream);
  }
  if (!std::isfinite(total)) {
    fail(errc::not_finite, text("tuned_model: the loss is ", total,
                                ", although no block's output is infinite or NaN"));
  }
  return total;
}

double tuned_model::head_piece(qeft::span<const index_t> positions, const floats& stream,
                               const logits_loss& loss, double factor, floats* d_stream) {
  const index_t rows = positions.size();
  const index_t hidden = config_.hidden_size;
  const auto epsilon = static_cast<float>(config_.rms_norm_eps);
  const auto floats_of = [rows](index_t channels) {
    return floats(static_cast<std::size_t>(rows * channels));
  };
  floats x = floats_of(hidden);
  for (index_t i = 0; i < rows; ++i) {
    std::copy_n(stream.data() + (positions[i] - 1) * hidden, hidden, x.data() + i * hidden);
  }
  floats normed = floats_of(hidden);
  rms_norm(exec_, x.data(), norm_.value.data(), epsilon, rows, hidden, normed.data());
  floats logits = floats_of(config_.vocab_size);
  head().forward(exec_, normed.data(), rows, logits.data());
  std::vector<double> losses(static_cast<std::size_t>(rows));
  loss(positions, logits.data(), losses.data());
  double total = 0;
  for (const double of_token : losses) total += of_token;
  if (d_stream == nullptr || !std::isfinite(total)) return total;

  exec_.parallel_for(rows, 1, [&](index_t begin, index_t end) {
    for (index_t i = begin * config_.vocab_size; i < end * config_.vocab_size; ++i) {
      logits.data()[i] *= static_cast<float>(factor);
    }
  });
  floats d_normed = floats_of(hidden);
  head().add_input_gradient(exec_, logits.data(), rows, d_normed.data());
  floats dx = floats_of(hidden);
  rms_norm_gradient(exec_, x.data(), norm_.value.data(), epsilon, rows, hidden, d_normed.data(),
                    dx.data(), norm_.gradient.empty() ? nullptr : norm_.gradient.data());
  for (index_t i = 0; i < rows; ++i) {
    std::copy_n(dx.data() + i * hidden, hidden, d_stream->data() + (positions[i] - 1) * hidden);
  }
  return total;
}

}  // namespace qeft_llm
