// SPDX-License-Identifier: Apache-2.0
#include "trainer.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <utility>

#include "qeft/io/convert.hpp"
#include "qeft/io/json_fields.hpp"
#include "qeft/io/safetensors.hpp"
#include "qeft/training/gradient_norm.hpp"
#include "training_data.hpp"

namespace qeft_llm {

namespace io = qeft::io;
using nlohmann::json;
using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::text;

namespace {

qeft::span<float> values(const parameter& p) { return {p.value, p.size()}; }
qeft::span<float> gradients(const parameter& p) { return {p.gradient, p.size()}; }

index_t count_of(const std::vector<training_sample>& samples) {
  index_t sum = 0;
  for (const training_sample& s : samples) sum += count_of(s);
  return sum;
}

template <class Value>
[[noreturn]] void refuse_setting(const char* name, const Value& value, const std::string& rule) {
  fail(errc::invalid_argument, text("trainer: ", name, " is ", value, ", but must be ", rule));
}

void check_samples(const std::vector<training_sample>& samples, const char* which) {
  for (std::size_t i = 0; i < samples.size(); ++i) {
    const training_sample& s = samples[i];
    if (s.counted.size() != s.tokens.size() || count_of(s) == 0 || s.counted.front() != 0) {
      fail(errc::invalid_argument,
           text("trainer: ", which, " sample ", i, " has ", s.tokens.size(), " tokens, of which ",
                count_of(s), " of ", s.counted.size(),
                " count, but must have some that count, and not the first"));
    }
  }
}

std::vector<std::vector<float>> zeros_for(const std::vector<parameter>& parameters) {
  std::vector<std::vector<float>> all;
  for (const parameter& p : parameters) all.emplace_back(static_cast<std::size_t>(p.size()));
  return all;
}

std::vector<std::vector<float>> values_of(const std::vector<parameter>& parameters) {
  std::vector<std::vector<float>> all;
  for (const parameter& p : parameters) all.emplace_back(p.value, p.value + p.size());
  return all;
}

void set_values(const std::vector<parameter>& parameters,
                const std::vector<std::vector<float>>& all) {
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    std::copy(all[i].begin(), all[i].end(), parameters[i].value);
  }
}

/// As a file gives it back.
json stored(const json& value) {
  return json::parse(value.dump(-1, ' ', false, json::error_handler_t::replace));
}

void check_setting(const json& earlier, const json& given, const std::string& where) {
  if (!earlier.is_object()) {
    io::fail_corrupt(where, "setting must be an object, not " + io::dump_json(earlier));
  }
  const auto difference = find_difference(earlier, given);
  if (!difference) return;
  fail(errc::invalid_argument, where + " is of a run with another " + difference->key + ": " +
                                   difference->first + " there, " + difference->second +
                                   " here; give what that run was given, or remove it to start "
                                   "anew");
}

double number(const io::json_fields& fields, const char* key) {
  const json& value = *fields.find(key);
  if (!value.is_number() || !std::isfinite(value.get<double>())) fields.refuse(key, "a number");
  return value.get<double>();
}

}  // namespace

std::optional<setting_difference> find_difference(const json& first, const json& second) {
  const auto shown = [](const json& object, const std::string& key) {
    return object.contains(key) ? io::dump_json(object.at(key)) : std::string("nothing");
  };
  json both = first;
  both.update(second);
  for (const auto& [key, ignored] : both.items()) {
    setting_difference d{key, shown(first, key), shown(second, key)};
    if (d.first != d.second) return d;
  }
  return std::nullopt;
}

index_t steps_of(index_t samples, index_t batch) { return qeft::ceil_div(samples, batch); }

