// SPDX-License-Identifier: Apache-2.0
#include "elementwise.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace qeft_llm {

using qeft::index_t;

namespace {

// Work below this many elements is not worth waking another thread.
constexpr index_t grain = 16384;

// Reductions run over this many interleaved parts, so that they vectorise without reordering.
constexpr index_t lanes = 32;

/// term(0) .. term(count - 1) combined in a fixed order.
template <class Term, class Combine>
float reduce(index_t count, float start, const Term& term, const Combine& combine) noexcept {
  float partial[lanes];
  std::fill(partial, partial + lanes, start);
  index_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (index_t j = 0; j < lanes; ++j) partial[j] = combine(partial[j], term(i + j));
  }
  for (index_t j = 0; i + j < count; ++j) partial[j] = combine(partial[j], term(i + j));
  for (index_t width = lanes / 2; width > 0; width /= 2) {
    for (index_t j = 0; j < width; ++j) partial[j] = combine(partial[j], partial[j + width]);
  }
  return partial[0];
}

template <class Term>
float sum(index_t count, const Term& term) noexcept {
  return reduce(count, 0.0F, term, [](float a, float b) { return a + b; });
}

/// 1 / rms of a token.
float norm_factor(const float* row, float epsilon, index_t channels) noexcept {
  const float squares = sum(channels, [row](index_t c) { return row[c] * row[c]; });
  return 1.0F / std::sqrt(squares / static_cast<float>(channels) + epsilon);
}

inline float exponential(float x) noexcept {
  constexpr float log2_e = 1.44269504F;
  constexpr float ln2_high = 0.693359375F;  // few bits: products with small integers are exact
  constexpr float ln2_low = -2.12194440e-4F;
  constexpr float round_by_adding = 12582912.0F;  // 1.5 * 2^23: the low bits then hold an integer
  x = x < -87.0F ? -87.0F : x;
  x = x > 88.0F ? 88.0F : x;
  const float shifted = x * log2_e + round_by_adding;
  const float n = shifted - round_by_adding;
  const float r = (x - n * ln2_high) - n * ln2_low;  // |r| <= ln(2) / 2
  float p = 1.9875691500e-4F;                        // minimax polynomial of Cephes' expf
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  std::uint32_t integer = 0;
  std::memcpy(&integer, &shifted, sizeof integer);
  const std::uint32_t power_bits = (integer + 127U) << 23U;  // 2^n
  float power = 0.0F;
  std::memcpy(&power, &power_bits, sizeof power);
  return p * power;
}

}  // namespace

float exp_clamped(float x) noexcept { return exponential(x); }

void rms_norm(const qeft::on_host& exec, const float* x, const float* weight, float epsilon,
              index_t tokens, index_t channels, float* out) {
  exec.parallel_for(tokens, std::max<index_t>(1, grain / channels),
                    [&](index_t begin, index_t end) {
                      for (index_t t = begin; t < end; ++t) {
                        const float* row = x + t * channels;
                        float* to = out + t * channels;
                        const float factor = norm_factor(row, epsilon, channels);
                        for (index_t c = 0; c < channels; ++c) to[c] = row[c] * factor * weight[c];
                      }
                    });
}

void rms_norm_gradient(const qeft::on_host& exec, const float* x, const float* weight,
                       float epsilon, index_t tokens, index_t channels, const float* dy, float* dx,
                       float* dweight) {
  std::vector<float> factors(static_cast<std::size_t>(tokens));
  exec.parallel_for(
      tokens, std::max<index_t>(1, grain / channels), [&](index_t begin, index_t end) {
        for (index_t t = begin; t < end; ++t) {
          const float* row = x + t * channels;
          const float* d = dy + t * channels;
          float* to = dx + t * channels;
          const float factor = norm_factor(row, epsilon, channels);
          factors[static_cast<std::size_t>(t)] = factor;
          // The part along the token is lost: its length is fixed.
          const float along = sum(channels, [=](index_t c) { return d[c] * weight[c] * row[c]; }) *
                              factor * factor / static_cast<float>(channels);
          for (index_t c = 0; c < channels; ++c) {
            to[c] += factor * (d[c] * weight[c] - along * row[c]);
          }
        }
      });
  if (dweight == nullptr) return;
  exec.parallel_for(channels, lanes, [&](index_t begin, index_t end) {
    for (index_t t = 0; t < tokens; ++t) {
      const float factor = factors[static_cast<std::size_t>(t)];
      for (index_t c = begin; c < end; ++c) {
        dweight[c] += dy[t * channels + c] * x[t * channels + c] * factor;
      }
    }
  });
}

void swiglu(const qeft::on_host& exec, float* gate, const float* up, index_t count) {
  exec.parallel_for(count, grain, [=](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i)
      gate[i] = gate[i] / (1.0F + exponential(-gate[i])) * up[i];
  });
}

void swiglu_gradient(const qeft::on_host& exec, const float* d, float* gate, float* up,
                     index_t count) {
  exec.parallel_for(count, grain, [=](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      const float g = gate[i];
      const float sigmoid = 1.0F / (1.0F + exponential(-g));
      const float d_silu = sigmoid * (1.0F + g * (1.0F - sigmoid));
      gate[i] = d[i] * up[i] * d_silu;
      up[i] = d[i] * (g * sigmoid);
    }
  });
}

void add(const qeft::on_host& exec, const float* addend, index_t count, float* sum) {
  exec.parallel_for(count, grain, [=](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) sum[i] += addend[i];
  });
}

void softmax(float* scores, index_t count) noexcept {
  const float highest = reduce(
      count, scores[0], [scores](index_t i) { return scores[i]; },
      [](float a, float b) { return a < b ? b : a; });
  for (index_t i = 0; i < count; ++i) scores[i] = exponential(scores[i] - highest);
  const float total = sum(count, [scores](index_t i) { return scores[i]; });
  const float factor = 1.0F / total;
  for (index_t i = 0; i < count; ++i) scores[i] *= factor;
}

}  // namespace qeft_llm
