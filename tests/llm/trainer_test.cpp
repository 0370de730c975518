// SPDX-License-Identifier: Apache-2.0
// The trainer on a problem whose every step can be written down: a quadratic that a sample of
// tokens pulls to its own target.
#include "trainer.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <set>
#include <stdexcept>

#include "qeft/io/safetensors.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "thread_ranks.hpp"
#include "training_data.hpp"
#include "unit/io/temporary_directory.hpp"

namespace {

using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;

using numbers = std::vector<float>;
using samples = std::vector<training_sample>;

/// loss of a counted token t: sum over the values of (value - t)^2 / 2. What it reads of the values
/// is made by update(), as in a model.
class quadratic final : public trainable {
 public:
  quadratic() {
    for (std::size_t i = 0; i < 2; ++i) {
      values_[i] = {1, 2, 3, 4, 5, 6};
      gradients_[i].resize(6);
      parameters_.push_back(
          {i == 0 ? "a.weak" : "b.weak", 2, 3, values_[i].data(), gradients_[i].data()});
    }
    update();
  }

  const std::vector<parameter>& parameters() const override { return parameters_; }
  void clear_gradients() override {
    for (numbers& g : gradients_) std::fill(g.begin(), g.end(), 0.0F);
  }
  double backward(const training_sample& s, double factor) override {
    seen.push_back(s.tokens[1]);
    read_by_backward.push_back(read_[0]);
    for (std::size_t t = 0; t < s.tokens.size(); ++t) {
      if (s.counted[t] == 0) continue;
      for (std::size_t p = 0; p < 2; ++p) {
        for (std::size_t i = 0; i < 6; ++i) {
          const float difference = read_[p][i] - static_cast<float>(s.tokens[t]);
          gradients_[p][i] += static_cast<float>(factor) * difference;
        }
      }
    }
    return broken(seen.size()) ? static_cast<double>(NAN) : sum_of(s);
  }
  double loss(const training_sample& s) override {
    return broken_loss ? static_cast<double>(NAN) : sum_of(s);
  }
  double sum_of(const training_sample& s) const {
    double sum = 0;
    for (std::size_t t = 0; t < s.tokens.size(); ++t) {
      if (s.counted[t] == 0) continue;
      for (const numbers& p : read_) {
        for (const float x : p) {
          const double difference = static_cast<double>(x) - s.tokens[t];
          sum += difference * difference / 2;
        }
      }
    }
    return sum;
  }
  void update() override {
    ++updates;
    for (std::size_t i = 0; i < 2; ++i) read_[i] = values_[i];
  }

  numbers all() const {
    numbers joined = values_[0];
    joined.insert(joined.end(), values_[1].begin(), values_[1].end());
    return joined;
  }
  bool is_up_to_date() const { return read_[0] == values_[0] && read_[1] == values_[1]; }

  std::vector<int> seen;                  // the second token of every sample trained on
  std::vector<numbers> read_by_backward;  // the first parameter, each time
  std::function<bool(std::size_t)> broken = [](std::size_t) { return false; };
  bool broken_loss = false;
  int updates = 0;

 private:
  numbers values_[2];
  numbers gradients_[2];
  numbers read_[2];
  std::vector<parameter> parameters_;
};

training_sample sample(std::vector<int> tokens) {
  std::vector<char> counted(tokens.size(), 1);
  counted[0] = 0;
  return {std::move(tokens), std::move(counted)};
}

samples numbered(int count) {
  samples all;
  for (int i = 0; i < count; ++i) all.push_back(sample({0, i}));
  return all;
}

trainer_options small_options(index_t steps) {
  trainer_options o;
  o.steps = steps;
  o.batch = 2;
  o.rate.peak = 0.05;
  o.clip = 0;
  return o;
}

std::vector<step_report> run(trainer& t) {
  std::vector<step_report> all;
  while (!t.done()) all.push_back(t.advance());
  return all;
}

bool same_bits(const numbers& a, const numbers& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

/// What the qeft::error of body() says; nothing without one.
template <class Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const qeft::error& e) {
    return e.what();
  }
  return {};
}

const qeft::on_host exec(2);

}  // namespace

