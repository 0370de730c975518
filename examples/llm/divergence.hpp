// SPDX-License-Identifier: Apache-2.0
// How far the next-token distributions of two models are apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "qeft/core/config.hpp"

namespace qeft_llm {

/// log sum_v e^x[v], safe for any finite x. @pre count > 0
inline double log_sum_exp(const float* x, qeft::index_t count) {
  const double largest = *std::max_element(x, x + count);
  double sum = 0;
  for (qeft::index_t v = 0; v < count; ++v) sum += std::exp(x[v] - largest);
  return largest + std::log(sum);
}

/// KL(p || q) = sum_v p[v] log(p[v] / q[v]) in nats, of p = softmax(reference) and
/// q = softmax(logits). Never negative, exactly 0 for equal logits, and finite for finite ones.
/// @param reference, logits (vocabulary) each
inline double kl_divergence(const float* reference, const float* logits, qeft::index_t vocabulary) {
  const double reference_norm = log_sum_exp(reference, vocabulary);
  const double norm = log_sum_exp(logits, vocabulary);
  double sum = 0;
  for (qeft::index_t v = 0; v < vocabulary; ++v) {
    const double log_p = reference[v] - reference_norm;
    sum += std::exp(log_p) * (log_p - (logits[v] - norm));
  }
  return std::max(sum, 0.0);  // rounding can take a sum near 0 below it
}

/// Mean of what was measured per window and the standard error of that mean, both over windows.
struct estimate {
  double mean = 0;
  double standard_error = 0;  // sample standard deviation / sqrt(windows); NaN for one window
};

/// @pre values is not empty
template <class Values>
estimate estimate_mean(const Values& values) {
  const auto count = static_cast<double>(values.size());
  estimate result;
  for (const double x : values) result.mean += x / count;
  if (values.size() == 1) return {result.mean, std::numeric_limits<double>::quiet_NaN()};
  double squares = 0;
  for (const double x : values) squares += (x - result.mean) * (x - result.mean);
  result.standard_error = std::sqrt(squares / (count - 1) / count);
  return result;
}

}  // namespace qeft_llm
