// SPDX-License-Identifier: Apache-2.0
// What a consumer does first: pack a weight, change the layout, read it back.
#include <cstdio>

#include <qeft/qeft.hpp>

int main() {
  qeft::matrix_descriptor d;
  d.out_channels = 8;
  d.in_channels = 64;
  qeft::quantized_matrix<> rows(d);
  rows.write_code(7, 63, 12);
  rows.write_params(7, 0, qeft::from_float<qeft::half_bits>(0.25F).bits, 8);
  const auto tiles = qeft::repack<qeft::layout::simd_tile>(qeft::on_host(2), rows);
  const auto view = tiles.view<qeft::quant_format<4>>(qeft::weak_none{});
  const float weight = dequantize(view, 7, 63);
  std::printf("weight %g, expected 1\n", static_cast<double>(weight));
  return weight == 1.0F ? 0 : 1;
}
