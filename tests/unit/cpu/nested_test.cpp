// SPDX-License-Identifier: Apache-2.0
// Products inside parallel_for of their own executor, and from several threads at a time.
#include <cstdint>
#include <thread>
#include <vector>

#include "qeft/container/repack.hpp"
#include "qeft/cpu/matmul.hpp"
#include "support/catch.hpp"

using qeft::index_t;

namespace {

using format = qeft::quant_format<4, 32>;
using matrix = qeft::quantized_matrix<qeft::layout::simd_tile>;

matrix layer(const qeft::on_host& exec, index_t out_channels) {
  qeft::matrix_descriptor d;
  d.out_channels = out_channels;
  d.in_channels = 64;
  d.group_size = 32;
  qeft::quantized_matrix<> m(d);
  for (index_t n = 0; n < out_channels; ++n) {
    for (index_t g = 0; g < 2; ++g) {
      m.write_code(n, 33 * g, static_cast<std::uint32_t>(n % 16));
      m.write_params(n, g, qeft::from_float<qeft::half_bits>(0.25F).bits, 8);
    }
  }
  return qeft::repack<qeft::layout::simd_tile>(exec, m);
}

std::vector<float> product(const qeft::on_host& exec, const matrix& w) {
  const std::vector<float> x(64, 1.0F);
  std::vector<float> y(static_cast<std::size_t>(w.descriptor().out_channels));
  qeft::gemv(exec, w.view<format>(qeft::weak_none{}), x.data(), y.data()).throw_if_error();
  return y;
}

}  // namespace

TEST_CASE("gemv inside parallel_for of the same executor, small and large") {
  for (const index_t out_channels : {32, 4000}) {
    const qeft::on_host exec(2);
    const matrix w = layer(exec, out_channels);
    const std::vector<float> expected = product(exec, w);
    std::vector<std::vector<float>> results(4);
    exec.parallel_for(4, 1, [&](index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) results[static_cast<std::size_t>(i)] = product(exec, w);
    });
    for (const auto& y : results) CHECK(y == expected);
  }
}

TEST_CASE("repack inside parallel_for of the same executor") {
  const qeft::on_host exec(2);
  const std::vector<float> expected = product(exec, layer(exec, 500));
  std::vector<std::vector<float>> results(4);
  exec.parallel_for(4, 1, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      const auto rows = qeft::repack<qeft::layout::row_packed>(exec, layer(exec, 500));
      results[static_cast<std::size_t>(i)] =
          product(exec, qeft::repack<qeft::layout::simd_tile>(exec, rows));
    }
  });
  for (const auto& y : results) CHECK(y == expected);
}

TEST_CASE("products of one executor from several threads") {
  const qeft::on_host exec(3);
  const matrix w = layer(exec, 1000);
  const std::vector<float> expected = product(exec, w);
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> callers;
  for (auto& result : results) {
    callers.emplace_back([&] {
      for (int round = 0; round < 20; ++round) result = product(exec, w);
    });
  }
  for (auto& caller : callers) caller.join();
  for (const auto& y : results) CHECK(y == expected);
}
