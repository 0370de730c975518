// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup: the four warps of 128 threads whose first one is a multiple of
// that. Compute capability 9.0 alone, compiled for sm_90a.
#pragma once

#include <type_traits>

#include "qeft/arch/copy.cuh"
#include "qeft/core/half.hpp"

namespace qeft::arch {

/// Takes or gives back registers, so that each thread of the warpgroup has Count; waits until there
/// are as many. All threads take part, in kernels with launch bounds.
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

/// A B operand in shared memory whose rows (the columns of B) have 128 bytes, with the swizzle of
/// as many, as tensor maps write it. @param tile 1024-byte aligned
__device__ __forceinline__ std::uint64_t swizzled_operand(const void* tile) {
  constexpr std::uint64_t swizzle = std::uint64_t{1} << 62U;
  constexpr std::uint64_t eight_rows = std::uint64_t{1024 / 16} << 32U;
  constexpr std::uint64_t one = std::uint64_t{1} << 16U;  // not used with this swizzle
  return swizzle | eight_rows | one | ((shared_address(tile) & 0x3ffffU) >> 4U);
}
/// The same Bytes further on: 32 for the next k-step in its rows, or whole tiles. @pre 16 | Bytes
template <int Bytes>
__device__ __forceinline__ std::uint64_t advanced(std::uint64_t operand) {
  static_assert(Bytes % 16 == 0);
  return operand + static_cast<std::uint64_t>(Bytes / 16);
}

#define QEFT_D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define QEFT_D(j)                                                                             \
  QEFT_D4(j), QEFT_D4(j + 1), QEFT_D4(j + 2), QEFT_D4(j + 3), QEFT_D4(j + 4), QEFT_D4(j + 5), \
      QEFT_D4(j + 6), QEFT_D4(j + 7)
#define QEFT_WGMMA_64(type)                                                               \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred adds;\n"                                                                \
      "setp.ne.b32 adds, %37, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                         \
      " "                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "           \
      "{%32, %33, %34, %35}, %36, adds, 1, 1, 0;\n"                                       \
      "}"                                                                                 \
      : QEFT_D(0)                                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)))
#define QEFT_WGMMA_128(type)                                                              \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred adds;\n"                                                                \
      "setp.ne.b32 adds, %69, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                        \
      " "                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "  \
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "  \
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "           \
      "{%64, %65, %66, %67}, %68, adds, 1, 1, 0;\n"                                       \
      "}"                                                                                 \
      : QEFT_D(0), QEFT_D(8)                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)))

/// Starts d = a * b, or with `adds` d += a * b, for a warpgroup, accumulated in FP32: A is 64 x 16,
/// B 16 x 8 N, D 64 x 8 N. Warp i has rows 16 i to 16 i + 15 of A and D, as mma_16x8x16 has them:
/// d[j] are columns 8 j to 8 j + 7. Until wait_for_products neither may be touched.
/// @param b the first element of a row in shared memory: see swizzled_operand
/// @pre fence_products after A was written; all threads take part, with the same b and adds
template <class Scalar, int N>
__device__ __forceinline__ void multiply_64x16(float (&d)[N][4], const std::uint32_t (&a)[4],
                                               std::uint64_t b, bool adds) {
  static_assert(N == 8 || N == 16, "64 or 128 columns");
  static_assert(std::is_same_v<Scalar, half_bits> || std::is_same_v<Scalar, bf16_bits>);
  constexpr bool is_half = std::is_same_v<Scalar, half_bits>;
  if constexpr (N == 8 && is_half) {
    QEFT_WGMMA_64("f16");
  } else if constexpr (N == 8) {
    QEFT_WGMMA_64("bf16");
  } else if constexpr (is_half) {
    QEFT_WGMMA_128("f16");
  } else {
    QEFT_WGMMA_128("bf16");
  }
}

#undef QEFT_WGMMA_128
#undef QEFT_WGMMA_64
#undef QEFT_D
#undef QEFT_D4

/// Before products whose A operands `a` were written, and before the first ones.
template <int Steps>
__device__ __forceinline__ void fence_products(std::uint32_t (&a)[Steps][4]) {
  for (auto& step : a) {
    for (std::uint32_t& x : step) asm volatile("" : "+r"(x));  // written by now
  }
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Ends a set of products.
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits for all products of this warpgroup that were committed, which leave d.
template <int N>
__device__ __forceinline__ void wait_for_products(float (&d)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (auto& tile : d) {
    for (float& x : tile) asm volatile("" : "+f"(x));  // not read before
  }
}

}  // namespace qeft::arch
