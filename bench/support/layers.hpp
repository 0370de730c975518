// SPDX-License-Identifier: Apache-2.0
// The layers that benchmarks run on: shapes of real models, filled with random numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/core/math.hpp"
#include "support/limits.hpp"
#include "support/shape.hpp"

namespace qeft_bench {

using qeft::index_t;

/// Every different linear of the three models; k and v of Llama-2 are as its q.
inline constexpr shape shapes[] = {
    {"llama2_7b/qo", 4096, 4096},       {"llama2_7b/gate_up", 11008, 4096},
    {"llama2_7b/down", 4096, 11008},    {"llama3_8b/kv", 1024, 4096},
    {"llama3_8b/gate_up", 14336, 4096}, {"llama3_8b/down", 4096, 14336},
    {"smollm2/qo", 576, 576},           {"smollm2/kv", 192, 576},
    {"smollm2/gate_up", 1536, 576},     {"smollm2/down", 576, 1536},
};

/// Weak columns at the tail, integer zero points.
inline qeft::matrix_descriptor describe(const shape& s, int bits, index_t group_size, index_t k) {
  qeft::matrix_descriptor d;
  d.out_channels = s.out_channels;
  d.in_channels = s.in_channels;
  d.bits = bits;
  d.group_size = group_size;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = k;
  return d;
}

/// Random codes and zero points, scales around 0.01, weak values in [-1, 1).
inline qeft::quantized_matrix<> random_matrix(const qeft::matrix_descriptor& d,
                                              std::uint64_t seed = 1) {
  std::mt19937_64 rng(seed);
  std::vector<std::int32_t> weak_index;
  for (index_t j = 0; d.weak == qeft::weak_kind::indexed && j < d.weak_columns; ++j) {
    weak_index.push_back(static_cast<std::int32_t>(j * d.in_channels / d.weak_columns));
  }
  qeft::quantized_matrix<> m(d, weak_index);
  // Dense rows of 4-bit codes fill whole words at these sizes; the last word of other widths is
  // masked by kernels through zero activations.
  const auto fill = [&](qeft::span<std::byte> bytes) {
    for (index_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(rng() >> 56U);
  };
  const auto fill_halves = [&](qeft::span<std::byte> bytes, double mean, double spread) {
    auto* p = reinterpret_cast<std::uint16_t*>(bytes.data());
    for (index_t i = 0; i < bytes.size() / 2; ++i) {
      const double unit = static_cast<double>(rng() >> 11U) * 0x1p-52 - 1.0;
      p[i] = qeft::from_float<qeft::half_bits>(static_cast<float>(mean + spread * unit)).bits;
    }
  };
  fill(m.codes());
  fill(m.zeros());
  fill_halves(m.scales(), 0.01, 0.005);
  fill_halves(m.weak(), 0.0, 1.0);
  return m;
}

inline std::vector<float> random_floats(index_t count, std::uint64_t seed = 2) {
  std::mt19937_64 rng(seed);
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& v : x) v = static_cast<float>(static_cast<double>(rng() >> 11U) * 0x1p-52 - 1.0);
  return x;
}

/// Copies of a layer that together exceed the caches, taken in turn.
template <class Layer>
class rotation {
 public:
  /// @param bytes what a pass reads of one layer
  rotation(const Layer& layer, index_t bytes)
      : layers_(static_cast<std::size_t>(qeft::ceil_div(cold_bytes, bytes)), layer) {}
  const Layer& next() {
    at_ = (at_ + 1) % layers_.size();
    return layers_[at_];
  }

 private:
  std::vector<Layer> layers_;
  std::size_t at_ = 0;
};

/// The largest error of an output of y = W x, relative to the sum of |w x|, over 64 of the rows.
inline double worst_error(const qeft::quantized_matrix<>& w, const float* x, const float* y) {
  const index_t oc = w.descriptor().out_channels;
  const index_t ic = w.descriptor().in_channels;
  double worst = 0.0;
  w.visit([&](const auto& view) {
    for (index_t i = 0; i < 64; ++i) {
      const index_t n = i * (oc - 1) / 63;
      double sum = 0.0;
      double magnitude = 0.0;
      for (index_t c = 0; c < ic; ++c) {
        const double term = static_cast<double>(dequantize(view, n, c)) * static_cast<double>(x[c]);
        sum += term;
        magnitude += std::abs(term);
      }
      worst = std::max(worst, std::abs(static_cast<double>(y[n]) - sum) / magnitude);
    }
  });
  return worst;
}

}  // namespace qeft_bench
