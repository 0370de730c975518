// SPDX-License-Identifier: Apache-2.0
// The gradients of typical linears over 512 tokens, beside the forward product of the same layer.
// `of_fma` is the fraction of the FP32 multiply-add peak. Peer: Eigen's SGEMM.
#include <Eigen/Core>

#include "qeft/container/repack.hpp"
#include "qeft/cpu/backward.hpp"
#include "support/main.hpp"

namespace {

using namespace qeft_bench;
using qeft::layout::simd_tile;

constexpr index_t tokens = 512;

/// A layer, its input and the gradient of its output.
struct operands {
  operands(const machine& m, const shape& s, index_t k)
      : rows(random_matrix(describe(s, 4, 128, k))),
        w(qeft::repack<simd_tile>(m.exec, rows)),
        x(random_floats(tokens * s.in_channels)),
        dy(random_floats(tokens * s.out_channels)) {}
  qeft::quantized_matrix<> rows;
  qeft::quantized_matrix<simd_tile> w;
  std::vector<float> x;
  std::vector<float> dy;
};

/// Measures call(operands, result (count)). @param check (operands, result) -> whether it is right
template <class Call, class Check>
void measure(benchmark::State& state, const machine& m, const shape& s, index_t k, double columns,
             index_t count, const Call& call, const Check& check) {
  const operands o(m, s, k);
  std::vector<float> result(static_cast<std::size_t>(count));
  rate measured(state);
  for (auto _ : state) call(o, result.data());
  measured.flops(m, 2.0 * static_cast<double>(s.out_channels * tokens) * columns);
  if (!check(o, result)) throw std::runtime_error("wrong result");
}

template <class Sum>
bool close(float value, index_t terms, const Sum& term) {
  double sum = 0.0;
  double magnitude = 0.0;
  for (index_t i = 0; i < terms; ++i) {
    const double t = term(i);
    sum += t;
    magnitude += std::abs(t);
  }
  return std::abs(static_cast<double>(value) - sum) <= 1e-6 * magnitude;
}

void forward(benchmark::State& state, const machine& m, const shape& s, index_t k) {
  measure(
      state, m, s, k, static_cast<double>(s.in_channels), tokens * s.out_channels,
      [&](const operands& o, float* y) {
        qeft::gemm(m.exec, o.w, o.x.data(), tokens, y).throw_if_error();
      },
      [&](const operands& o, const std::vector<float>& y) {
        return worst_error(o.rows, o.x.data(), y.data()) < 1e-6;
      });
}

void input_gradient(benchmark::State& state, const machine& m, const shape& s, index_t k) {
  measure(
      state, m, s, k, static_cast<double>(s.in_channels), tokens * s.in_channels,
      [&](const operands& o, float* dx) {
        qeft::input_gradient(m.exec, o.w, o.dy.data(), tokens, dx).throw_if_error();
      },
      [&](const operands& o, const std::vector<float>& dx) {
        bool right = true;
        o.rows.visit([&](const auto& w) {
          for (index_t c = 0; c < s.in_channels; c += 37) {
            right = right && close(dx[static_cast<std::size_t>(c)], s.out_channels, [&](index_t n) {
                      return static_cast<double>(o.dy[static_cast<std::size_t>(n)]) *
                             static_cast<double>(dequantize(w, n, c));
                    });
          }
        });
        return right;
      });
}

void weak_gradient(benchmark::State& state, const machine& m, const shape& s, index_t k) {
  measure(
      state, m, s, k, static_cast<double>(k), s.out_channels * k,
      [&](const operands& o, float* dw) {  // x stands for its weak columns
        qeft::weak_gradient(m.exec, s.out_channels, k, o.dy.data(), o.x.data(), tokens, dw)
            .throw_if_error();
      },
      [&](const operands& o, const std::vector<float>& dw) {
        return close(dw[0], tokens, [&](index_t t) {
          return static_cast<double>(o.dy[static_cast<std::size_t>(t * s.out_channels)]) *
                 static_cast<double>(o.x[static_cast<std::size_t>(t * k)]);
        });
      });
}

void scale_gradient(benchmark::State& state, const machine& m, const shape& s, index_t k) {
  const index_t groups = describe(s, 4, 128, k).groups();
  measure(
      state, m, s, k, static_cast<double>(s.in_channels - k), s.out_channels * groups,
      [&](const operands& o, float* ds) {
        qeft::scale_gradient(m.exec, o.w, o.dy.data(), o.x.data(), tokens, ds).throw_if_error();
      },
      [&](const operands& o, const std::vector<float>& ds) {
        const auto zero = static_cast<double>(o.rows.read_params(0, 0).zero);
        const auto w = o.rows.view<qeft::quant_format<4>>(qeft::weak_tail<>{{k}});
        return close(ds[0], 128 * tokens, [&](index_t i) {
          const index_t t = i / 128;
          const auto q = static_cast<double>(read_code(w, 0, i % 128));
          return static_cast<double>(o.dy[static_cast<std::size_t>(t * s.out_channels)]) *
                 static_cast<double>(o.x[static_cast<std::size_t>(t * s.in_channels + i % 128)]) *
                 (q - zero);
        });
      });
}

void eigen(benchmark::State& state, const shape& s) {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const matrix w = matrix::Random(s.out_channels, s.in_channels);
  const matrix dy = matrix::Random(tokens, s.out_channels);
  matrix dx(tokens, s.in_channels);
  rate measured(state);
  for (auto _ : state) {
    dx.noalias() = dy * w;
    benchmark::DoNotOptimize(dx.data());
  }
  measured.flops(machines().front(), 2.0 * static_cast<double>(s.out_channels) *
                                         static_cast<double>(s.in_channels * tokens));
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    constexpr shape gradients[] = {
        {"smollm2/qo", 576, 576}, {"smollm2/gate_up", 1536, 576}, {"smollm2/down", 576, 1536},
        {"all_weak", 4096, 576},  {"llama2_7b/qo", 4096, 4096},
    };
    for (const shape& s : gradients) {
      const index_t k = s.name == std::string("all_weak") ? s.in_channels : 16;
      for (const machine& m : machines()) {
        const std::string name = std::string(s.name) + "/" + threads_of(m) + "/";
        const auto run_of = [&](const auto& body) {
          return [=, &m](benchmark::State& state) { body(state, m, s, k); };
        };
        add(name + "gemm", run_of(forward));
        add(name + "input_gradient", run_of(input_gradient));
        add(name + "weak_gradient", run_of(weak_gradient));
        if (k < s.in_channels) add(name + "scale_gradient", run_of(scale_gradient));
      }
      add(std::string(s.name) + "/1t/eigen_fp32",
          [=](benchmark::State& state) { eigen(state, s); });
    }
  });
}
