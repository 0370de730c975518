// SPDX-License-Identifier: Apache-2.0
// What users define outside the library: an epilogue, and a storage layout.
#include <cmath>
#include <cstdio>
#include <vector>

#include "qeft/qeft.hpp"

/// Any trivially copyable functor is an epilogue: what it returns is stored.
struct scale {
  float by;
  float operator()(float value, qeft::index_t /*token*/, qeft::index_t /*channel*/) const {
    return by * value;
  }
};

/// One row and 32 columns to a tile, columns of tiles one after another: every row of the first 32
/// columns, then every row of the next. Scales and zero points lie side by side.
struct column_blocks {
  using index_t = qeft::index_t;
  using extent = qeft::layout::extent;

  static constexpr const char* name = "column_blocks";
  static constexpr bool zeros_in_scales = true;
  static constexpr index_t rows = 1;
  template <int Bits>
  static constexpr index_t columns = 32;

  template <int Bits>
  static constexpr index_t code_words(const extent& e) {
    return qeft::ceil_div(e.dense, 32) * e.out_channels * Bits;
  }
  template <int Bits>
  static constexpr index_t tile_word(const extent& e, int p, index_t n, index_t k_tile) {
    return (k_tile * e.out_channels + n) * Bits + qeft::bit_planes<Bits>::shift(p);
  }
  template <int Bits>
  static constexpr qeft::layout::tile_address locate_in_tile(int p, int /*r*/, int c) {
    const int bit = c * qeft::bit_planes<Bits>::width(p);
    return {bit / 32, bit % 32};
  }
  static constexpr index_t scale_count(const extent& e) { return 2 * e.groups * e.out_channels; }
  static constexpr index_t scale_index(const extent& e, index_t n, index_t g) {
    return 2 * (g * e.out_channels + n);
  }
  static constexpr index_t zero_index(const extent& e, index_t n, index_t g) {
    return scale_index(e, n, g) + 1;
  }
  template <int Bits>
  static constexpr qeft::code_address locate_zero(const extent& e, int p, index_t n, index_t g) {
    return {scale_index(e, n, g) / 2, 16 + qeft::bit_planes<Bits>::shift(p)};
  }
  static constexpr index_t weak_count(const extent& e) { return e.weak * e.out_channels; }
  static constexpr index_t weak_index(const extent& e, index_t n, index_t j) {
    return j * e.out_channels + n;
  }
};

int main() {
  qeft::matrix_descriptor d;  // 4 bits, integer zero points
  d.out_channels = 3;
  d.in_channels = 66;
  d.group_size = 32;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = 2;
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

  const qeft::on_host exec(2);
  const qeft::index_t tokens = 2;
  const std::vector<float> x(static_cast<std::size_t>(tokens * d.in_channels), 1.0F);
  const std::vector<float> b = {1.0F, 2.0F, 3.0F};
  std::vector<float> y(static_cast<std::size_t>(tokens * d.out_channels));
  std::vector<float> plain = y;

  const auto layer = qeft::repack<qeft::layout::simd_tile>(exec, packed);
  qeft::gemm(exec, layer, x.data(), tokens, plain.data()).throw_if_error();
  qeft::gemm(exec, layer, x.data(), tokens, y.data(),
             qeft::epilogue::then{qeft::epilogue::bias{b.data()}, scale{0.5F}})
      .throw_if_error();

  // The same weights in the user's layout; products over it are slow and follow the definition.
  const auto own = qeft::repack<column_blocks>(exec, packed);
  std::vector<float> again(y.size());
  qeft::gemm(exec, own, x.data(), tokens, again.data()).throw_if_error();

  int wrong = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    std::printf("%g %g %g\n", static_cast<double>(plain[i]), static_cast<double>(y[i]),
                static_cast<double>(again[i]));
    wrong += std::abs(y[i] - 0.5F * (plain[i] + b[i % 3])) < 1e-5F ? 0 : 1;
    wrong += std::abs(again[i] - plain[i]) < 1e-5F ? 0 : 1;
  }
  return wrong == 0 ? 0 : 1;
}
