// SPDX-License-Identifier: Apache-2.0
// Compiled once for each instruction set, with QEFT_ODR_UNIT as the name. Nothing of the standard
// library's is instantiated here, so that what the objects share is the library's doing.
#include "unit.hpp"

namespace qeft_odr {
namespace {

void fill(qeft::quantized_matrix<>* m) {
  qeft::matrix_descriptor d;
  d.out_channels = rows;
  d.in_channels = columns;
  d.group_size = 32;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = 8;
  *m = qeft::quantized_matrix<>(d);
  std::uint32_t state = 12345;
  const auto random = [&] { return (state = state * 1664525U + 1013904223U) >> 8U; };
  for (index_t n = 0; n < rows; ++n) {
    for (index_t i = 0; i < 192; ++i) m->write_code(n, i, random() % 16U);
    for (index_t g = 0; g < 6; ++g) {
      const float scale = 0.01F + static_cast<float>(random() % 1000U) * 1e-4F;
      m->write_params(n, g, qeft::from_float<qeft::half_bits>(scale).bits, random() % 16U);
    }
    for (index_t j = 0; j < 8; ++j) {
      const float weight = static_cast<float>(random() % 1000U) * 1e-3F - 0.5F;
      m->write_weak(n, j, qeft::from_float<qeft::half_bits>(weight).bits);
    }
  }
}

void work(outputs* out) {
  float x[3 * columns];
  for (index_t i = 0; i < 3 * columns; ++i) x[i] = activation(i);
  const qeft::on_host exec(2);
  qeft::quantized_matrix<> packed;
  fill(&packed);
  const matrix tiles = qeft::repack<qeft::layout::simd_tile>(exec, packed);
  const view w = tiles.view<format>(weak{});
  qeft::gemv(exec, w, x, out->one_token).throw_if_error();
  qeft::gemv(exec, packed.view<format>(weak{}), x, out->slow).throw_if_error();
  qeft::gemm(exec, tiles, x, 3, out->many_tokens).throw_if_error();
  namespace cpu = qeft::cpu;
  qeft::gemv(cpu::with<cpu::exact, cpu::isa::portable>(exec), w, x, out->portable).throw_if_error();
  qeft::gemv(cpu::with<cpu::int8>(exec), w, x, out->int8).throw_if_error();
  qeft::half_bits x_half[columns];
  for (index_t i = 0; i < columns; ++i) x_half[i] = qeft::from_float<qeft::half_bits>(x[i]);
  qeft::gemv(exec, w, x_half, out->halves).throw_if_error();
  const auto permuted = qeft::permute_rows(qeft::permutation::identity(rows), packed);
  qeft::gemv(exec, qeft::repack<qeft::layout::simd_tile>(exec, permuted), x, out->permuted)
      .throw_if_error();
}

void multiply(const qeft::on_host& exec, const view& w, const float* x, float* y) {
  qeft::gemv(exec, w, x, y).throw_if_error();
}

qeft::status refused_launch(const qeft::on_host& exec, const view& w, float* y) {
  return qeft::gemv(exec, w, static_cast<const float*>(nullptr), y);
}

void throws() {
  qeft::matrix_descriptor d;
  d.out_channels = 8;
  d.in_channels = 100;
  d.group_size = -7;
  qeft::quantized_matrix<> refused(d);
}

qeft::on_host executor() { return qeft::on_host(2); }

}  // namespace

const unit QEFT_ODR_UNIT = {QEFT_ODR_NAME, work, fill, multiply, refused_launch, throws, executor};

}  // namespace qeft_odr
