// SPDX-License-Identifier: Apache-2.0
// The solver's parts and whole layers. Accumulating and factoring the Hessian are compared with the
// multiply-add peak (`of_fma`). The group search and whole layers have no such limit: they report
// weights per second (`w/s`), and a layer the error of its result relative to that of plain RTN
// without weak columns (`E/E_rtn`).

#include "qeft/core/host_buffer.hpp"
#include "qeft/solver/hessian.hpp"
#include "qeft/solver/quantize_layer.hpp"
#include "support/main.hpp"

namespace {

using namespace qeft_bench;
namespace solver = qeft::solver;

void count_weights(benchmark::State& state, index_t weights) {
  state.counters["w/s"] =
      benchmark::Counter(static_cast<double>(weights) * static_cast<double>(state.iterations()),
                         benchmark::Counter::kIsRate);
}

/// Correlated activations, a few channels of which are outliers.
std::vector<float> activations(index_t tokens, index_t channels) {
  std::vector<float> x = random_floats(tokens * channels, 3);
  for (index_t t = 0; t < tokens; ++t) {
    float* row = x.data() + t * channels;
    for (index_t c = 1; c < channels; ++c) row[c] += 0.5F * row[c - 1];
    for (index_t c = 0; c < channels; c += 37) row[c] *= c % 4 == 0 ? 20.0F : 1.0F;
  }
  return x;
}

qeft::host_buffer<float> hessian_of(const qeft::on_host& exec, index_t channels) {
  solver::hessian_accumulator h(channels);
  for (int sample = 0; sample < 4; ++sample) {
    const auto x = activations(channels, channels);
    h.add(exec, x.data(), channels);
  }
  return std::move(h).finish();
}

void accumulate(benchmark::State& state, const machine& m, index_t channels) {
  constexpr index_t tokens = 512;
  const auto x = activations(tokens, channels);
  solver::hessian_accumulator h(channels);
  const auto n = static_cast<double>(channels);
  rate measured(state);
  for (auto _ : state) h.add(m.exec, x.data(), tokens);
  measured.flops(m, n * (n + 1) * tokens);  // one triangle
}

void factor(benchmark::State& state, const machine& m, index_t channels) {
  const auto h = hessian_of(m.exec, channels);
  const auto order = qeft::permutation::identity(channels);
  const auto n = static_cast<double>(channels);
  rate measured(state);
  for (auto _ : state) {
    const auto u = solver::factor_inverse(m.exec, h, order, channels, {});
    benchmark::DoNotOptimize(u.u.data());
  }
  measured.flops(m, 2.0 / 3.0 * n * n * n);  // factorisation and inversion, in double
}

template <class Search>
void search(benchmark::State& state, int bits, bool weighted, const Search& find) {
  constexpr index_t group = 128;
  constexpr index_t groups = 64;
  const auto w = random_floats(group * groups);
  std::vector<float> importance = random_floats(weighted ? group : 0, 5);
  for (float& v : importance) v = 0.01F + v * v;
  solver::group_format f;
  f.bits = bits;
  for (auto _ : state) {
    for (index_t g = 0; g < groups; ++g) {
      const qeft::span<const float> weights(w.data() + g * group, group);
      benchmark::DoNotOptimize(find(weights, f, solver::group_search_options{}, importance));
    }
  }
  count_weights(state, group * groups);
}

void layer(benchmark::State& state, const machine& m, const shape& s, int bits) {
  const auto w = random_floats(s.out_channels * s.in_channels);
  const auto h = hessian_of(m.exec, s.in_channels);
  solver::layer_options o;
  o.bits = bits;
  solver::layer_options plain = o;
  plain.method = solver::layer_method::rtn;
  const auto rtn = solver::quantize_layer(m.exec, w, s.out_channels, s.in_channels, h, plain);
  for (index_t c = 0; c < 128 && c * 37 < s.in_channels; ++c) {
    o.weak_columns.push_back(static_cast<std::int32_t>(c * 37));
  }
  double error = 0.0;
  for (auto _ : state) {
    const auto result = solver::quantize_layer(m.exec, w, s.out_channels, s.in_channels, h, o);
    error = *result.report.output_error;
  }
  state.counters["E/E_rtn"] = error / *rtn.report.output_error;
  if (!(error < *rtn.report.output_error)) throw std::runtime_error("no better than RTN");
  count_weights(state, s.out_channels * s.in_channels);
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (const int bits : {4, 3}) {
      const std::string width = std::to_string(bits) + "bit/1t";
      add("group_search/pruned/" + width,
          [=](benchmark::State& state) { search(state, bits, false, solver::pruned_search); });
      add("group_search/weighted/" + width,
          [=](benchmark::State& state) { search(state, bits, true, solver::pruned_search); });
      add("group_search/exhaustive/" + width,
          [=](benchmark::State& state) { search(state, bits, false, solver::exhaustive_search); });
    }
    for (const machine& m : machines()) {
      for (const index_t channels : {576, 1536, 4096}) {
        const std::string size = std::to_string(channels) + "/" + threads_of(m);
        add("hessian/512tokens/" + size,
            [=, &m](benchmark::State& state) { accumulate(state, m, channels); });
        add("factor_inverse/" + size,
            [=, &m](benchmark::State& state) { factor(state, m, channels); });
      }
      for (const shape& s : shapes) {
        if (s.in_channels > 4096 || s.out_channels > 4096) continue;  // minutes, and nothing new
        for (const int bits : {4, 3}) {
          add("quantize_layer/" + std::string(s.name) + "/" + std::to_string(bits) + "bit/" +
                  threads_of(m),
              [=, &m](benchmark::State& state) { layer(state, m, s, bits); });
        }
      }
    }
  });
}