TEST_CASE("a step is AdamW on the mean gradient of the batch's counted tokens") {
  const samples training = {sample({0, 3, 9}), sample({0, 4})};
  quadratic model;
  trainer_options o = small_options(4);
  o.rate.kind = qeft::schedule_kind::linear;
  o.rate.warmup = 2;
  o.clip = 1.5;
  o.adamw.weight_decay = 0.1;
  o.adamw.l2_sp = 0.2;
  trainer t(exec, model, o, training, {});
  const auto reports = run(t);
  REQUIRE(reports.size() == 4);

  double w[6] = {1, 2, 3, 4, 5, 6};
  double m[6] = {};
  double v[6] = {};
  const double rates[] = {0.025, 0.05, 0.05, 0.025};
  for (int s = 0; s < 4; ++s) {
    double loss = 0;
    double norm = 0;
    double g[6];
    for (int i = 0; i < 6; ++i) {
      g[i] = w[i] - 16.0 / 3;  // of 3, 9 and 4
      norm += 2 * g[i] * g[i];
      for (const int target : {3, 9, 4}) loss += 2 * (w[i] - target) * (w[i] - target) / 2 / 3;
    }
    norm = std::sqrt(norm);
    const step_report& r = reports[static_cast<std::size_t>(s)];
    CHECK(r.step == s + 1);
    CHECK(r.tokens == 5);
    CHECK(std::abs(r.rate - rates[s]) < 1e-12);
    CHECK(std::abs(r.loss - loss) < 1e-4);
    CHECK(std::abs(r.gradient_norm - norm) < 1e-4);
    for (int i = 0; i < 6; ++i) {
      const double clipped = g[i] * std::min(1.0, 1.5 / norm);
      m[i] = 0.9 * m[i] + 0.1 * clipped;
      v[i] = 0.999 * v[i] + 0.001 * clipped * clipped;
      const double m_hat = m[i] / (1 - std::pow(0.9, s + 1));
      const double v_hat = v[i] / (1 - std::pow(0.999, s + 1));
      w[i] -= rates[s] * (m_hat / (std::sqrt(v_hat) + 1e-8) + 0.1 * w[i] + 0.2 * (w[i] - (i + 1)));
    }
  }
  const numbers trained = model.all();
  for (std::size_t i = 0; i < 12; ++i) {
    CHECK(std::abs(static_cast<double>(trained[i]) - w[i % 6]) < 1e-5);
  }
  CHECK(model.is_up_to_date());
  CHECK_FALSE(t.best());
}

TEST_CASE("every pass takes every sample once, in an order of its own that the seed decides") {
  const auto order = [](std::uint64_t seed, index_t steps, index_t of_all) {
    const samples training = numbered(7);
    quadratic model;
    trainer_options o = small_options(steps);
    o.seed = seed;
    o.samples = of_all;
    trainer t(exec, model, o, training, {});
    run(t);
    return model.seen;
  };
  const auto seen = order(1, 11, 21);  // three passes; the last step has one sample
  REQUIRE(seen.size() == 21);
  std::set<std::vector<int>> passes;
  for (int pass = 0; pass < 3; ++pass) {
    const std::vector<int> one(seen.begin() + 7 * pass, seen.begin() + 7 * (pass + 1));
    CHECK(std::set<int>(one.begin(), one.end()).size() == 7);
    passes.insert(one);
  }
  CHECK(passes.size() == 3);
  CHECK(order(1, 11, 21) == seen);
  CHECK(order(2, 11, 21) != seen);
  CHECK(order(1, 4, 0).size() == 8);
  CHECK(steps_of(21, 2) == 11);
  CHECK(steps_of(22, 2) == 11);
}

