// SPDX-License-Identifier: Apache-2.0
// The divergence of two distributions and the error of a mean, against their plain definitions.
#include <cmath>
#include <random>
#include <vector>

#include "divergence.hpp"
#include "support/catch.hpp"

namespace {

using qeft::index_t;
using qeft_llm::estimate_mean;
using qeft_llm::kl_divergence;

/// sum p log(p / q); only for logits whose exponentials neither overflow nor vanish.
double plain_divergence(const std::vector<float>& reference, const std::vector<float>& logits) {
  long double p_sum = 0;
  long double q_sum = 0;
  for (const float x : reference) p_sum += std::exp(static_cast<long double>(x));
  for (const float x : logits) q_sum += std::exp(static_cast<long double>(x));
  long double divergence = 0;
  for (std::size_t v = 0; v < logits.size(); ++v) {
    const long double p = std::exp(static_cast<long double>(reference[v])) / p_sum;
    const long double q = std::exp(static_cast<long double>(logits[v])) / q_sum;
    divergence += p * std::log(p / q);
  }
  return static_cast<double>(divergence);
}

double divergence(const std::vector<float>& reference, const std::vector<float>& logits) {
  return kl_divergence(reference.data(), logits.data(), static_cast<index_t>(logits.size()));
}

std::vector<float> random_logits(std::size_t count, float deviation, std::mt19937& rng) {
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<float> logits(count);
  for (float& x : logits) x = normal(rng);
  return logits;
}

}  // namespace

TEST_CASE("the divergence is that of its definition") {
  std::mt19937 rng(7);
  for (const std::size_t count : {1U, 2U, 33U, 5000U}) {
    for (const float deviation : {0.1F, 3.0F, 40.0F}) {
      const std::vector<float> reference = random_logits(count, deviation, rng);
      for (const float noise : {1e-3F, 0.3F, 20.0F}) {
        std::vector<float> logits = random_logits(count, noise, rng);
        for (std::size_t v = 0; v < count; ++v) logits[v] += reference[v];
        const double expected = plain_divergence(reference, logits);
        CHECK(std::abs(divergence(reference, logits) - expected) < 1e-9 * expected + 1e-13);
      }
    }
  }
}

TEST_CASE("the divergence is of the first from the second") {
  const float half = std::log(0.5F);
  const float quarter = std::log(0.25F);
  // p = (1/2, 1/2), q = (1/4, 3/4)
  const std::vector<float> p = {half, half};
  const std::vector<float> q = {quarter, std::log(0.75F)};
  CHECK(std::abs(divergence(p, q) - 0.5 * std::log(4.0 / 3.0)) < 1e-7);
  CHECK(std::abs(divergence(q, p) - (0.25 * std::log(0.5) + 0.75 * std::log(1.5))) < 1e-7);
}

TEST_CASE("the divergence of equal logits is 0, that of huge ones is finite") {
  std::mt19937 rng(8);
  for (const float deviation : {1.0F, 1e3F, 1e37F}) {
    const std::vector<float> logits = random_logits(999, deviation, rng);
    CHECK(divergence(logits, logits) == 0);
  }
  const std::vector<float> shifted = {1001.0F, 1002.0F, 1003.0F};
  CHECK(divergence({-999.0F, -998.0F, -997.0F}, shifted) < 1e-12);
  CHECK(std::abs(divergence({0.0F, -1e4F}, {-1e4F, 0.0F}) - 1e4) < 1e-6);
  const double huge = divergence({3e38F, -3e38F}, {-3e38F, 3e38F});
  CHECK(std::isfinite(huge));
  CHECK(huge > 1e38);
}

TEST_CASE("the error of a mean is the sample deviation by the root of the count") {
  const auto of_four = estimate_mean(std::vector<double>{1, 2, 4, 9});
  CHECK(std::abs(of_four.mean - 4) < 1e-15);
  // squares 9 + 4 + 0 + 25, by 3, by 4
  CHECK(std::abs(of_four.standard_error - std::sqrt(38.0 / 12)) < 1e-15);
  CHECK(estimate_mean(std::vector<double>{5, 5, 5}).standard_error == 0);
  const auto of_one = estimate_mean(std::vector<double>{3});
  CHECK(of_one.mean == 3);
  CHECK(std::isnan(of_one.standard_error));
}
