// SPDX-License-Identifier: Apache-2.0
// 8 to 512 tokens through typical linears. `of_fma` is the fraction of the FP32 multiply-add peak
// (int8 activations can exceed 1: their products are integers). Peer: Eigen's SGEMM.
#include <Eigen/Core>

#include "qeft/container/repack.hpp"
#include "qeft/cpu/matmul.hpp"
#include "support/main.hpp"

namespace {

using namespace qeft_bench;
using qeft::layout::simd_tile;

double flops_of(const shape& s, index_t tokens) {
  return 2.0 * static_cast<double>(s.out_channels) * static_cast<double>(s.in_channels) *
         static_cast<double>(tokens);
}

template <class Activation>
void gemm(benchmark::State& state, const machine& m, const shape& s, int bits, index_t tokens,
          Activation, double tolerance) {
  const auto d = describe(s, bits, 128, 16);
  const qeft::quantized_matrix<> w = random_matrix(d);
  const auto layer = qeft::repack<simd_tile>(m.exec, w);
  const auto x = random_floats(tokens * s.in_channels);
  std::vector<float> y(static_cast<std::size_t>(tokens * s.out_channels));
  const qeft::cpu::executor<Activation> exec(m.exec);
  rate measured(state);
  for (auto _ : state) {
    qeft::gemm(exec, layer, x.data(), tokens, y.data()).throw_if_error();
  }
  measured.flops(m, flops_of(s, tokens));
  measured.bytes(m, qeft::storage_of<simd_tile>(d).total());  // of the layer, read once
  const float* last_x = x.data() + (tokens - 1) * s.in_channels;
  const float* last_y = y.data() + (tokens - 1) * s.out_channels;
  if (!(worst_error(w, last_x, last_y) < tolerance)) throw std::runtime_error("wrong result");
}

void eigen(benchmark::State& state, const shape& s, index_t tokens) {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const matrix w = matrix::Random(s.out_channels, s.in_channels);
  const matrix x = matrix::Random(tokens, s.in_channels);
  matrix y(tokens, s.out_channels);
  rate measured(state);
  for (auto _ : state) {
    y.noalias() = x * w.transpose();
    benchmark::DoNotOptimize(y.data());
  }
  measured.flops(machines().front(), flops_of(s, tokens));
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (const shape& s : shapes) {
      for (const index_t tokens : {index_t{8}, index_t{64}, index_t{512}}) {
        const std::string name = std::string(s.name) + "/" + std::to_string(tokens) + "tokens/";
        for (const machine& m : machines()) {
          for (const int bits : {4, 3}) {
            const std::string full = name + std::to_string(bits) + "bit/" + threads_of(m);
            add(full + "/exact", [=, &m](benchmark::State& state) {
              gemm(state, m, s, bits, tokens, qeft::cpu::exact{}, 1e-6);
            });
            add(full + "/int8", [=, &m](benchmark::State& state) {
              gemm(state, m, s, bits, tokens, qeft::cpu::int8{}, 1e-3);
            });
          }
        }
        add(name + "eigen_fp32/1t", [=](benchmark::State& state) { eigen(state, s, tokens); });
      }
    }
  });
}
