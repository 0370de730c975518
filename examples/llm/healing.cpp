// SPDX-License-Identifier: Apache-2.0
#include "healing.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "elementwise.hpp"
#include "qeft/core/text.hpp"
#include "qeft/io/adapter.hpp"
#include "qeft/io/convert.hpp"

namespace qeft_llm {

namespace io = qeft::io;
using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

bool ends_with(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

std::vector<std::byte> stored_as(io::dtype type, const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * static_cast<std::size_t>(size_of(type)));
  for (std::size_t i = 0; i < values.size(); ++i) {
    io::store_number(type, static_cast<double>(values[i]), bytes.data(), static_cast<index_t>(i));
  }
  return bytes;
}

}  // namespace

double divergence_gradient(float* reference, float* logits, index_t vocabulary) {
  const float top = *std::max_element(reference, reference + vocabulary);
  const float top_here = *std::max_element(logits, logits + vocabulary);
  double sum = 0;
  double sum_here = 0;
  double difference = 0;  // of the logits, summed over e^reference
  for (index_t v = 0; v < vocabulary; ++v) {
    const double apart = static_cast<double>(reference[v]) - static_cast<double>(logits[v]);
    reference[v] = exp_clamped(reference[v] - top);
    logits[v] = exp_clamped(logits[v] - top_here);
    sum += static_cast<double>(reference[v]);
    sum_here += static_cast<double>(logits[v]);
    difference += static_cast<double>(reference[v]) * apart;
  }
  for (index_t v = 0; v < vocabulary; ++v) {
    logits[v] = static_cast<float>(static_cast<double>(logits[v]) / sum_here -
                                   static_cast<double>(reference[v]) / sum);
  }
  const double norms =
      (static_cast<double>(top) - static_cast<double>(top_here)) + std::log(sum / sum_here);
  return difference / sum - norms;
}

healed_model::healed_model(const qeft::on_host& exec, const model_source& source,
                           const model_source& reference, const healed_parts& parts)
    : exec_(exec), source_(source), parts_(parts), reference_(exec, reference) {
  tuning_options options;
  options.norms = parts.norms;
  model_.emplace(exec, source.config(), reader_of(source), maker(), options);
  for (parameter p : model_->parameters()) {
    if (ends_with(p.name, ".scales")) {
      p.rate_factor = parts.scale_rate;
      parameters_.push_back(p);
      continue;
    }
    const bool weak = ends_with(p.name, ".weak");
    if (!weak) check_norm(p);
    add_stepped(p, weak ? 1 : parts.norm_rate);
    std::vector<float>& unit = stepped_.back().unit;
    if (weak) {
      std::fill(unit.begin(), unit.end(), 1.0F);
    } else {
      unit = stepped_.back().initial;
    }
  }
}

void healed_model::check_norm(const parameter& norm) const {
  const io::tensor_view& t = source_.weights().view(norm.name, {norm.columns});
  if (t.type == io::dtype::f32) return;
  fail(errc::unsupported, qeft::text("tensor ", norm.name, " is ", to_string(t.type),
                                     ", but a norm that is trained must be F32"));
}

void healed_model::add_stepped(const parameter& inner, double rate_factor) {
  const auto size = static_cast<std::size_t>(inner.size());
  stepped_.push_back({inner,
                      {inner.value, inner.value + size},
                      std::vector<float>(static_cast<std::size_t>(inner.columns)),
                      std::vector<float>(size),
                      std::vector<float>(size)});
  parameter p = inner;
  p.value = stepped_.back().step.data();
  p.gradient = stepped_.back().gradient.data();
  p.rate_factor = rate_factor;
  parameters_.push_back(p);
}

void healed_model::clear_gradients() {
  model_->clear_gradients();
  find_gradients_of_steps();
}

void healed_model::find_gradients_of_steps() {
  for (stepped& s : stepped_) {
    for (std::size_t i = 0; i < s.step.size(); ++i) {
      s.gradient[i] = s.inner.gradient[i] * s.unit[i % s.unit.size()];
    }
  }
}

void healed_model::update() {
  for (const stepped& s : stepped_) {
    for (std::size_t i = 0; i < s.step.size(); ++i) {
      s.inner.value[i] = s.initial[i] + s.unit[i % s.unit.size()] * s.step[i];
    }
  }
  model_->update();
}

