// SPDX-License-Identifier: Apache-2.0
// The library and the CUDA runtime, by the one target qeft::cuda.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <qeft/core/half.hpp>

int main() {
  int version = 0;
  if (cudaRuntimeGetVersion(&version) != cudaSuccess) return 1;
  std::printf("CUDA runtime %d\n", version);
  return qeft::to_float(qeft::half_bits{0x3c00}) == 1.0F ? 0 : 1;
}