TEST_CASE("a run that is gone on with after any step ends with the same bits") {
  const temporary_directory dir;
  const samples training = numbered(5);
  const samples validation = {sample({0, 2})};
  trainer_options o = small_options(9);
  o.eval_every = 2;
  o.weak_dropout = 0.4;
  o.adamw.l2_sp = 0.3;
  o.rate.kind = qeft::schedule_kind::cosine;
  const json setting = {{"--lr", 0.05}};
  quadratic model;
  trainer straight(exec, model, o, training, validation);
  const auto reports = run(straight);
  for (index_t stop = 0; stop <= 9; ++stop) {
    quadratic first_model;
    trainer first(exec, first_model, o, training, validation);
    while (first.step() < stop) first.advance();
    first.save(dir / "state", setting);
    quadratic second_model;
    trainer second(qeft::on_host(3), second_model, o, training, validation);
    second.load(dir / "state", setting);
    CHECK(second.step() == stop);
    CHECK(second_model.is_up_to_date());
    const auto rest = run(second);
    REQUIRE(rest.size() == static_cast<std::size_t>(9 - stop));
    for (std::size_t i = 0; i < rest.size(); ++i) {
      const step_report& expected = reports[static_cast<std::size_t>(stop) + i];
      CHECK(rest[i].loss == expected.loss);
      CHECK(rest[i].gradient_norm == expected.gradient_norm);
      CHECK(rest[i].validation_loss == expected.validation_loss);
    }
    CHECK(same_bits(second_model.all(), model.all()));
    REQUIRE(second.best());
    CHECK(second.best()->loss == straight.best()->loss);
    CHECK(second.best()->step == straight.best()->step);
    CHECK(second.start_loss() == straight.start_loss());
    second.take_best();
    quadratic third_model;
    trainer third(exec, third_model, o, training, validation);
    run(third);
    third.take_best();
    CHECK(same_bits(second_model.all(), third_model.all()));
  }
}

TEST_CASE("a state of another run is refused by what differs, a damaged one by its name") {
  const temporary_directory dir;
  const samples training = numbered(5);
  quadratic model;
  trainer t(exec, model, small_options(3), training, {});
  t.advance();
  const numbers before = model.all();
  const auto file = dir / "state";
  t.save(file, {{"--lr", 0.05}, {"--batch", 2}});
  const auto refused = [&](errc code, std::initializer_list<const char*> why, const json& setting) {
    return throws_with(code, why, [&] { t.load(file, setting); });
  };
  CHECK(refused(errc::invalid_argument, {"state", "another --lr", "0.05 there", "0.1 here"},
                {{"--lr", 0.1}, {"--batch", 2}}));
  CHECK(refused(errc::invalid_argument, {"another --seed", "nothing there"},
                {{"--lr", 0.05}, {"--batch", 2}, {"--seed", 1}}));
  CHECK(refused(errc::invalid_argument, {"another --batch", "nothing here"}, {{"--lr", 0.05}}));
  std::string bytes = read_all(file);
  bytes[bytes.size() - 3] ^= 1;
  write_all(file, bytes);
  CHECK(refused(errc::corrupt_file, {"state", "damaged"}, {{"--lr", 0.05}, {"--batch", 2}}));
  bytes.resize(bytes.size() / 2);
  write_all(file, bytes);
  CHECK(refused(errc::corrupt_file, {"state"}, {{"--lr", 0.05}, {"--batch", 2}}));
  CHECK(model.all() == before);
  CHECK(dir.files() == std::vector<std::string>{"state"});
}

TEST_CASE("the best parameters on validation data are kept, the initial ones among them") {
  const samples training = {sample({0, 9})};  // pulls all to 9
  const auto result = [&](int target, index_t steps) {
    const samples validation = {sample({0, target}), sample({0, target, target})};
    quadratic model;
    const numbers initial = model.all();
    trainer_options o = small_options(steps);
    o.rate.peak = 0.5;
    o.eval_every = 1;
    trainer t(exec, model, o, training, validation);
    double best = model.loss(validation[1]) / 2;  // per token, the same for both
    CHECK(t.measure_start() == best);
    CHECK_FALSE(t.measure_start());
    index_t best_step = 0;
    numbers best_values = initial;
    while (!t.done()) {
      const double loss = t.advance().validation_loss.value();
      CHECK(std::abs(loss - model.loss(validation[0])) < 1e-9);
      if (loss < best) {
        best = loss;
        best_step = t.step();
        best_values = model.all();
      }
    }
    t.take_best();
    CHECK(model.all() == best_values);
    CHECK(model.is_up_to_date());
    CHECK(t.best()->loss == best);
    CHECK(t.best()->step == best_step);
    return best_step;
  };
  CHECK(result(-5, 6) == 0);
  CHECK(result(9, 6) == 6);
  const index_t between = result(5, 12);
  CHECK((between > 0 && between < 12));
}