void healed_model::calibrate(const std::vector<training_sample>& samples) {
  std::vector<std::vector<double>> squares;  // of each parameter, by column
  for (const parameter& p : parameters_) squares.emplace_back(static_cast<std::size_t>(p.columns));
  double loss = 0;
  double all = 0;
  for (const training_sample& sample : samples) {
    const auto counted = static_cast<double>(
        std::count_if(sample.counted.begin(), sample.counted.end(), [](char c) { return c != 0; }));
    clear_gradients();
    loss += backward(sample, 1 / counted) / counted;
    for (std::size_t l = 0; l < parameters_.size(); ++l) {
      const parameter& p = parameters_[l];
      for (index_t i = 0; i < p.size(); ++i) {
        const auto g = static_cast<double>(p.gradient[i]);
        squares[l][static_cast<std::size_t>(i % p.columns)] += g * g;
      }
    }
  }
  clear_gradients();
  const auto count = static_cast<double>(samples.size());
  for (const parameter& p : parameters_) all += static_cast<double>(p.size());
  const auto inverse_root = [&](double sum, double of) {
    return sum == 0 ? 0 : loss / count / all / std::sqrt(sum / of / count);
  };
  auto in_steps = stepped_.begin();
  for (std::size_t l = 0; l < parameters_.size(); ++l) {
    parameter& p = parameters_[l];
    if (ends_with(p.name, ".weak")) {
      for (std::size_t j = 0; j < squares[l].size(); ++j) {
        in_steps->unit[j] =
            static_cast<float>(inverse_root(squares[l][j], static_cast<double>(p.rows)));
      }
    } else {
      double sum = 0;
      for (const double s : squares[l]) sum += s;
      p.rate_factor *= inverse_root(sum, static_cast<double>(p.size()));
    }
    if (!ends_with(p.name, ".scales")) ++in_steps;
  }
}

linear_maker healed_model::maker() {
  return [this](const std::string& name, const packed_matrix& weight,
                std::vector<float> bias) -> std::unique_ptr<tuned_linear> {
    const auto& quantization = source_.config().quantization;
    const bool quantised = quantization && quantization->find(name) != nullptr;
    if (!quantised || !(parts_.linears.weak || parts_.linears.scales)) {
      return std::make_unique<frozen>(exec_, weight, std::move(bias));
    }
    auto made = std::make_unique<scale_tuning>(exec_, weight, std::move(bias), parts_.linears);
    linears_[name] = made.get();
    return made;
  };
}

double healed_model::backward(const training_sample& sample, double factor) {
  const double total = model_->backward(sample, factor, loss_to_reference(sample));
  find_gradients_of_steps();
  return total;
}

double healed_model::loss(const training_sample& sample) {
  return model_->loss(sample, loss_to_reference(sample));
}

/// Of which the reference's logits are made piece by piece.
logits_loss healed_model::loss_to_reference(const training_sample& sample) {
  reference_.reset(static_cast<index_t>(sample.tokens.size()));
  const std::vector<float>& stream = reference_.forward(sample.tokens);
  return [this, &stream](qeft::span<const index_t> positions, float* logits, double* losses) {
    const index_t hidden = reference_.config().hidden_size;
    const index_t vocabulary = reference_.config().vocab_size;
    const index_t count = positions.size();
    rows_.resize(static_cast<std::size_t>(count * hidden));
    reference_logits_.resize(static_cast<std::size_t>(count * vocabulary));
    for (index_t i = 0; i < count; ++i) {
      std::copy_n(stream.data() + (positions[i] - 1) * hidden, hidden, rows_.data() + i * hidden);
    }
    try {
      reference_.logits(rows_.data(), count, reference_logits_.data());
    } catch (const qeft::error& e) {
      fail(e.code(), std::string("the reference: ") + e.what());
    }
    exec_.parallel_for(count, 1, [&](index_t i, index_t end) {
      for (; i < end; ++i) {
        losses[i] = divergence_gradient(reference_logits_.data() + i * vocabulary,
                                        logits + i * vocabulary, vocabulary);
      }
    });
  };
}

std::optional<std::vector<std::byte>> healed_model::stored(const io::tensor_view& t) const {
  for (const stepped& s : stepped_) {
    const parameter& norm = s.inner;
    if (norm.name != t.name || norm.rows != 1) continue;
    const index_t bad = io::find_not_finite({norm.value, norm.size()});
    if (bad >= 0) {
      fail(errc::not_finite,
           qeft::text("tensor ", t.name, ", element ", bad, " became ", norm.value[bad]));
    }
    return stored_as(t.type, {norm.value, norm.value + norm.size()});
  }
  const std::size_t dot = t.name.rfind('.');
  const auto found = linears_.find(t.name.substr(0, dot));
  if (dot == std::string::npos || found == linears_.end()) return std::nullopt;
  const linear& base = found->second->base();
  if (ends_with(t.name, ".weak") && parts_.linears.weak) return stored_as(t.type, base.read_weak());
  if (!parts_.linears.scales) return std::nullopt;
  if (ends_with(t.name, ".scales")) return stored_as(t.type, base.read_groups().scales);
  const bool scaled = base.descriptor().zero == qeft::zero_kind::scaled;
  if (scaled && ends_with(t.name, ".zeros")) return stored_as(t.type, base.read_groups().zeros);
  return std::nullopt;
}

}  // namespace qeft_llm
