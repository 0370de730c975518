// SPDX-License-Identifier: Apache-2.0
// The only file that looks at compiler macros (and io/platform.hpp, at those of the system).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define QEFT_HOST_DEVICE __host__ __device__
#else
#define QEFT_HOST_DEVICE
#endif

#if defined(__GNUC__) || defined(__clang__)
#define QEFT_ALWAYS_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define QEFT_ALWAYS_INLINE __forceinline
#else
#define QEFT_ALWAYS_INLINE inline
#endif

// Goes behind the parameters of a lambda: accumulators stay in registers only where every lambda of
// an unrolled loop is inlined, which compilers do not do on their own.
#if defined(__GNUC__) || defined(__clang__)
#define QEFT_INLINE_LAMBDA __attribute__((always_inline))
#else
#define QEFT_INLINE_LAMBDA
#endif

// Instruction sets the CPU executors may use in this translation unit. nvcc's host pass is left to
// the portable code: its front end rejects parts of the compilers' intrinsic headers.
#if !defined(__CUDACC__)
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define QEFT_HAS_AVX512 1
#endif
#if defined(__AVX512VNNI__)
#define QEFT_HAS_AVX512_VNNI 1
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define QEFT_HAS_AVX2 1
#endif
#endif

// std::fma is one instruction. Where it is not, no compiler fuses multiplications and additions
// either.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF)
#define QEFT_HAS_FMA 1
#endif

namespace qeft {

/// Every size, index and stride of the library: 64 bits, signed.
using index_t = std::int64_t;

/// "Known at run time" as a template argument for a group size or a number of weak columns.
inline constexpr index_t dynamic = -2;

}  // namespace qeft
