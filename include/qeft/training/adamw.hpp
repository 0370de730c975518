// SPDX-License-Identifier: Apache-2.0
// AdamW (Loshchilov and Hutter, 2019) with two decoupled decays: towards zero, and towards where
// training began (METHOD section 6).
#pragma once

#include <cmath>

#include "qeft/core/memory.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/core/status.hpp"

namespace qeft {

struct adamw_options {
  double beta1 = 0.9;         // of the mean of gradients, in [0, 1)
  double beta2 = 0.999;       // of the mean of their squares, in [0, 1)
  double epsilon = 1e-8;      // added to the root, not under it
  double weight_decay = 0.0;  // a step takes rate * weight_decay * w off w
  /// L2-SP: a step takes rate * l2_sp * (w - w0) off w, where w0 is the initial value. Decoupled
  /// like weight_decay: a term 2 lambda (w - w0) of the gradient would be divided by its root, so
  /// that the columns with the largest gradients, which move most, were held back least.
  double l2_sp = 0.0;
};

/// What all elements of one step share. Trivially copyable: an argument of a kernel.
struct adamw_step {
  float beta1;
  float new1;  // 1 - beta1, and so below
  float beta2;
  float new2;
  float root_scale;  // 1 / (1 - beta2^t): v without the bias towards its start at zero
  float step_size;   // rate / (1 - beta1^t)
  float epsilon;
  float decay;  // rate * weight_decay
  float pull;   // rate * l2_sp
};

inline namespace QEFT_TARGET {

/// @param step of the optimiser, from 0
/// @throws qeft::error naming what is out of range
inline adamw_step make_adamw_step(const adamw_options& o, double rate, index_t step) {
  const auto refuse = [](const char* name, double value, const char* rule) {
    fail(errc::invalid_argument, text("adamw: ", name, " is ", value, ", but must be ", rule));
  };
  const auto check_beta = [&](const char* name, double beta) {
    if (!(beta >= 0 && beta < 1)) refuse(name, beta, "in [0, 1)");
  };
  const auto check_size = [&](const char* name, double size) {
    if (!(size >= 0 && std::isfinite(size))) refuse(name, size, "finite and not negative");
  };
  check_beta("beta1", o.beta1);
  check_beta("beta2", o.beta2);
  if (!(o.epsilon > 0 && std::isfinite(o.epsilon))) refuse("epsilon", o.epsilon, "above 0");
  check_size("weight_decay", o.weight_decay);
  check_size("l2_sp", o.l2_sp);
  check_size("rate", rate);
  if (step < 0) refuse("step", static_cast<double>(step), "at least 0");
  const auto t = static_cast<double>(step + 1);
  return {static_cast<float>(o.beta1),
          static_cast<float>(1 - o.beta1),
          static_cast<float>(o.beta2),
          static_cast<float>(1 - o.beta2),
          static_cast<float>(1 / (1 - std::pow(o.beta2, t))),
          static_cast<float>(rate / (1 - std::pow(o.beta1, t))),
          static_cast<float>(o.epsilon),
          static_cast<float>(rate * o.weight_decay),
          static_cast<float>(rate * o.l2_sp)};
}

/// One step of one element: both decays, then Adam.
/// @param w  the value, @param w0 its initial value
/// @param m, v running means of the gradient and of its square, zero before the first step
QEFT_HOST_DEVICE void adamw_update(const adamw_step& s, float gradient, float w0, float& w,
                                   float& m, float& v) noexcept {
  m = s.beta1 * m + s.new1 * gradient;
  v = s.beta2 * v + s.new2 * (gradient * gradient);
  const float decayed = w - s.decay * w - s.pull * (w - w0);
  w = decayed - s.step_size * m / (std::sqrt(v * s.root_scale) + s.epsilon);
}

/// One step of an array; every operand has as many elements as `w`. The gradient is multiplied by
/// `gradient_scale` first (see clip_factor).
/// @throws qeft::error when sizes differ
inline void adamw_update(const on_host& exec, const adamw_step& s, span<const float> gradient,
                         float gradient_scale, span<const float> w0, span<float> w, span<float> m,
                         span<float> v) {
  const auto check = [&](const char* name, index_t size) {
    if (size == w.size()) return;
    fail(errc::invalid_argument, text("adamw_update: ", name, " has ", size,
                                      " elements, but must have those of w, ", w.size()));
  };
  check("gradient", gradient.size());
  check("w0", w0.size());
  check("m", m.size());
  check("v", v.size());
  exec.parallel_for(w.size(), 4096, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      adamw_update(s, gradient[i] * gradient_scale, w0[i], w[i], m[i], v[i]);
    }
  });
}

}  // namespace QEFT_TARGET
}  // namespace qeft
