// SPDX-License-Identifier: Apache-2.0
// What the device can do at best, measured in the run that reports fractions of it.
#pragma once

#include "device/operands.cuh"

namespace qeft_bench {

struct limits {
  double read;   // bytes per second, read
  double copy;   // bytes per second, read and written together
  double flops;  // FP16 operations per second with FP32 sums, a multiply-add being two
};

namespace kernel {

/// Reads all of it, 16 bytes per lane at a time.
__global__ void read_all(const uint4* from, index_t count, std::uint32_t* sink) {
  std::uint32_t sum = 0;
  const index_t threads = static_cast<index_t>(gridDim.x) * blockDim.x;
  index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * threads < count; i += 4 * threads) {
    uint4 v[4];
    for (int j = 0; j < 4; ++j) v[j] = __ldcs(from + i + j * threads);
    for (int j = 0; j < 4; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += threads) sum += from[i].x;
  if (sum == 0x12345678U) *sink = sum;  // so that the loads are kept
}

}  // namespace kernel

inline limits measure_limits(const measurement& measure, const cublas& blas, bool quick) {
  limits l{};
  const index_t bytes = quick ? index_t{1} << 20 : index_t{1} << 30;
  qeft::buffer<std::byte, qeft::device_memory> from(bytes);
  qeft::buffer<std::byte, qeft::device_memory> to(bytes);
  int device = 0;
  int multiprocessors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  const auto of = [&](double work, const timing& t) { return work / t.median; };
  l.read =
      of(static_cast<double>(bytes), measure(4, [&](int) {
           kernel::read_all<<<static_cast<unsigned>(multiprocessors * 8), 256, 0, measure.stream>>>(
               reinterpret_cast<const uint4*>(from.data()), bytes / 16,
               reinterpret_cast<std::uint32_t*>(to.data()));
         }));
  l.copy = of(2.0 * static_cast<double>(bytes), measure(4, [&](int) {
                check(cudaMemcpyAsync(to.data(), from.data(), static_cast<std::size_t>(bytes),
                                      cudaMemcpyDeviceToDevice, measure.stream),
                      "cudaMemcpyAsync");
              }));
  const shape square{"peak", quick ? 128 : 8192, quick ? 128 : 8192};
  const index_t n = square.in_channels;
  const halves w = random_halves(n * n);
  const halves x = random_halves(n * n);
  halves y(n * n);
  l.flops = of(2.0 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n),
               measure(4, [&](int) { blas.forward(w, x, y, square, n); }));
  return l;
}

}  // namespace qeft_bench
