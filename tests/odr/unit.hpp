// SPDX-License-Identifier: Apache-2.0
// What one unit of the program gives to the others: its own run through the public interface, and
// objects that cross.
#pragma once

#include <cstdint>

#include "qeft/qeft.hpp"

namespace qeft_odr {

using qeft::index_t;
using format = qeft::quant_format<4, 32>;
using weak = qeft::weak_tail<8>;
using matrix = qeft::quantized_matrix<qeft::layout::simd_tile>;
using view = qeft::quantized_matrix_view<format, weak, qeft::layout::simd_tile>;

inline constexpr index_t rows = 37;
inline constexpr index_t columns = 200;

struct outputs {
  float one_token[rows];
  float slow[rows];
  float many_tokens[3 * rows];
  float permuted[rows];
  float portable[rows];
  float int8[rows];
  qeft::half_bits halves[rows];
};

struct unit {
  const char* name;
  void (*work)(outputs*);
  void (*fill)(qeft::quantized_matrix<>*);
  void (*multiply)(const qeft::on_host&, const view&, const float* x, float* y);
  qeft::status (*refused_launch)(const qeft::on_host&, const view&, float* y);
  void (*throws)();
  qeft::on_host (*executor)();
};

extern const unit baseline, v3, v4;

/// The activations of every unit.
inline constexpr float activation(index_t i) {
  return static_cast<float>(i * 7 % 17) / 8.0F - 1.0F;
}

}  // namespace qeft_odr
