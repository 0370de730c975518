// SPDX-License-Identifier: Apache-2.0
// Looked at by ptx_test.cmake, never run.
#include "qeft/core/half.hpp"

__global__ void widen(const qeft::half_bits* h, float* x) { *x = qeft::to_float(*h); }

__global__ void narrow(const float* x, qeft::half_bits* h) {
  *h = qeft::from_float<qeft::half_bits>(*x);
}

namespace qeft {
inline namespace QEFT_TARGET {
struct of_this_target {};
}  // namespace QEFT_TARGET
}  // namespace qeft

// Named after the instruction set of the host: both of nvcc's passes must agree on it.
template <class T>
__global__ void named(T*) {}
template __global__ void named<qeft::of_this_target>(qeft::of_this_target*);