trainer::trainer(const qeft::on_host& exec, trainable& model, const trainer_options& options,
                 std::vector<training_sample> training, std::vector<training_sample> validation,
                 communicator& ranks)
    : exec_(exec),
      model_(model),
      options_(options),
      training_(std::move(training)),
      validation_(std::move(validation)),
      ranks_(ranks),
      dropout_{static_cast<float>(options.weak_dropout),
               qeft::counter_bits(options.seed, for_dropout)} {
  if (options_.steps < 1) refuse_setting("steps", options_.steps, "at least 1");
  if (options_.batch < 1) refuse_setting("batch", options_.batch, "at least 1");
  if (options_.eval_every < 0) refuse_setting("eval_every", options_.eval_every, "at least 0");
  if (options_.samples == 0) options_.samples = options_.steps * options_.batch;
  if (steps_of(options_.samples, options_.batch) != options_.steps) {
    refuse_setting("samples", options_.samples,
                   text("what ", options_.steps, " steps of ", options_.batch, " take"));
  }
  if (!(options_.clip >= 0 && std::isfinite(options_.clip))) {
    refuse_setting("clip", options_.clip, "a number of at least 0");
  }
  if (!(options_.weak_dropout >= 0 && options_.weak_dropout < 1)) {
    refuse_setting("weak_dropout", options_.weak_dropout, "in [0, 1)");
  }
  options_.rate.steps = options_.steps;
  qeft::check_schedule(options_.rate);
  qeft::make_adamw_step(options_.adamw, options_.rate.peak, 0);
  if (training_.empty()) refuse_setting("training", "empty", "some samples");
  if (model_.parameters().empty())
    refuse_setting("model", "frozen", "one with parameters to train");
  check_samples(training_, "training");
  check_samples(validation_, "validation");
  if (ranks_.is_first()) {
    for (auto* state : {&sum_, &m_, &v_}) *state = zeros_for(model_.parameters());
  }
  if (options_.adamw.l2_sp > 0 || options_.weak_dropout > 0) {
    initial_ = values_of(model_.parameters());
  }
}

/// action(), whose error for what is not finite names the step and what to do.
/// @param step from 1; 0 for the model before training
template <class Action>
auto trainer::explained(index_t step, const Action& action) const {
  try {
    return action();
  } catch (const qeft::error& e) {
    if (e.code() != errc::not_finite) throw;
    if (step == 0) {
      fail(errc::not_finite, text("training: before the first step: ", e.what(),
                                  "; the model as it came cannot be trained on these samples"));
    }
    const std::string clip =
        options_.clip > 0 ? text("a lower --clip (here ", options_.clip, ")") : "a --clip above 0";
    fail(errc::not_finite,
         text("training: step ", step, ": ", e.what(), "; try a lower --lr (here ",
              options_.rate.peak, "), a longer --warmup or ", clip));
  }
}

void trainer::check_finite(double value, const char* what) const {
  if (!std::isfinite(value)) fail(errc::not_finite, text(what, " is ", value));
}

const training_sample& trainer::sample_at(index_t position) {
  const auto count = static_cast<index_t>(training_.size());
  if (pass_ != position / count) {
    pass_ = position / count;
    order_ = random_order(count, qeft::counter_bits(options_.seed, for_order, pass_));
  }
  const index_t chosen = order_[static_cast<std::size_t>(position % count)];
  return training_[static_cast<std::size_t>(chosen)];
}

void trainer::drop_columns() {
  if (options_.weak_dropout == 0) return;
  const std::vector<parameter>& all = model_.parameters();
  trained_ = values_of(all);
  for (std::size_t l = 0; l < all.size(); ++l) {
    const parameter& p = all[l];
    exec_.parallel_for(p.size(), 4096, [&](index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) {
        const float scale = dropout_.scale(step_, static_cast<index_t>(l), i % p.columns);
        p.value[i] =
            qeft::dropped_value(initial_[l][static_cast<std::size_t>(i)], p.value[i], scale);
      }
    });
  }
  model_.update();
}

/// The trained values again, and their gradients: those of the dropped ones by the chain rule.
void trainer::restore_columns() {
  if (options_.weak_dropout == 0) return;
  const std::vector<parameter>& all = model_.parameters();
  set_values(all, trained_);
  for (std::size_t l = 0; l < all.size(); ++l) {
    const parameter& p = all[l];
    exec_.parallel_for(p.size(), 4096, [&](index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) {
        p.gradient[i] *= dropout_.scale(step_, static_cast<index_t>(l), i % p.columns);
      }
    });
  }
  model_.update();
}

/// Gradients of the samples at [first, last) with the step's columns dropped.
/// @return the sum of their losses
double trainer::backward(index_t first, index_t last, index_t counted) {
  try {
    drop_columns();
    const double loss = add_gradients(first, last, counted);
    check_finite(loss, "the loss");
    restore_columns();
    return loss;
  } catch (...) {
    restore_columns();
    throw;
  }
}

