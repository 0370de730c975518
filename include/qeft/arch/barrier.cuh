// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory, on which asynchronous copies report; barriers of some warps; clusters.
// From compute capability 9.0 on.
#pragma once

#include "qeft/arch/copy.cuh"

namespace qeft::arch {

/// A barrier (mbarrier) in shared memory. Its phases are numbered from 0 and have the parity of
/// their number; one ends when as many threads as it was made for have arrived, and all bytes that
/// they expect.
struct alignas(8) barrier {
  std::uint64_t state;
};

/// By one thread. Others use b once they have met that thread behind publish_barriers: those of its
/// block, or of the cluster if other blocks copy to it or arrive at b.
__device__ __forceinline__ void init_barrier(barrier& b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&b)), "r"(arrivals)
               : "memory");
}
/// By the thread that made barriers, behind the last one: copies see them too.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/// Arrives, and says how many bytes of the phase copies will bring.
__device__ __forceinline__ void arrive_and_expect(barrier& b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&b)),
               "r"(bytes)
               : "memory");
}
/// The same at the barrier that a block of the cluster has at this address of shared memory.
__device__ __forceinline__ void arrive_and_expect_in_block(std::uint32_t b, int block, int bytes) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [there], %2;\n"
      "}" ::"r"(b),
      "r"(block), "r"(bytes)
      : "memory");
}
/// Arrives at the barrier that a block of the cluster has at this address of shared memory: who
/// waits for it there may overwrite what this thread, and those it met before, have read.
__device__ __forceinline__ void arrive_in_block(std::uint32_t b, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(b),
      "r"(block)
      : "memory");
}
__device__ __forceinline__ void arrive_in_block(barrier& b, int block) {
  arrive_in_block(shared_address(&b), block);
}
/// Waits for the end of a phase with this parity; threads of a warp may go on one by one.
/// @pre the phase before it has ended
__device__ __forceinline__ void wait_for_phase(std::uint32_t b, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}" ::"r"(b),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void wait_for_phase(barrier& b, unsigned parity) {
  wait_for_phase(shared_address(&b), parity);
}

/// __syncthreads of `threads` threads of whole warps. @param id 1 to 15
__device__ __forceinline__ void sync_threads(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Blocks of this block's cluster, and its number among them.
__device__ __forceinline__ int cluster_blocks() {
  int n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
__device__ __forceinline__ int block_in_cluster() {
  int i;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(i));
  return i;
}
/// __syncthreads of all threads of the cluster, in two steps.
__device__ __forceinline__ void arrive_at_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ void sync_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}

}  // namespace qeft::arch
