// SPDX-License-Identifier: Apache-2.0
// All headers in one CUDA translation unit, and the library's host side used from it.
#include <cstdio>

#include "all_headers.cuh"

int main() {
  qeft::matrix_descriptor d;
  d.out_channels = 5;
  d.in_channels = 40;
  d.group_size = 32;
  qeft::quantized_matrix<> rows(d);
  rows.write_code(4, 39, 9);
  rows.write_params(4, 1, qeft::from_float<qeft::half_bits>(0.5F).bits, 3);
  const auto tiles = qeft::repack<qeft::layout::simd_tile>(qeft::on_host(2), rows);
  float weight = 0.0F;
  tiles.visit<qeft::format_list<qeft::quant_format<4>>>(
      [&](auto view) { weight = dequantize(view, 4, 39); });
  std::printf("weight %g, expected 3\n", static_cast<double>(weight));
  return weight == 3.0F ? 0 : 1;
}
