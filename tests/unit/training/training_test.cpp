// SPDX-License-Identifier: Apache-2.0
// Optimiser, schedules, clipping and regularisers against their definitions, written plainly in
// double.
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <vector>

#include "qeft/training/adamw.hpp"
#include "qeft/training/gradient_norm.hpp"
#include "qeft/training/schedule.hpp"
#include "qeft/training/weak_dropout.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"

namespace {

using namespace qeft_test;
using qeft::errc;
using qeft::index_t;

std::vector<float> random_floats(random_source& random, std::size_t count) {
  std::vector<float> all(count);
  for (float& x : all) x = static_cast<float>(random.real());
  return all;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

/// Algorithm 2 of "Decoupled Weight Decay Regularization", with a second decay.
struct adamw_definition {
  double w0, w, m = 0, v = 0;

  void step(const qeft::adamw_options& o, double rate, double g, int t) {
    m = o.beta1 * m + (1 - o.beta1) * g;
    v = o.beta2 * v + (1 - o.beta2) * g * g;
    const double m_hat = m / (1 - std::pow(o.beta1, t));
    const double v_hat = v / (1 - std::pow(o.beta2, t));
    w -= rate * (m_hat / (std::sqrt(v_hat) + o.epsilon) + o.weight_decay * w + o.l2_sp * (w - w0));
  }
};

/// An array under AdamW.
struct tuned_array {
  std::vector<float> w0, w, m, v;

  explicit tuned_array(const std::vector<float>& start)
      : w0(start), w(start), m(start.size()), v(start.size()) {}
  void step(int threads, const qeft::adamw_step& s, const std::vector<float>& g, float scale) {
    qeft::adamw_update(qeft::on_host(threads), s, g, scale, w0, qeft::span<float>(w),
                       qeft::span<float>(m), qeft::span<float>(v));
  }
};

}  // namespace

TEST_CASE("AdamW follows its definition over many steps") {
  random_source random(1);
  for (int run = 0; run < 40; ++run) {
    qeft::adamw_options o;
    o.beta1 = random.pick({0.0, 0.5, 0.9});
    o.beta2 = random.pick({0.5, 0.95, 0.999});
    o.epsilon = random.pick({1e-8, 1e-3, 0.5});
    o.weight_decay = random.pick({0.0, 0.1});
    o.l2_sp = random.pick({0.0, 0.3});
    const auto count = static_cast<std::size_t>(random.integer(1, 70));
    tuned_array tuned(random_floats(random, count));
    std::vector<adamw_definition> expected;
    for (const float x : tuned.w) expected.push_back({x, x});
    for (int t = 1; t <= 30; ++t) {
      const double rate = 0.01 * (1 + random.real());
      const auto g = random_floats(random, count);
      const float scale = random.pick({1.0F, 0.25F});
      tuned.step(1, qeft::make_adamw_step(o, rate, t - 1), g, scale);
      for (std::size_t i = 0; i < count; ++i) {
        expected[i].step(o, rate, static_cast<double>(g[i] * scale), t);
      }
    }
    for (std::size_t i = 0; i < count; ++i) {
      CHECK(std::abs(static_cast<double>(tuned.w[i]) - expected[i].w) < 2e-5);
      CHECK(std::abs(static_cast<double>(tuned.m[i]) - expected[i].m) < 1e-6);
      CHECK(std::abs(static_cast<double>(tuned.v[i]) - expected[i].v) < 1e-6);
    }
  }
}

TEST_CASE("the first step of AdamW moves by the rate, whatever the gradient's size") {
  for (const float g : {1e-3F, 1.0F, -1e3F}) {
    tuned_array tuned({2.0F});
    tuned.step(1, qeft::make_adamw_step({}, 0.125, 0), {g}, 1.0F);
    CHECK(std::abs(tuned.w[0] - (2.0F - std::copysign(0.125F, g))) < 1e-5F);
  }
  // Nothing pulls where nothing changed, and no gradient moves nothing.
  qeft::adamw_options o;
  o.l2_sp = 0.5;
  tuned_array still({2.0F});
  still.step(1, qeft::make_adamw_step(o, 0.125, 0), {0.0F}, 1.0F);
  CHECK(still.w[0] == 2.0F);
  // L2-SP leads back to the start.
  still.w[0] = 3.0F;
  for (int t = 0; t < 400; ++t) {
    still.step(1, qeft::make_adamw_step(o, 0.125, t), {0.0F}, 1.0F);
  }
  CHECK(std::abs(still.w[0] - 2.0F) < 1e-5F);
}

TEST_CASE("optimiser and norm do not depend on the number of threads") {
  random_source random(2);
  const auto start = random_floats(random, 20000);
  const auto g = random_floats(random, 20000);
  const std::vector<std::vector<float>> arrays = {g, start, {}, {3.0F}};
  qeft::adamw_options o;
  o.weight_decay = 0.1;
  o.l2_sp = 0.1;
  tuned_array one(start);
  for (int t = 0; t < 3; ++t) one.step(1, qeft::make_adamw_step(o, 1e-3, t), g, 0.5F);
  const double norm = qeft::global_norm(qeft::on_host(1), arrays);
  for (const int threads : {2, 3, 7}) {
    tuned_array many(start);
    for (int t = 0; t < 3; ++t) many.step(threads, qeft::make_adamw_step(o, 1e-3, t), g, 0.5F);
    CHECK(same_bits(many.w, one.w));
    CHECK(same_bits(many.m, one.m));
    CHECK(same_bits(many.v, one.v));
    CHECK(qeft::global_norm(qeft::on_host(threads), arrays) == norm);
  }
  double squares = 9;
  for (const float x : g) squares += static_cast<double>(x) * static_cast<double>(x);
  for (const float x : start) squares += static_cast<double>(x) * static_cast<double>(x);
  CHECK(std::abs(norm / std::sqrt(squares) - 1) < 1e-12);
}

TEST_CASE("clipping takes a gradient to the limit, and leaves alone what is within it") {
  const qeft::on_host exec(1);
  const std::vector<std::vector<float>> arrays = {{3.0F}, {0.0F, 4.0F}};
  CHECK(qeft::global_norm(exec, arrays) == 5.0);
  CHECK(qeft::clip_factor(5.0, 0.5) == 0.1);
  CHECK(qeft::clip_factor(5.0, 5.0) == 1.0);
  CHECK(qeft::clip_factor(5.0, 0.0) == 1.0);
  CHECK(qeft::clip_factor(0.0, 0.3) == 1.0);
  const std::vector<std::vector<float>> large = {{3e38F, 3e38F}};
  CHECK(std::isfinite(qeft::global_norm(exec, large)));
  const std::vector<std::vector<float>> broken = {{1.0F}, {NAN}};
  CHECK(std::isnan(qeft::global_norm(exec, broken)));
}

TEST_CASE("schedules rise, then stay or fall to their floor") {
  using qeft::schedule_kind;
  const auto rates = [](schedule_kind kind, index_t warmup, double floor) {
    std::vector<double> all;
    for (index_t s = 0; s < 12; ++s) {
      all.push_back(qeft::rate_at({kind, 2.0, warmup, 10, floor}, s));
    }
    return all;
  };
  CHECK(rates(schedule_kind::constant, 4, 0.0) ==
        std::vector<double>{0.5, 1, 1.5, 2, 2, 2, 2, 2, 2, 2, 2, 2});
  const auto linear = rates(schedule_kind::linear, 2, 1.0);
  for (index_t s = 2; s <= 10; ++s) {
    const double expected = 2.0 - static_cast<double>(s - 2) / 8;
    CHECK(std::abs(linear[static_cast<std::size_t>(s)] - expected) < 1e-12);
  }
  CHECK(linear[0] == 1.0);
  CHECK(linear[11] == 1.0);
  const auto cosine = rates(schedule_kind::cosine, 0, 0.5);
  for (int s = 0; s < 10; ++s) {
    const double half = std::cos(M_PI * s / 20);  // (1 + cos x) / 2 = cos^2(x / 2)
    CHECK(std::abs(cosine[static_cast<std::size_t>(s)] - (0.5 + 1.5 * half * half)) < 1e-12);
  }
  CHECK(cosine[10] == 0.5);
  for (const auto kind : {schedule_kind::cosine, schedule_kind::linear}) {
    CHECK(rates(kind, 10, 0.0)[9] == 2.0);  // all warm-up
  }
}

TEST_CASE("what is out of range is refused by name") {
  const auto refused = [](std::initializer_list<const char*> why, const auto& body) {
    return throws_with(errc::invalid_argument, why, body);
  };
  const auto schedule = [](double peak, index_t warmup, index_t steps, double floor) {
    return [=] { qeft::check_schedule({qeft::schedule_kind::linear, peak, warmup, steps, floor}); };
  };
  CHECK(refused({"peak is 0"}, schedule(0, 0, 5, 0)));
  CHECK(refused({"peak is inf"}, schedule(INFINITY, 0, 5, 0)));
  CHECK(refused({"floor is 2", "peak, 1"}, schedule(1, 0, 5, 2)));
  CHECK(refused({"warmup is 6", "steps, 5"}, schedule(1, 6, 5, 0)));
  CHECK(refused({"warmup is -1"}, schedule(1, -1, 5, 0)));
  CHECK(refused({"steps is -1"}, schedule(1, 0, -1, 0)));
  const auto adamw = [](auto member, double value) {
    qeft::adamw_options o;
    o.*member = value;
    return [=] { (void)qeft::make_adamw_step(o, 1e-3, 0); };
  };
  using options = qeft::adamw_options;
  CHECK(refused({"beta1 is 1"}, adamw(&options::beta1, 1)));
  CHECK(refused({"beta2 is nan"}, adamw(&options::beta2, NAN)));
  CHECK(refused({"epsilon is 0"}, adamw(&options::epsilon, 0)));
  CHECK(refused({"weight_decay is -1"}, adamw(&options::weight_decay, -1)));
  CHECK(refused({"l2_sp is inf"}, adamw(&options::l2_sp, INFINITY)));
  CHECK(refused({"rate is -1"}, [] { (void)qeft::make_adamw_step({}, -1, 0); }));
  CHECK(refused({"step is -1"}, [] { (void)qeft::make_adamw_step({}, 1, -1); }));
  CHECK(refused({"gradient has 2", "those of w, 1"}, [] {
    tuned_array({1.0F}).step(1, qeft::make_adamw_step({}, 1, 0), {1.0F, 2.0F}, 1.0F);
  }));
}

TEST_CASE("counters give independent, repeatable, uniform numbers") {
  CHECK(qeft::mix_bits(0) == 0xE220A8397B1DCDAFU);  // the first output of SplitMix64 of seed 0
  CHECK(qeft::counter_bits(1, 2, 3) == qeft::counter_bits(1, 2, 3));
  std::set<std::uint64_t> seen;
  for (int seed = 0; seed < 4; ++seed) {
    for (int a = 0; a < 4; ++a) {
      for (int b = 0; b < 4; ++b) {
        seen.insert(qeft::counter_bits(static_cast<std::uint64_t>(seed), a, b));
      }
    }
  }
  CHECK(seen.size() == 64);
  double sum = 0;
  double product = 0;
  for (int i = 0; i < 10000; ++i) {
    const auto x = static_cast<double>(qeft::counter_uniform(7, i, 0));
    const auto next = static_cast<double>(qeft::counter_uniform(7, i, 1));
    CHECK((x >= 0 && x < 1));
    sum += x;
    product += (x - 0.5) * (next - 0.5);
  }
  CHECK(std::abs(sum / 10000 - 0.5) < 0.012);  // four standard deviations
  CHECK(std::abs(product / 10000) < 0.0034);
}

TEST_CASE("weak-column dropout leaves out its share, and the mean is what was there") {
  for (const float p : {0.0F, 0.25F, 0.75F}) {
    const qeft::weak_dropout dropout{p, 9};
    int left_out = 0;
    double mean = 0;
    for (index_t step = 0; step < 50; ++step) {
      for (index_t layer = 0; layer < 10; ++layer) {
        for (index_t column = 0; column < 40; ++column) {
          const float scale = dropout.scale(step, layer, column);
          CHECK((scale == 0.0F || scale == 1.0F / (1.0F - p)));
          left_out += scale == 0.0F ? 1 : 0;
          mean += static_cast<double>(qeft::dropped_value(2.0F, 3.0F, scale)) / 20000;
        }
      }
    }
    CHECK(std::abs(left_out / 20000.0 - static_cast<double>(p)) < 0.013);
    CHECK(std::abs(mean - 3) < 0.05);
  }
  CHECK(qeft::dropped_value(2.0F, 3.0F, 0.0F) == 2.0F);
  CHECK(qeft::dropped_value(2.0F, 3.0F, 2.0F) == 4.0F);
  const qeft::weak_dropout other{0.5F, 10};
  const qeft::weak_dropout same{0.5F, 9};
  int by_seed = 0;
  int by_step = 0;
  int by_layer = 0;
  for (index_t c = 0; c < 64; ++c) {
    by_seed += other.scale(0, 0, c) != same.scale(0, 0, c) ? 1 : 0;
    by_step += same.scale(1, 0, c) != same.scale(0, 0, c) ? 1 : 0;
    by_layer += same.scale(0, 1, c) != same.scale(0, 0, c) ? 1 : 0;
  }
  for (const int differing : {by_seed, by_step, by_layer}) CHECK(differing > 15);
}
