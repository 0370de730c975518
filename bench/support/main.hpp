// SPDX-License-Identifier: Apache-2.0
// main() of a benchmark: medians of repetitions with their spread, and the machine's limits in the
// header of the report and as counters.
#pragma once

#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "support/layers.hpp"
#include "support/limits.hpp"

namespace qeft_bench {

/// An executor and what its threads can do.
struct machine {
  qeft::on_host exec;
  double bandwidth;  // bytes/s
  double flops;      // FP32 operations/s, a multiply-add being two

  explicit machine(int threads)
      : exec(threads), bandwidth(read_bandwidth(exec)), flops(multiply_add_peak(exec)) {}
};

/// One thread, then all of them; measured before the first benchmark.
inline const std::vector<machine>& machines() {
  static const std::vector<machine> all = [] {
    std::vector<machine> m;
    m.emplace_back(1);
    const int threads = qeft::on_host(0).threads();
    if (threads > 1) m.emplace_back(threads);
    return m;
  }();
  return all;
}

inline std::string threads_of(const machine& m) { return std::to_string(m.exec.threads()) + "t"; }

/// Registers a benchmark: median, spread and counters of five repetitions.
/// @param run (benchmark::State&); throws std::exception when its result is wrong
template <class Run>
void add(const std::string& name, const Run& run) {
  const auto guarded = [run](benchmark::State& state) {
    try {
      run(state);
    } catch (const std::exception& e) {
      state.SkipWithError(e.what());
    }
  };
  benchmark::RegisterBenchmark(name.c_str(), guarded)
      ->UseRealTime()
      ->MinTime(0.1)
      ->Repetitions(5)
      ->ReportAggregatesOnly();
}

/// What iterations reach, per second and as a fraction of a limit. Make it right before the loop.
class rate {
 public:
  explicit rate(benchmark::State& state)
      : state_(state), start_(std::chrono::steady_clock::now()) {}

  /// @param bytes moved per iteration
  void bytes(const machine& m, index_t bytes) {
    count("B/s", "of_read", static_cast<double>(bytes), m.bandwidth);
  }
  /// @param flops per iteration
  void flops(const machine& m, double flops) { count("FLOP/s", "of_fma", flops, m.flops); }

 private:
  void count(const char* absolute, const char* fraction, double work, double limit) {
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start_;
    const double per_second = work * static_cast<double>(state_.iterations()) / taken.count();
    state_.counters[absolute] = per_second;
    state_.counters[fraction] = per_second / limit;
  }

  benchmark::State& state_;
  std::chrono::steady_clock::time_point start_;
};

/// @param add_all registers every benchmark
template <class AddAll>
int run(int argc, char** argv, const AddAll& add_all) {
#if defined(QEFT_BENCH_UNOPTIMISED)
  std::fprintf(stderr,
               "%s was built beside the tests, without optimisation: configure with "
               "-DQEFT_BUILD_TESTS=OFF (README, Benchmarks)\n",
               argv[0]);
  return 1;
#endif
  benchmark::AddCustomContext("instruction set", qeft::cpu::native_isa::name);
  for (const machine& m : machines()) {
    char text[96];
    std::snprintf(text, sizeof text, "read %.1f GB/s, multiply-add %.0f GFLOP/s", m.bandwidth / 1e9,
                  m.flops / 1e9);
    benchmark::AddCustomContext(threads_of(m), text);
  }
  add_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace qeft_bench
