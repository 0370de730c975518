// SPDX-License-Identifier: Apache-2.0
// Learning rates by step (METHOD section 6).
#pragma once

#include <cmath>
#include <cstdint>

#include "qeft/core/status.hpp"

namespace qeft {

/// How the rate goes on behind the warm-up.
enum class schedule_kind : std::uint8_t { constant, cosine, linear };

/// A rate that rises over the first `warmup` steps to `peak`, then stays or falls towards `floor`.
struct rate_schedule {
  schedule_kind kind = schedule_kind::constant;
  double peak = 1e-5;
  index_t warmup = 0;  // steps; the rate of step s among them is peak * (s + 1) / warmup
  index_t steps = 0;   // of the whole training; floor is the rate of step `steps`, behind the last
  double floor = 0;    // not used by constant
};

inline namespace QEFT_TARGET {

/// @throws qeft::error naming what is out of range
inline void check_schedule(const rate_schedule& s) {
  const auto refuse = [](const char* name, const auto& value, const std::string& rule) {
    fail(errc::invalid_argument, text("schedule: ", name, " is ", value, ", but must be ", rule));
  };
  if (!(s.peak > 0 && std::isfinite(s.peak))) refuse("peak", s.peak, "a number above 0");
  if (!(s.floor >= 0 && s.floor <= s.peak)) {
    refuse("floor", s.floor, text("between 0 and the peak, ", s.peak));
  }
  if (s.steps < 0) refuse("steps", s.steps, "at least 0");
  if (s.warmup < 0 || s.warmup > s.steps) {
    refuse("warmup", s.warmup, text("between 0 and the number of steps, ", s.steps));
  }
}

/// @param step from 0; behind the last one the rate stays where it ended
/// @throws qeft::error as check_schedule()
inline double rate_at(const rate_schedule& s, index_t step) {
  check_schedule(s);
  if (step < s.warmup)
    return s.peak * static_cast<double>(step + 1) / static_cast<double>(s.warmup);
  if (s.kind == schedule_kind::constant) return s.peak;
  if (step >= s.steps) return s.floor;
  const double done =
      static_cast<double>(step - s.warmup) / static_cast<double>(s.steps - s.warmup);
  constexpr double pi = 3.14159265358979323846;
  const double left = s.kind == schedule_kind::linear ? 1 - done : (1 + std::cos(pi * done)) / 2;
  return s.floor + (s.peak - s.floor) * left;
}

}  // namespace QEFT_TARGET
}  // namespace qeft