TEST_CASE("validation takes place when it is due") {
  const samples training = numbered(3);
  const samples validation = {sample({0, 2})};
  const auto steps = [&](index_t every, index_t all) {
    quadratic model;
    trainer_options o = small_options(all);
    o.eval_every = every;
    trainer t(exec, model, o, training, validation);
    std::vector<index_t> found;
    for (const step_report& r : run(t)) {
      if (r.validation_loss) found.push_back(r.step);
    }
    return found;
  };
  CHECK(steps(0, 5) == std::vector<index_t>{5});
  CHECK(steps(2, 5) == std::vector<index_t>{2, 4, 5});
  CHECK(steps(2, 4) == std::vector<index_t>{2, 4});
}

TEST_CASE("dropped columns are what they were, and get no gradient") {
  const samples training = {sample({0, 7})};
  trainer_options o = small_options(40);
  o.batch = 1;
  o.weak_dropout = 0.5;
  quadratic model;
  const numbers start = {1, 2, 3, 4, 5, 6};
  trainer t(exec, model, o, training, {});
  int dropped = 0;
  int kept = 0;
  double m[6] = {};
  double v[6] = {};
  for (int s = 0; s < 40; ++s) {
    const numbers before = model.all();
    t.advance();
    // AdamW goes on from the trained values, not from the dropped ones.
    for (std::size_t i = 0; i < 6; ++i) {
      const auto g = static_cast<double>(model.parameters()[0].gradient[i]);
      m[i] = 0.9 * m[i] + 0.1 * g;
      v[i] = 0.999 * v[i] + 0.001 * g * g;
      const double root = std::sqrt(v[i] / (1 - std::pow(0.999, s + 1))) + 1e-8;
      const double move = 0.05 * m[i] / (1 - std::pow(0.9, s + 1)) / root;
      CHECK(std::abs(static_cast<double>(model.all()[i]) -
                     (static_cast<double>(before[i]) - move)) < 1e-5);
    }
    const numbers& read = model.read_by_backward.back();
    for (std::size_t column = 0; column < 3; ++column) {
      const bool is_dropped = model.parameters()[0].gradient[column] == 0;
      (is_dropped ? dropped : kept) += 1;
      for (const std::size_t i : {column, column + 3}) {
        const float expected = is_dropped ? start[i] : start[i] + 2 * (before[i] - start[i]);
        CHECK(read[i] == expected);
        CHECK(model.parameters()[0].gradient[i] == (is_dropped ? 0.0F : 2 * (read[i] - 7)));
      }
    }
    CHECK(model.is_up_to_date());
  }
  CHECK(dropped > 30);
  CHECK(kept > 30);
  // Otherwise no value moves but by steps.
  quadratic plain;
  o.weak_dropout = 0;
  trainer without(exec, plain, o, training, {});
  run(without);
  CHECK(plain.updates == 1 + 40);
}

TEST_CASE("loss and gradients that are not finite stop the training, and the step is named") {
  const samples training = numbered(4);
  quadratic model;
  model.broken = [](std::size_t call) { return call == 5; };  // the first sample of step 3
  trainer t(exec, model, small_options(10), training, {});
  CHECK(throws_with(errc::not_finite, {"step 3", "the loss is nan", "--lr (here 0.05)", "--clip"},
                    [&] { run(t); }));
  CHECK(t.step() == 2);

  // The remedy fits: no lower limit than none, no options for a model that never was sound.
  trainer_options o = small_options(10);
  o.clip = 2;
  o.eval_every = 1;
  const samples validation = {sample({0, 2})};
  quadratic clipped;
  trainer second(exec, clipped, o, training, validation);
  second.advance();
  clipped.broken_loss = true;
  CHECK(throws_with(errc::not_finite,
                    {"step 2: the validation loss is nan", "or a lower --clip (here 2)"},
                    [&] { second.advance(); }));
  const std::string without_clip = message_of([&] {
    quadratic unclipped;
    unclipped.broken = [](std::size_t) { return true; };
    trainer(exec, unclipped, small_options(1), training, {}).advance();
  });
  CHECK(mentions(without_clip, {"step 1: the loss is nan", "or a --clip above 0"}));
  const std::string start = message_of([&] {
    quadratic unsound;
    unsound.broken_loss = true;
    trainer(exec, unsound, o, training, validation).advance();
  });
  CHECK(mentions(start, {"before the first step: the validation loss is nan"}));
  CHECK(start.find("--lr") == std::string::npos);

  struct infinite_gradient final : public trainable {
    quadratic inner;
    const std::vector<parameter>& parameters() const override { return inner.parameters(); }
    void clear_gradients() override { inner.clear_gradients(); }
    double backward(const training_sample& s, double factor) override {
      const double loss = inner.backward(s, factor);
      inner.parameters()[1].gradient[4] = INFINITY;
      return loss;
    }
    double loss(const training_sample& s) override { return inner.loss(s); }
    void update() override { inner.update(); }
  } infinite;
  trainer bad(exec, infinite, small_options(1), training, {});
  const numbers before = infinite.inner.all();
  CHECK(throws_with(errc::not_finite, {"step 1", "the norm of the gradient is inf", "--clip"},
                    [&] { run(bad); }));
  CHECK(infinite.inner.all() == before);
}

