// SPDX-License-Identifier: Apache-2.0
// What this machine can do at best, measured in the run that reports fractions of it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "qeft/core/host_buffer.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/cpu/simd.hpp"

namespace qeft_bench {

using qeft::index_t;

/// Layers and buffers are rotated until a round touches so many bytes: more than any cache in front
/// of one core holds, so that every pass reads memory.
inline constexpr index_t cold_bytes = index_t{256} << 20;

/// Runs body() `rounds` times and returns the median seconds of a run.
template <class Body>
double median_seconds(int rounds, const Body& body) {
  std::vector<double> seconds;
  for (int i = 0; i < rounds; ++i) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    seconds.push_back(taken.count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + rounds / 2, seconds.end());
  return seconds[static_cast<std::size_t>(rounds / 2)];
}

/// Bytes per second that the executor's threads read from memory together: a sum over cold_bytes
/// with the kernels' own loads and prefetch distance.
inline double read_bandwidth(const qeft::on_host& exec) {
  using isa = qeft::cpu::native_isa;
  constexpr index_t line = 64 / 4;
  const qeft::host_buffer<std::uint32_t> data(static_cast<std::size_t>(cold_bytes / 4), 1U);
  std::uint32_t sink = 0;
  const double seconds = median_seconds(7, [&] {
    exec.parallel_for(cold_bytes / 4, index_t{1} << 16, [&](index_t begin, index_t end) {
      isa::words sum[4] = {isa::zero_words(), isa::zero_words(), isa::zero_words(),
                           isa::zero_words()};
      for (index_t i = begin; i < end; i += 4 * isa::lanes) {
        for (index_t l = 0; l < 4 * isa::lanes; l += line)
          isa::prefetch(reinterpret_cast<std::uintptr_t>(data.data() + i + l) + 4096);
        for (int v = 0; v < 4; ++v) sum[v] = sum[v] + isa::load(data.data() + i + v * isa::lanes);
      }
      std::uint32_t lanes[isa::lanes];
      isa::store(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
      static_cast<volatile std::uint32_t&>(sink) = lanes[0];
    });
  });
  return static_cast<double>(cold_bytes) / seconds;
}

/// FP32 multiply-adds per second, times two, of the executor's threads together.
inline double multiply_add_peak(const qeft::on_host& exec) {
  using isa = qeft::cpu::native_isa;
  constexpr int chains = 12;
  constexpr index_t steps = 200000;
  float sink = 0.0F;
  const float one = 1.0F;
  const float tiny = 1e-9F;
  const double seconds = median_seconds(9, [&] {
    exec.parallel_for(exec.threads(), 1, [&](index_t begin, index_t end) {
      for (index_t task = begin; task < end; ++task) {
        const auto a = isa::broadcast(&one);
        const auto b = isa::broadcast(&tiny);
        isa::floats sum[chains];
        for (auto& s : sum) s = isa::zero();
        for (index_t i = 0; i < steps; ++i) {
          for (auto& s : sum) s = isa::fma(s, a, b);
        }
        float lanes[isa::lanes];
        for (int c = 1; c < chains; ++c) sum[0] = isa::add(sum[0], sum[c]);
        isa::store(lanes, sum[0]);
        static_cast<volatile float&>(sink) = lanes[0];
      }
    });
  });
  const double operations = 2.0 * chains * isa::lanes * static_cast<double>(steps);
  return operations * static_cast<double>(exec.threads()) / seconds;
}

}  // namespace qeft_bench
