// SPDX-License-Identifier: Apache-2.0
// Loads of what is read once, and asynchronous copies to shared memory.
#pragma once

#include "qeft/core/config.hpp"

namespace qeft::arch {

/// The address of shared memory as instructions take it.
__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// The first T that is aligned at or behind an address in shared memory.
template <class T>
__device__ __forceinline__ T& aligned(uint4* shared) {
  const std::uint32_t behind = (0U - shared_address(shared)) % alignof(T);
  return *reinterpret_cast<T*>(reinterpret_cast<char*>(shared) + behind);
}

/// x, which the compiler then keeps in a register instead of computing it again in each round of a
/// loop.
template <class T>
__device__ __forceinline__ T kept(T x) {
  static_assert(sizeof(T) == 4);
  asm volatile("" : "+r"(x));
  return x;
}

/// Loads words that are read once, from Offset words behind `from` on; they are not kept in the
/// first-level cache. @pre the address is a multiple of their size
template <int Words, int Offset = 0>
__device__ __forceinline__ void load_once(std::uint32_t* to, const std::uint32_t* from) {
  static_assert(Words == 1 || Words == 2 || Words == 4);
  if constexpr (Words == 4) {
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
        : "l"(from), "n"(4 * Offset));
  } else if constexpr (Words == 2) {
    asm("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2 + %3];"
        : "=r"(to[0]), "=r"(to[1])
        : "l"(from), "n"(4 * Offset));
  } else {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1 + %2];"
        : "=r"(to[0])
        : "l"(from), "n"(4 * Offset));
  }
}

/// Asks for the 128 bytes at an address to be brought to the second-level cache.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

/// Loads words of which neighbours may be read soon. @pre the address is a multiple of their size
template <int Words>
__device__ __forceinline__ void load(std::uint32_t* to, const std::uint32_t* from) {
  static_assert(Words == 1 || Words == 2 || Words == 4);
  if constexpr (Words == 4) {
    asm("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
        : "l"(from));
  } else if constexpr (Words == 2) {
    asm("ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
  } else {
    asm("ld.global.nc.L2::128B.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
  }
}

/// Starts to copy 16 bytes to shared memory, ToOffset and FromOffset bytes behind the addresses.
/// Only the first `bytes` are copied, the rest is zero; with 0 bytes nothing is read.
/// @pre all addresses and offsets are multiples of 16
template <int ToOffset = 0, int FromOffset = 0>
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes), "n"(ToOffset), "n"(FromOffset)
               : "memory");
}
/// The same of a piece of a row that is copied as a whole, by others too: the second-level cache
/// may fetch the 256 bytes around it.
template <int ToOffset = 0>
__device__ __forceinline__ void copy_row_async(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0 + %2], [%1], 16;" ::"r"(to), "l"(from),
               "n"(ToOffset)
               : "memory");
}
__device__ __forceinline__ void copy_row_async(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
/// Ends a set of the copies that this thread started.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `Pending` sets of this thread are still under way.
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace qeft::arch