TEST_CASE("columns that were dropped are the trained ones again behind an error") {
  const samples training = numbered(2);
  trainer_options o = small_options(10);
  o.weak_dropout = 0.5;
  const auto is_restored = [&](bool by_nan) {
    quadratic model;
    trainer t(exec, model, o, training, {});
    t.advance();
    t.advance();
    const numbers before = model.all();
    model.broken = [&](std::size_t) {
      CHECK_FALSE(model.all() == before);  // some are dropped
      if (!by_nan) throw std::runtime_error("backward");
      return true;
    };
    CHECK_THROWS(t.advance());
    return model.all() == before && model.is_up_to_date();
  };
  CHECK(is_restored(false));
  CHECK(is_restored(true));
}

TEST_CASE("a state of this run that nobody wrote is refused by file and key") {
  const temporary_directory dir;
  const samples training = numbered(3);
  const samples validation = {sample({0, 2})};
  quadratic model;
  trainer t(exec, model, small_options(3), training, validation);
  t.advance();
  const json setting = {{"--lr", 0.05}};
  t.save(dir / "state", setting);
  const numbers before = model.all();
  const auto refused = [&](const char* key, const json& value, auto why) {
    const qeft::io::safetensors_file saved(dir / "state");
    auto metadata = saved.metadata();
    metadata.erase(qeft::io::checksum_key);
    metadata[key] = value.dump();
    qeft::io::safetensors_writer writer(metadata);
    for (const auto& [name, view] : saved.tensors()) {
      writer.add(name, view.type, view.shape, view.data);
    }
    writer.write(dir / "other");
    return throws_with(errc::corrupt_file, why, [&] { t.load(dir / "other", setting); }) &&
           model.all() == before;
  };
  using words = std::initializer_list<const char*>;
  CHECK(refused("setting", json::array({1}), words{"other", "setting must be an object", "[1]"}));
  CHECK(refused("setting", "text", words{"other", "setting must be an object"}));
  CHECK(refused("state", {{"step", 1}, {"best", 0.5}, {"best_step", 1}},
                words{"other", "start is missing"}));
  CHECK(refused("state", {{"step", 1}, {"start", 0.5}}, words{"other", "best is missing"}));
  CHECK(refused("state", {{"step", 1}, {"best", 0.5}, {"start", 1}}, words{"other", "best_step"}));
  CHECK(refused("state", 7, words{"other", "must be an object"}));
  t.load(dir / "state", setting);
}

TEST_CASE("options and samples that cannot be trained with are refused by name") {
  const samples training = numbered(3);
  const auto refused = [&](std::initializer_list<const char*> why, auto change,
                           const samples& data = numbered(3)) {
    return throws_with(errc::invalid_argument, why, [&] {
      quadratic model;
      trainer_options o = small_options(2);
      change(o);
      trainer(exec, model, o, data, {});
    });
  };
  const auto nothing = [](trainer_options&) {};
  CHECK(refused({"steps is 0"}, [](trainer_options& o) { o.steps = 0; }));
  CHECK(refused({"batch is 0"}, [](trainer_options& o) { o.batch = 0; }));
  CHECK(refused({"clip is nan"}, [](trainer_options& o) { o.clip = NAN; }));
  CHECK(refused({"weak_dropout is 1"}, [](trainer_options& o) { o.weak_dropout = 1; }));
  CHECK(refused({"eval_every is -1"}, [](trainer_options& o) { o.eval_every = -1; }));
  CHECK(refused({"samples is 9"}, [](trainer_options& o) { o.samples = 9; }));
  CHECK(refused({"peak is 0"}, [](trainer_options& o) { o.rate.peak = 0; }));
  CHECK(refused({"warmup is 3"}, [](trainer_options& o) { o.rate.warmup = 3; }));
  CHECK(refused({"l2_sp is -1"}, [](trainer_options& o) { o.adamw.l2_sp = -1; }));
  CHECK(refused({"training is empty"}, nothing, {}));
  CHECK(
      refused({"training sample 1", "0 of 2 count"}, nothing, {sample({0, 1}), {{0, 1}, {0, 0}}}));
  CHECK(refused({"training sample 0"}, nothing, {{{0, 1}, {1, 1}}}));
}

