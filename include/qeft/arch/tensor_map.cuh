// SPDX-License-Identifier: Apache-2.0
// Boxes of a matrix in memory, copied to shared memory by the tensor memory accelerator. From
// compute capability 9.0 on.
#pragma once

#include <cuda.h>

#include "qeft/arch/barrier.cuh"

namespace qeft::arch {

/// Asks for the description of a matrix, a __grid_constant__ parameter of the kernel.
__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Starts to copy the box whose first element is (row, column), zeros where the matrix has no
/// elements. It goes to the place of `to` in every block of the cluster whose bit is set in
/// `blocks`, and the whole box's bytes are reported to the barrier in the place of `b` there.
/// @pre `to` is aligned as the map's swizzle asks for: 1024 bytes for that of 128 bytes
__device__ __forceinline__ void copy_box_async(void* to, const CUtensorMap& map, int row,
                                               int column, barrier& b, unsigned blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&b)), "r"(column), "r"(row),
      "h"(static_cast<std::uint16_t>(blocks))
      : "memory");
}

}  // namespace qeft::arch
