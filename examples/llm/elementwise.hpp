// SPDX-License-Identifier: Apache-2.0
// The element-wise parts of a decoder block, in FP32. Every token's result is independent of the
// other tokens of the call and of the number of threads.
#pragma once

#include "qeft/core/on_host.hpp"

namespace qeft_llm {

/// e^x to within 2 units in the last place for x in [-87, 88], and clamped to that range: written
/// so that compilers vectorise loops over it, which they cannot do with std::exp.
float exp_clamped(float x) noexcept;

/// out[t, c] = x[t, c] / sqrt(mean_c x[t, c]^2 + epsilon) * weight[c]; x and out (tokens, channels)
/// may be the same.
void rms_norm(const qeft::on_host& exec, const float* x, const float* weight, float epsilon,
              qeft::index_t tokens, qeft::index_t channels, float* out);

/// The gradient of rms_norm: dx += its gradient, and, unless dweight is null, dweight += its.
/// @param dy gradient of out; dy, x and dx (tokens, channels), weight and dweight (channels)
void rms_norm_gradient(const qeft::on_host& exec, const float* x, const float* weight,
                       float epsilon, qeft::index_t tokens, qeft::index_t channels, const float* dy,
                       float* dx, float* dweight);

/// gate[i] = silu(gate[i]) * up[i], silu(v) = v / (1 + e^-v).
void swiglu(const qeft::on_host& exec, float* gate, const float* up, qeft::index_t count);

/// Replaces gate and up, as swiglu reads them, by their gradients. @param d gradient of what it
/// writes
void swiglu_gradient(const qeft::on_host& exec, const float* d, float* gate, float* up,
                     qeft::index_t count);

/// sum[i] += addend[i]
void add(const qeft::on_host& exec, const float* addend, qeft::index_t count, float* sum);

/// Turns scores[0 .. count) into softmax(scores); safe for any finite scores.
void softmax(float* scores, qeft::index_t count) noexcept;

}  // namespace qeft_llm