namespace {

trainer_options demanding_options() {
  trainer_options o = small_options(6);
  o.batch = 5;
  o.samples = 28;  // the last step has three
  o.eval_every = 2;
  o.clip = 0.7;
  o.weak_dropout = 0.4;
  o.adamw.l2_sp = 0.3;
  return o;
}

/// With several counted tokens each, and losses whose sum depends on the order.
samples uneven(int count) {
  samples all;
  for (int i = 0; i < count; ++i) all.push_back(sample({0, i, 7 * i % 5, 3 * i}));
  return all;
}

/// What a rank has in the end.
struct outcome {
  std::vector<step_report> reports;
  numbers last;
  numbers best;
  std::optional<trainer::best_result> best_result;
  std::size_t backward_calls = 0;
};

bool same_reports(const std::vector<step_report>& a, const std::vector<step_report>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const step_report& x, const step_report& y) {
                      return x.step == y.step && x.loss == y.loss && x.rate == y.rate &&
                             x.gradient_norm == y.gradient_norm && x.tokens == y.tokens &&
                             x.validation_loss == y.validation_loss;
                    });
}

/// Trains what is left to do by `o`, on as many ranks. @param state to go on with, or empty
/// @param stop of the first rank's state, which is saved there
std::vector<outcome> train_on(thread_ranks& all, int size, const trainer_options& o,
                              const std::filesystem::path& state = {}, index_t stop = -1,
                              const std::filesystem::path& saved = {}) {
  std::vector<outcome> outcomes(static_cast<std::size_t>(size));
  all.run([&](communicator& ranks) {
    outcome& mine = outcomes[static_cast<std::size_t>(ranks.rank())];
    quadratic model;
    trainer t(qeft::on_host(1), model, o, uneven(9), uneven(4), ranks);
    if (!state.empty()) t.load(state, json::object());
    while (!t.done() && t.step() != stop) mine.reports.push_back(t.advance());
    if (!saved.empty() && ranks.is_first()) t.save(saved, json::object());
    mine.last = model.all();
    t.take_best();
    mine.best = model.all();
    mine.best_result = t.best();
    mine.backward_calls = model.seen.size();
  });
  return outcomes;
}

}  // namespace

TEST_CASE("a step's gradient is the sum of those that its samples have by themselves, in order") {
  const samples training = uneven(1);
  trainer_options o = small_options(1);
  o.batch = 7;
  quadratic model;
  trainer t(exec, model, o, training, {});
  quadratic alone;
  numbers sum(6);
  for (int i = 0; i < 7; ++i) {
    alone.clear_gradients();
    alone.backward(training[0], 1.0 / 21);
    for (std::size_t j = 0; j < 6; ++j) sum[j] += alone.parameters()[0].gradient[j];
  }
  t.advance();
  const float* found = model.parameters()[0].gradient;
  CHECK(same_bits({found, found + 6}, sum));
}

TEST_CASE("ranks that share the samples end with the bits of one process") {
  const trainer_options o = demanding_options();
  thread_ranks single(1);
  const outcome expected = train_on(single, 1, o).front();
  CHECK(expected.backward_calls == 28);
  CHECK(single.collected + single.broadcast == 0);
  REQUIRE(expected.best_result);
  for (const int size : {2, 3, 4, 8}) {
    thread_ranks several(size);
    std::size_t calls = 0;
    std::size_t most = 0;
    for (const outcome& o_of_rank : train_on(several, size, o)) {
      CHECK(same_reports(o_of_rank.reports, expected.reports));
      CHECK(same_bits(o_of_rank.last, expected.last));
      CHECK(same_bits(o_of_rank.best, expected.best));
      CHECK(o_of_rank.best_result->loss == expected.best_result->loss);
      CHECK(o_of_rank.best_result->step == expected.best_result->step);
      calls += o_of_rank.backward_calls;
      most = std::max(most, o_of_rank.backward_calls);
    }
    CHECK(calls == 28);
    CHECK(most == static_cast<std::size_t>(5 * ((5 + size - 1) / size) + (3 + size - 1) / size));
    // Of the samples of other ranks 12 gradients in FP32, of all some losses and notes.
    const index_t others = 5 * (5 - (5 + size - 1) / size) + 3 - (3 + size - 1) / size;
    CHECK(several.collected >= others * 12 * 4);
    CHECK(several.collected < others * 12 * 4 + 1000);
    CHECK(several.broadcast >= 7 * 12 * 4);  // with the best
    CHECK(several.broadcast < 7 * 12 * 4 + 1000);
  }
}

