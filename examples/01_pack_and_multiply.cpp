// SPDX-License-Identifier: Apache-2.0
// Packs a small layer with two weak columns and multiplies it with a vector.
#include <cstdio>
#include <vector>

#include "qeft/qeft.hpp"

int main() {
  qeft::matrix_descriptor d;  // 4 bits, integer zero points
  d.out_channels = 3;
  d.in_channels = 66;
  d.group_size = 32;
  d.weak = qeft::weak_kind::tail;  // the last two columns stay in FP16
  d.weak_columns = 2;
  std::printf("%.3f bits per weight\n", qeft::bits_per_weight(d));

  qeft::quantized_matrix<> packed(d);
  for (qeft::index_t n = 0; n < 3; ++n) {
    for (qeft::index_t i = 0; i < d.dense_columns(); ++i) {
      packed.write_code(n, i, static_cast<unsigned>(n + i) % 16);
    }
    for (qeft::index_t g = 0; g < d.groups(); ++g) {
      packed.write_params(n, g, qeft::from_float<qeft::half_bits>(0.25F).bits, 8);
    }
    packed.write_weak(n, 0, qeft::from_float<qeft::half_bits>(1.5F).bits);
  }

  const qeft::on_host exec(2);  // two threads; results do not depend on how many
  const auto layer = qeft::repack<qeft::layout::simd_tile>(exec, packed);
  const std::vector<float> x(66, 1.0F);
  std::vector<float> y(3);
  qeft::gemv(exec, layer, x.data(), y.data()).throw_if_error();
  for (const float v : y) std::printf("%g\n", static_cast<double>(v));
}
