// SPDX-License-Identifier: Apache-2.0
// Random numbers that can be replayed.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <random>

namespace qeft_test {

/// The same numbers with every standard library (std:: distributions differ between them).
class random_source {
 public:
  explicit random_source(std::uint64_t seed) : engine_(seed) {}

  std::uint64_t bits() { return engine_(); }
  /// Uniform in [low, high].
  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  /// Uniform in [-1, 1).
  double real() { return static_cast<double>(engine_() >> 11U) * 0x1p-52 - 1.0; }
  bool chance(int percent) { return integer(0, 99) < percent; }
  template <class T>
  const T& pick(std::initializer_list<T> values) {
    return *(values.begin() + integer(0, static_cast<std::int64_t>(values.size()) - 1));
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace qeft_test
