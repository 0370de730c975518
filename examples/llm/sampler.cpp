// SPDX-License-Identifier: Apache-2.0
#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>

#include "qeft/core/status.hpp"

namespace qeft_llm {

using qeft::index_t;

void check(const sampling_options& o) {
  const auto broken = [](const char* option, const std::string& value, const char* rule) {
    qeft::fail(qeft::errc::invalid_argument,
               std::string("generate: ") + option + " is " + value + ", but must be " + rule);
  };
  if (!(o.temperature >= 0) || !std::isfinite(o.temperature)) {
    broken("--temperature", std::to_string(o.temperature), "finite and not negative");
  }
  if (o.top_k < 0) broken("--top-k", std::to_string(o.top_k), "0 or more");
  if (!(o.top_p > 0 && o.top_p <= 1)) {
    broken("--top-p", std::to_string(o.top_p), "above 0 and at most 1");
  }
  if (!(o.repetition_penalty > 0) || !std::isfinite(o.repetition_penalty)) {
    broken("--repetition-penalty", std::to_string(o.repetition_penalty), "finite and above 0");
  }
}

sampler::sampler(const sampling_options& options) : options_(options), rng_(options.seed) {
  check(options);
}

void sampler::see(int token) {
  const auto at = static_cast<std::size_t>(token);
  if (at >= seen_.size()) seen_.resize(at + 1);
  seen_[at] = true;
}

void sampler::penalise(std::vector<float>& logits) const {
  if (options_.repetition_penalty == 1) return;
  for (std::size_t i = 0; i < std::min(seen_.size(), logits.size()); ++i) {
    if (!seen_[i]) continue;
    const float penalised = logits[i] < 0 ? logits[i] * options_.repetition_penalty
                                          : logits[i] / options_.repetition_penalty;
    constexpr float largest = std::numeric_limits<float>::max();
    logits[i] = std::clamp(penalised, -largest, largest);
  }
}

int sampler::next(std::vector<float>& logits) {
  penalise(logits);
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (options_.temperature == 0) return static_cast<int>(largest - logits.begin());

  // The candidates, most probable first; weights relative to the largest logit, so that no
  // temperature overflows.
  std::vector<std::pair<float, int>> candidates(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) candidates[i] = {-logits[i], static_cast<int>(i)};
  const auto k = static_cast<std::size_t>(options_.top_k);
  if (k > 0 && k < candidates.size()) {
    const auto kth = candidates.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(candidates.begin(), kth, candidates.end());
    const float least = kth->first;
    candidates.erase(
        std::remove_if(kth + 1, candidates.end(), [&](const auto& c) { return c.first > least; }),
        candidates.end());
  }
  if (options_.top_p < 1) std::sort(candidates.begin(), candidates.end());
  const auto highest = static_cast<double>(*largest);
  std::vector<double> weights;
  double total = 0;
  for (const auto& [negative, token] : candidates) {
    const double x =
        (-static_cast<double>(negative) - highest) / static_cast<double>(options_.temperature);
    weights.push_back(std::exp(x));
    total += weights.back();
  }
  if (options_.top_p < 1) {
    double before = 0;
    std::size_t kept = 0;
    while (kept < weights.size() &&
           (kept == 0 || before < static_cast<double>(options_.top_p) * total)) {
      before += weights[kept++];
    }
    weights.resize(kept);
    total = before;
  }
  // 53 random bits.
  double left = static_cast<double>(rng_() >> 11U) * 0x1p-53 * total;
  std::size_t drawn = weights.size();
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] > 0) drawn = i;  // the last of these where rounding leaves a rest
    left -= weights[i];
    if (left < 0) break;
  }
  return candidates[drawn].second;
}

}  // namespace qeft_llm