/// Every rank takes the next sample, rank 0 adds what they found, and so on.
double trainer::add_gradients(index_t first, index_t last, index_t counted) {
  const index_t ranks = ranks_.size();
  std::vector<double> losses(static_cast<std::size_t>(last - first));
  for (numbers& sum : sum_) std::fill(sum.begin(), sum.end(), 0.0F);
  for (index_t next = first; next < last; next += ranks) {
    const index_t mine = next + ranks_.rank();
    together(ranks_, [&] {
      if (mine >= last) return;
      model_.clear_gradients();
      losses[static_cast<std::size_t>(mine - first)] =
          model_.backward(sample_at(mine), 1.0 / static_cast<double>(counted));
    });
    add_to_sum(std::min(ranks, last - next));
  }
  const std::vector<parameter>& all = model_.parameters();
  for (std::size_t l = 0; l < sum_.size(); ++l) {
    std::copy(sum_[l].begin(), sum_[l].end(), all[l].gradient);
  }
  share_in_turn(ranks_, losses);
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

/// The gradients of the first ranks, in their order.
void trainer::add_to_sum(index_t ranks) {
  const std::vector<parameter>& all = model_.parameters();
  for (int rank = 0; rank < ranks; ++rank) {
    for (std::size_t l = 0; l < all.size(); ++l) {
      const parameter& p = all[l];
      ranks_.collect(rank, bytes_of(p.gradient, p.size()));
      if (!ranks_.is_first()) continue;
      float* sum = sum_[l].data();
      exec_.parallel_for(p.size(), 4096, [&p, sum](index_t i, index_t end) {
        for (; i < end; ++i) sum[i] += p.gradient[i];
      });
    }
  }
}

/// All ranks get rank 0's.
void trainer::share_values() {
  for (const parameter& p : model_.parameters()) ranks_.broadcast(bytes_of(p.value, p.size()));
  model_.update();
}

std::optional<double> trainer::measure_start() {
  if (step_ > 0 || best_ || validation_.empty()) return std::nullopt;
  start_loss_ = validate();
  keep_if_best(*start_loss_);
  return start_loss_;
}

step_report trainer::advance() {
  measure_start();
  const auto start = std::chrono::steady_clock::now();
  step_report report;
  const index_t first = step_ * options_.batch;
  const index_t last = std::min(first + options_.batch, options_.samples);
  index_t counted = 0;
  for (index_t i = first; i < last; ++i) {
    counted += count_of(sample_at(i));
    report.tokens += static_cast<index_t>(sample_at(i).tokens.size());
  }
  report.rate = qeft::rate_at(options_.rate, step_);
  explained(step_ + 1, [&] {
    report.loss = backward(first, last, counted) / static_cast<double>(counted);
    together(ranks_, [&] {
      if (ranks_.is_first()) report.gradient_norm = take_step(report.rate);
    });
    broadcast(ranks_, report.gradient_norm);
    share_values();
  });
  ++step_;
  report.step = step_;
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (validates_now()) {
    report.validation_loss = validate();
    keep_if_best(*report.validation_loss);
  }
  return report;
}

/// Clipping and AdamW. @return the norm of the gradient
double trainer::take_step(double rate) {
  const std::vector<parameter>& all = model_.parameters();
  std::vector<qeft::span<const float>> arrays;
  for (const parameter& p : all) arrays.emplace_back(p.gradient, p.size());
  const double norm = qeft::global_norm(exec_, arrays);
  check_finite(norm, "the norm of the gradient");
  const auto scale = static_cast<float>(qeft::clip_factor(norm, options_.clip));
  for (std::size_t l = 0; l < all.size(); ++l) {
    const auto adamw = qeft::make_adamw_step(options_.adamw, rate * all[l].rate_factor, step_);
    const qeft::span<const float> origin = options_.adamw.l2_sp > 0
                                               ? qeft::span<const float>(initial_[l])
                                               : qeft::span<const float>(values(all[l]));
    qeft::adamw_update(exec_, adamw, gradients(all[l]), scale, origin, values(all[l]),
                       qeft::span<float>(m_[l]), qeft::span<float>(v_[l]));
  }
  return norm;
}

bool trainer::validates_now() const {
  if (validation_.empty()) return false;
  return done() || (options_.eval_every > 0 && step_ % options_.eval_every == 0);
}

double trainer::validate() {
  return explained(step_, [&] {
    std::vector<double> losses(validation_.size());
    together(ranks_, [&] {
      const auto ranks = static_cast<std::size_t>(ranks_.size());
      for (auto i = static_cast<std::size_t>(ranks_.rank()); i < losses.size(); i += ranks) {
        losses[i] = model_.loss(validation_[i]);
      }
    });
    share_in_turn(ranks_, losses);
    const double mean = std::accumulate(losses.begin(), losses.end(), 0.0) /
                        static_cast<double>(count_of(validation_));
    check_finite(mean, "the validation loss");
    return mean;
  });
}

void trainer::keep_if_best(double loss) {
  if (best_ && !(loss < best_->loss)) return;
  best_ = best_result{loss, step_};
  if (ranks_.is_first()) best_values_ = values_of(model_.parameters());
}

void trainer::take_best() {
  if (!best_) return;
  if (ranks_.is_first()) set_values(model_.parameters(), best_values_);
  share_values();
}

void trainer::save(const std::filesystem::path& file, const json& setting) const {
  json state = {{"step", step_}};
  if (best_) {
    state["best"] = best_->loss;
    state["best_step"] = best_->step;
  }
  if (start_loss_) state["start"] = *start_loss_;
  io::safetensors_writer writer(std::map<std::string, std::string>{
      {"setting", stored(setting).dump()}, {"state", state.dump()}});
  const std::vector<parameter>& all = model_.parameters();
  for (std::size_t l = 0; l < all.size(); ++l) {
    const parameter& p = all[l];
    const auto add = [&](const char* what, qeft::span<const float> array) {
      writer.add(what + p.name, io::dtype::f32, {p.rows, p.columns}, io::as_bytes(array));
    };
    add("value.", values(p));
    add("m.", m_[l]);
    add("v.", v_[l]);
    if (best_) add("best.", best_values_[l]);
  }
  writer.write(file);
}

void trainer::load(const std::filesystem::path& file, const json& setting) {
  together(ranks_, [&] {
    if (ranks_.is_first()) read_state(file, setting);
  });
  broadcast(ranks_, step_);
  broadcast(ranks_, best_);
  broadcast(ranks_, start_loss_);
  share_values();
}

void trainer::read_state(const std::filesystem::path& file, const json& setting) {
  const io::safetensors_reader reader(file);
  const io::safetensors_file& only = reader.files().front();
  const auto metadata = [&](const char* key) {
    const auto found = only.metadata().find(key);
    if (found == only.metadata().end()) {
      io::fail_corrupt(only.where(), std::string("__metadata__ '") + key + "' is missing");
    }
    return io::parse_json(found->second, only.where() + ": " + key);
  };
  if (!only.verify_checksum()) io::fail_corrupt(only.where(), "has no checksum");
  check_setting(metadata("setting"), stored(setting), only.where());
  const json state = metadata("state");
  const io::json_fields fields(state, only.where() + ": state");
  const index_t step = fields.integer("step", 0, options_.steps);
  std::optional<best_result> best;
  if (fields.has("best"))
    best = best_result{number(fields, "best"), fields.integer("best_step", 0, step)};
  std::optional<double> start;
  if (fields.has("start")) start = number(fields, "start");
  if (best.has_value() != start.has_value()) {
    fields.refuse(best ? "start" : "best", "there, as its counterpart is");
  }
  const std::vector<parameter>& all = model_.parameters();
  const auto read = [&](const char* what) {
    std::vector<numbers> arrays;
    for (const parameter& p : all) {
      arrays.push_back(
          io::to_floats(reader.at(what + p.name, io::dtype::f32, {p.rows, p.columns})));
    }
    return arrays;
  };
  const auto trained = read("value.");
  auto m = read("m.");
  auto v = read("v.");
  auto best_values = best ? read("best.") : std::vector<numbers>();
  set_values(all, trained);
  m_ = std::move(m);
  v_ = std::move(v);
  best_values_ = std::move(best_values);
  best_ = best;
  start_loss_ = start;
  step_ = step;
}

}  // namespace qeft_llm
