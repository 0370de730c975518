// SPDX-License-Identifier: Apache-2.0
// Sampling against its slow definition: probabilities worked out token by token.
#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <map>

#include "support/catch.hpp"
#include "support/sweep.hpp"
#include "support/throws.hpp"

using namespace qeft_llm;
using namespace qeft_test;
using qeft::errc;

namespace {

/// The probability of every token, in the words of `transformers`.
std::vector<double> probabilities(const sampling_options& o, const std::vector<float>& logits,
                                  const std::vector<int>& seen) {
  const std::size_t n = logits.size();
  std::vector<double> score(logits.begin(), logits.end());
  for (std::size_t i = 0; i < n; ++i) {
    const auto p = static_cast<double>(o.repetition_penalty);
    if (std::find(seen.begin(), seen.end(), static_cast<int>(i)) == seen.end()) continue;
    score[i] = score[i] < 0 ? score[i] * p : score[i] / p;
  }
  for (double& s : score) s /= static_cast<double>(o.temperature);
  std::vector<bool> removed(n, false);
  if (o.top_k > 0 && static_cast<std::size_t>(o.top_k) < n) {
    std::vector<double> sorted = score;
    std::sort(sorted.rbegin(), sorted.rend());
    const double least = sorted[static_cast<std::size_t>(o.top_k) - 1];
    for (std::size_t i = 0; i < n; ++i) removed[i] = score[i] < least;
  }
  const auto softmax = [&] {
    double total = 0;
    std::vector<double> p(n, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
      if (!removed[i]) total += p[i] = std::exp(score[i]);
    }
    for (double& x : p) x /= total;
    return p;
  };
  if (o.top_p < 1) {
    const std::vector<double> p = softmax();
    for (std::size_t i = 0; i < n; ++i) {
      double larger = 0;  // together, of tokens in front of it
      for (std::size_t j = 0; j < n; ++j) {
        if (p[j] > p[i] || (p[j] == p[i] && j < i)) larger += p[j];
      }
      if (larger >= static_cast<double>(o.top_p)) removed[i] = true;
    }
  }
  return softmax();
}

}  // namespace

TEST_CASE("draws have the probabilities of the definition") {
  fuzz("random options and logits", 60, [](std::uint64_t seed) {
    random_source random(seed);
    sampling_options o;
    o.seed = seed;
    o.temperature = random.pick<float>({0.3F, 1.0F, 2.5F});
    o.top_k = random.pick<qeft::index_t>({0, 1, 3, 100});
    o.top_p = random.pick<float>({1.0F, 0.9F, 0.5F, 0.01F});
    o.repetition_penalty = random.pick<float>({1.0F, 1.3F, 0.7F, 3.0F});
    std::vector<float> logits(static_cast<std::size_t>(random.integer(1, 12)));
    for (float& x : logits) x = static_cast<float>(random.integer(-8, 8)) / 4;  // with ties
    std::vector<int> seen;
    sampler draw(o);
    for (std::size_t i = 0; i < logits.size(); i += 3) {
      seen.push_back(static_cast<int>(i));
      draw.see(static_cast<int>(i));
    }
    const std::vector<double> expected = probabilities(o, logits, seen);
    constexpr int draws = 4000;
    std::vector<int> count(logits.size(), 0);
    for (int i = 0; i < draws; ++i) {
      std::vector<float> copy = logits;
      ++count[static_cast<std::size_t>(draw.next(copy))];
    }
    for (std::size_t i = 0; i < logits.size(); ++i) {
      INFO("token " << i << " of " << logits.size() << ", p " << expected[i]);
      const double sigma = std::sqrt(draws * expected[i] * (1 - expected[i]));
      CHECK(std::abs(count[i] - draws * expected[i]) <= 5 * sigma + 1e-6);
    }
  });
}

TEST_CASE("a penalty that overflows leaves the largest logit") {
  sampling_options o;
  o.repetition_penalty = 1e-38F;
  for (const float temperature : {0.0F, 1.0F}) {
    o.temperature = temperature;
    std::vector<float> logits = {1, 1e10F, 2};
    sampler draw(o);
    draw.see(1);
    CHECK(draw.next(logits) == 1);
    CHECK(std::isfinite(logits[1]));
  }
}

TEST_CASE("greedy takes the largest logit, the penalty applied") {
  sampling_options o;
  std::vector<float> logits = {1, 3, 2.9F, -1};
  CHECK(sampler(o).next(logits) == 1);
  o.repetition_penalty = 1.2F;
  sampler penalised(o);
  penalised.see(1);
  CHECK(penalised.next(logits) == 2);
  std::vector<float> negative = {-1, -1.1F};
  sampler negative_penalised(o);
  negative_penalised.see(0);
  CHECK(negative_penalised.next(negative) == 1);
}

TEST_CASE("extreme temperatures do not overflow") {
  sampling_options o;
  o.temperature = 1e-40F;
  std::vector<float> logits = {3e38F, -3e38F, 2e38F};
  CHECK(sampler(o).next(logits) == 0);
  o.temperature = 3e38F;
  o.top_p = 0.9F;
  CHECK(sampler(o).next(logits) < 3);
}

TEST_CASE("extreme penalties do not overflow") {
  sampling_options o;
  o.temperature = 1;
  for (const float penalty : {1e-40F, 3e38F}) {
    o.repetition_penalty = penalty;
    sampler draw(o);
    draw.see(0);
    draw.see(1);
    std::vector<float> logits = {5, -5, 1};
    const int drawn = draw.next(logits);
    CHECK((penalty < 1 ? drawn == 0 : drawn == 0 || drawn == 2));
  }
}

TEST_CASE("sampling options out of range are refused by name") {
  const auto refused = [](const char* message, const auto& change) {
    sampling_options o;
    change(o);
    return throws_with(errc::invalid_argument, {message}, [&] { sampler{o}; });
  };
  CHECK(refused("--temperature is -1", [](auto& o) { o.temperature = -1; }));
  CHECK(refused("--temperature is nan", [](auto& o) { o.temperature = std::nanf(""); }));
  CHECK(refused("--top-k is -2", [](auto& o) { o.top_k = -2; }));
  CHECK(refused("--top-p is 0.000", [](auto& o) { o.top_p = 0; }));
  CHECK(refused("--top-p is 1.5", [](auto& o) { o.top_p = 1.5F; }));
  CHECK(refused("--repetition-penalty is 0", [](auto& o) { o.repetition_penalty = 0; }));
}
