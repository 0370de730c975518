// SPDX-License-Identifier: Apache-2.0
// Runs of bytes copied to shared memory by the tensor memory accelerator. From compute capability
// 9.0 on.
#pragma once

#include "qeft/arch/barrier.cuh"

namespace qeft::arch {

/// Starts to copy `bytes` bytes. They go to the place `to` of shared memory in every block of the
/// cluster whose bit is set in `blocks`, and are reported to the barrier in the place of b there.
/// @pre addresses and bytes are multiples of 16
__device__ __forceinline__ void copy_to_blocks_async(std::uint32_t to, const void* from, int bytes,
                                                     std::uint32_t b, unsigned blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(b), "h"(static_cast<std::uint16_t>(blocks))
      : "memory");
}

/// Between what a thread writes to shared memory, and what copies write there afterwards, which
/// other blocks of the cluster may start.
__device__ __forceinline__ void fence_bulk_copies() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

}  // namespace qeft::arch