TEST_CASE("a state of some ranks is gone on with by any number") {
  const temporary_directory dir;
  const trainer_options o = demanding_options();
  thread_ranks single(1);
  const outcome expected = train_on(single, 1, o).front();
  for (const int before : {1, 2}) {
    for (const int after : {1, 3}) {
      for (const index_t stop : {0, 3, 5}) {
        thread_ranks first(before);
        train_on(first, before, o, {}, stop, dir / "state");
        thread_ranks second(after);
        for (const outcome& rank : train_on(second, after, o, dir / "state")) {
          CHECK(rank.reports.size() == static_cast<std::size_t>(6 - stop));
          CHECK(same_bits(rank.last, expected.last));
          CHECK(same_bits(rank.best, expected.best));
        }
      }
    }
  }
  // Only rank 0 reads, and all hear of it.
  write_all(dir / "state", "damaged");
  std::vector<int> heard(3);
  thread_ranks all(3);
  all.run([&](communicator& ranks) {
    quadratic model;
    trainer t(qeft::on_host(1), model, o, uneven(9), uneven(4), ranks);
    heard[static_cast<std::size_t>(ranks.rank())] =
        throws_with(errc::corrupt_file, {"state"}, [&] { t.load(dir / "state", json::object()); })
            ? 1
            : 0;
  });
  CHECK(heard == std::vector<int>{1, 1, 1});
}

TEST_CASE("an error of one rank ends the step on all, with one message and sound values") {
  const trainer_options o = demanding_options();
  for (const int broken : {0, 1, 2}) {
    std::vector<int> good(3);
    thread_ranks all(3);
    all.run([&](communicator& ranks) {
      quadratic model;
      trainer t(qeft::on_host(1), model, o, uneven(9), {}, ranks);
      t.advance();
      const numbers before = model.all();
      if (ranks.rank() == broken) {
        model.broken = [](std::size_t) -> bool {
          qeft::fail(errc::not_finite, "block 3 overflows");
        };
      }
      const bool said = throws_with(errc::not_finite, {"step 2: block 3 overflows", "--lr"},
                                    [&] { t.advance(); });
      good[static_cast<std::size_t>(ranks.rank())] =
          said && same_bits(model.all(), before) && model.is_up_to_date() ? 1 : 0;
    });
    CHECK(good == std::vector<int>{1, 1, 1});
  }
}

TEST_CASE("of several errors all ranks throw that of the first") {
  thread_ranks all(4);
  std::vector<std::string> messages(4);
  all.run([&](communicator& ranks) {
    int after = 0;
    together(ranks, [] {});
    messages[static_cast<std::size_t>(ranks.rank())] = message_of([&] {
      together(ranks, [&] {
        if (ranks.rank() % 2 == 1)
          qeft::fail(errc::io_error, "rank " + std::to_string(ranks.rank()));
      });
    });
    // They are in step afterwards.
    std::vector<double> items(6, -1);
    for (std::size_t i = 0; i < 6; ++i) {
      if (static_cast<int>(i) % 4 == ranks.rank()) items[i] = static_cast<double>(i);
    }
    share_in_turn(ranks, items);
    if (items != std::vector<double>{0, 1, 2, 3, 4, 5}) messages[0] = "items";
    std::string text = ranks.is_first() ? "from rank 0" : "";
    broadcast(ranks, text);
    if (text != "from rank 0") messages[0] = "text";
    broadcast(ranks, after);
  });
  CHECK(messages == std::vector<std::string>(4, "rank 1"));
}
