// SPDX-License-Identifier: Apache-2.0
// What gemm is compared with.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "qeft/cpu/matmul.hpp"
#include "support/cases.hpp"
#include "support/sweep.hpp"

namespace qeft_test {

/// y = X W^T in double, and per output the size of the terms that an implementation adds up: what
/// its rounding errors are to be compared with.
struct reference_product {
  std::vector<double> y;          // (tokens, OC)
  std::vector<double> magnitude;  // (tokens, OC)
};

inline reference_product multiply(const plain_layer& layer, const std::vector<float>& x,
                                  qeft::index_t tokens) {
  const auto oc = static_cast<std::size_t>(layer.d.out_channels);
  const auto ic = static_cast<std::size_t>(layer.d.in_channels);
  const std::vector<float> weights = weights_of(layer);
  // scale * q and scale * z are what is added: up to 2^bits times the scale each.
  std::vector<double> largest(oc, 0.0);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    largest[i / ic] = std::max(largest[i / ic], std::abs(static_cast<double>(weights[i])));
  }
  reference_product r;
  for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
    for (std::size_t n = 0; n < oc; ++n) {
      double sum = 0.0;
      double magnitude = 0.0;
      for (std::size_t c = 0; c < ic; ++c) {
        const auto xc = static_cast<double>(x[t * ic + c]);
        sum += static_cast<double>(weights[n * ic + c]) * xc;
        magnitude += largest[n] * std::abs(xc);
      }
      r.y.push_back(sum);
      r.magnitude.push_back(magnitude);
    }
  }
  return r;
}

/// ||y - reference|| / ||reference||
template <class Y>
double relative_error(const std::vector<Y>& y, const std::vector<double>& reference) {
  double error = 0.0;
  double norm = 0.0;
  for (std::size_t i = 0; i < reference.size(); ++i) {
    const double difference = static_cast<double>(qeft::to_float(y[i])) - reference[i];
    error += difference * difference;
    norm += reference[i] * reference[i];
  }
  return norm > 0.0 ? std::sqrt(error / norm) : std::sqrt(error);
}

/// The largest error of an output, relative to its magnitude.
template <class Y>
double worst_error(const std::vector<Y>& y, const reference_product& r) {
  // Relative to the terms of the sum, and to those of a mean output: where all weights of a row are
  // zero (q = z), the kernel's s * q * x - s * z * x leaves a rounding error.
  double mean = 0.0;
  for (const double m : r.magnitude) mean += m / static_cast<double>(r.magnitude.size());
  double worst = 0.0;
  for (std::size_t i = 0; i < r.y.size(); ++i) {
    const double error = std::abs(static_cast<double>(qeft::to_float(y[i])) - r.y[i]);
    const double scale = r.magnitude[i] + mean;
    if (!(error <= worst * scale)) {  // NaN counts
      worst = scale > 0.0 ? error / scale : std::numeric_limits<double>::infinity();
    }
  }
  return worst;
}

/// What worst_error may be: without a fused multiply-add every term is rounded twice.
#if defined(QEFT_HAS_FMA)
inline constexpr double exact_bound = 1e-6;
#else
inline constexpr double exact_bound = 2e-6;
#endif

/// Activations around 1, those of weak columns 60 times as large: the outliers that the method
/// keeps in full precision.
template <class X>
std::vector<X> random_activations(const plain_layer& layer, qeft::index_t tokens,
                                  random_source& random) {
  const auto ic = static_cast<std::size_t>(layer.d.in_channels);
  std::vector<double> gain(ic, 1.0);
  for (const std::int32_t column : layer.weak_columns) {
    gain[static_cast<std::size_t>(column)] = 60.0;
  }
  std::vector<X> x(ic * static_cast<std::size_t>(tokens));
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = qeft::from_float<X>(static_cast<float>(random.real() * gain[i % ic]));
  }
  return x;
}

template <class X>
std::vector<float> floats(const std::vector<X>& x) {
  std::vector<float> r;
  for (const X& v : x) r.push_back(qeft::to_float(v));
  return r;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace qeft_test
