// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warp on tensor cores.
#pragma once

#include <type_traits>

#include "qeft/core/half.hpp"

namespace qeft::arch {

/// c += a * b for one warp, accumulated in FP32: A is 16 x 16, B 16 x 8, C 16 x 8. Lane
/// l = 4 g + t holds A as layout::fragment::operand says; of B rows 2 t, 2 t + 1 (b0) and 2 t + 8,
/// 2 t + 9 (b1) of column g; of C columns 2 t and 2 t + 1 of row g (c[0], c[1]) and of row g + 8
/// (c[2], c[3]). All lanes take part.
template <class Scalar>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4],
                                            std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<Scalar, half_bits>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<Scalar, bf16_bits>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// c = a * b
template <class Scalar>
__device__ __forceinline__ void first_mma_16x8x16(float (&c)[4], const std::uint32_t (&a)[4],
                                                  std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<Scalar, half_bits>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{0f00000000, 0f00000000, 0f00000000, 0f00000000};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<Scalar, bf16_bits>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{0f00000000, 0f00000000, 0f00000000, 0f00000000};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory: lanes 8 i .. 8 i + 7 give the rows of
/// matrix i, 16 bytes each and 16-byte aligned, Offset bytes behind `shared_address`; lane
/// l = 4 g + t gets elements 2 t and 2 t + 1 of row g of each. With rows of tokens: the B operands
/// of two k-steps. All lanes take part.
template <int Offset>
__device__ __forceinline__ void load_matrices(std::uint32_t (&m)[4], std::uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address), "n"(Offset)
               : "memory");
}

/// The same, with elements 2 t and 2 t + 1 of column g of each matrix for lane l = 4 g + t: of
/// matrices whose rows are the contraction.
template <int Offset>
__device__ __forceinline__ void load_transposed_matrices(std::uint32_t (&m)[4],
                                                         std::uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address), "n"(Offset)
               : "memory");
}

/// An 8 x 8 matrix of 16-bit elements whose row g lies in lanes 4 g .. 4 g + 3, transposed. All
/// lanes take part.
__device__ __forceinline__ std::uint32_t transposed_matrix(std::uint32_t m) {
  std::uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(m));
  return d;
}

/// The A operand W^T of an A operand W.
__device__ __forceinline__ void transpose_operand(std::uint32_t (&to)[4],
                                                  const std::uint32_t (&w)[4]) {
  to[0] = transposed_matrix(w[0]);
  to[1] = transposed_matrix(w[2]);
  to[2] = transposed_matrix(w[1]);
  to[3] = transposed_matrix(w[3]);
}

}  // namespace qeft::arch
