// SPDX-License-Identifier: Apache-2.0
// Random numbers without a state: a function of what they are for.
#pragma once

#include "qeft/core/config.hpp"

namespace qeft {

/// A bijection of 64-bit words that spreads every bit (the finaliser of SplitMix64).
QEFT_HOST_DEVICE constexpr std::uint64_t mix_bits(std::uint64_t x) noexcept {
  x += 0x9E3779B97F4A7C15U;
  x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27U)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31U);
}

/// 64 random bits for a seed and counters; the same everywhere, in any order of calls.
template <class... Counters>
QEFT_HOST_DEVICE constexpr std::uint64_t counter_bits(std::uint64_t seed,
                                                      Counters... counters) noexcept {
  std::uint64_t state = mix_bits(seed);
  ((state = mix_bits(state ^ static_cast<std::uint64_t>(counters))), ...);
  return state;
}

/// Uniform in [0, 1), a multiple of 2^-24.
template <class... Counters>
QEFT_HOST_DEVICE constexpr float counter_uniform(std::uint64_t seed,
                                                 Counters... counters) noexcept {
  return static_cast<float>(counter_bits(seed, counters...) >> 40U) * 0x1p-24F;
}

}  // namespace qeft
