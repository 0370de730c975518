// SPDX-License-Identifier: Apache-2.0
// One token through every linear of three models, weights from memory. `of_read` is the fraction of
// the read bandwidth that the layer's bytes are streamed with: 1 is the limit.
#include <Eigen/Core>

#include "qeft/container/repack.hpp"
#include "qeft/cpu/matmul.hpp"
#include "support/main.hpp"

namespace {

using namespace qeft_bench;
using qeft::layout::simd_tile;

template <class Activation>
void gemv(benchmark::State& state, const machine& m, const qeft::matrix_descriptor& d, Activation,
          double tolerance) {
  const qeft::quantized_matrix<> w = random_matrix(d);
  const auto x = random_floats(d.in_channels);
  std::vector<float> y(static_cast<std::size_t>(d.out_channels));
  const index_t bytes = qeft::storage_of<simd_tile>(d).total();
  rotation layers(qeft::repack<simd_tile>(m.exec, w), bytes);
  const qeft::cpu::executor<Activation> exec(m.exec);
  rate measured(state);
  for (auto _ : state) {
    qeft::gemv(exec, layers.next(), x.data(), y.data()).throw_if_error();
  }
  measured.bytes(m, bytes);
  if (!(worst_error(w, x.data(), y.data()) < tolerance)) throw std::runtime_error("wrong result");
}

/// The peer: FP32 weights through Eigen, which has one thread for this.
void eigen(benchmark::State& state, const shape& s) {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  rotation layers(matrix(matrix::Random(s.out_channels, s.in_channels)),
                  4 * s.out_channels * s.in_channels);
  const Eigen::VectorXf x = Eigen::VectorXf::Random(s.in_channels);
  Eigen::VectorXf y(s.out_channels);
  rate measured(state);
  for (auto _ : state) {
    y.noalias() = layers.next() * x;
    benchmark::DoNotOptimize(y.data());
  }
  measured.bytes(machines().front(), 4 * s.out_channels * s.in_channels);
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (const shape& s : shapes) {
      for (const machine& m : machines()) {
        for (const int bits : {4, 3}) {
          const auto d = describe(s, bits, 128, 16);
          const std::string name =
              std::string(s.name) + "/" + std::to_string(bits) + "bit/" + threads_of(m);
          add(name + "/exact",
              [=, &m](benchmark::State& state) { gemv(state, m, d, qeft::cpu::exact{}, 1e-6); });
          add(name + "/int8",
              [=, &m](benchmark::State& state) { gemv(state, m, d, qeft::cpu::int8{}, 1e-3); });
        }
        const auto add_exact = [&](const char* name, const qeft::matrix_descriptor& d) {
          add(std::string(s.name) + "/" + name + "/" + threads_of(m) + "/exact",
              [=, &m](benchmark::State& state) { gemv(state, m, d, qeft::cpu::exact{}, 1e-6); });
        };
        add_exact("4bit_g32", describe(s, 4, 32, 16));
        // Without reordering: weak columns anywhere, activations gathered in every call.
        auto indexed = describe(s, 4, 128, 16);
        indexed.weak = qeft::weak_kind::indexed;
        add_exact("4bit_indexed", indexed);
        add_exact("fp16", describe(s, 4, 128, s.in_channels));  // k = IC: all columns weak
      }
      add(std::string(s.name) + "/eigen_fp32/1t",
          [=](benchmark::State& state) { eigen(state, s); });
    }
  });
}
