// SPDX-License-Identifier: Apache-2.0
// The only file that looks at compiler macros (and io/platform.hpp, at those of the system).
#pragma once

// What would give wrong results without a word is refused here.
#if (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ != 0) || defined(__FAST_MATH__) || \
    defined(__ASSOCIATIVE_MATH__)
#error \
    "qeft: compile without -ffast-math, -Ofast, -ffinite-math-only and -fassociative-math \
(-funsafe-math-optimizations): they remove the checks for NaN and change how values are rounded. \
Units without them may be linked with units that have them. nvcc's -use_fast_math is fine."
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "qeft: only little-endian machines are supported: packed words are read by the byte"
#endif
#if (defined(__SIZEOF_SIZE_T__) && __SIZEOF_SIZE_T__ < 8) || (defined(_WIN32) && !defined(_WIN64))
#error "qeft: only 64-bit machines are supported: sizes of layers do not fit std::size_t here"
#endif

#include <cstddef>
#include <cstdint>

// QEFT_KEEP_CALLS: forced inlining is left out, because sanitizers' checks in kernels of thousands of
// lines cost minutes of compilation. Not for programs of units with different -m flags.
#if defined(QEFT_KEEP_CALLS)
#define QEFT_ALWAYS_INLINE inline
#elif defined(__GNUC__) || defined(__clang__)
#define QEFT_ALWAYS_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define QEFT_ALWAYS_INLINE __forceinline
#else
#define QEFT_ALWAYS_INLINE inline
#endif

// For the small functions that host and device share. Always inlined, so that they leave no symbol
// that another translation unit could pick up (see QEFT_TARGET).
#if defined(__CUDACC__)
#define QEFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QEFT_HOST_DEVICE QEFT_ALWAYS_INLINE
#endif

#if defined(__GNUC__) || defined(__clang__)
// For what runs once in a thousand calls: kept out of the code around it.
#define QEFT_COLD __attribute__((noinline, cold))
// Everything called is inlined too, so that no function of the standard library's is compiled for
// this unit's instruction set and then shared by all.
#define QEFT_FLATTEN __attribute__((flatten))
// Asks for the cache line at an integer address, which may be any.
#define QEFT_PREFETCH(address) __builtin_prefetch(reinterpret_cast<const void*>(address))
#else
#define QEFT_COLD
#define QEFT_FLATTEN
#define QEFT_PREFETCH(address) static_cast<void>(address)
#endif

// A process may be copied without its threads.
#if defined(__unix__) || defined(__APPLE__)
#define QEFT_HAS_FORK 1
#endif

// Views and kernels need no exceptions; owners, solvers and readers do.
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define QEFT_HAS_EXCEPTIONS 1
#endif

// The pass that generates code for a GPU.
#if defined(__CUDA_ARCH__)
#define QEFT_DEVICE_CODE 1
#endif
// And that for compute capability 9.0 alone, whose instructions (wgmma, setmaxnreg) no later one has.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QEFT_DEVICE_SM90A 1
#endif

// Goes behind the parameters of a lambda: accumulators stay in registers only where every lambda of
// an unrolled loop is inlined, which compilers do not do on their own.
#if (defined(__GNUC__) || defined(__clang__)) && !defined(QEFT_KEEP_CALLS)
#define QEFT_INLINE_LAMBDA __attribute__((always_inline))
#else
#define QEFT_INLINE_LAMBDA
#endif

// Instruction sets the CPU executors may use in this translation unit. nvcc's front end takes the
// compilers' intrinsic headers since CUDA 13; before, a .cu unit has to say that the portable code
// will do (see cpu::native_isa).
#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ < 13 && defined(__AVX2__)
#define QEFT_NO_NATIVE_ISA 1
#endif
#if !defined(QEFT_NO_NATIVE_ISA)
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

// A linker keeps one of several equal inline functions, whatever flags each was compiled with. So
// that a program may hold translation units with different -m flags, every function that is not
// always inlined lives in `inline namespace QEFT_TARGET`, which names the instruction sets that the
// compiler and the kernels use. It is
// the outer one: `inline namespace QEFT_TARGET { namespace detail {`; a qeft::detail beside it
// would be another namespace of the same name. Types that units hand to each other (views,
// descriptors, status, on_host ...) live outside it and have nothing but always inlined members.
// Units that differ in other flags may define QEFT_TARGET.
#if !defined(QEFT_TARGET)
#if defined(QEFT_HAS_AVX512) && defined(QEFT_HAS_AVX512_VNNI)
#define QEFT_TARGET target_avx512_vnni
#elif defined(QEFT_HAS_AVX512)
#define QEFT_TARGET target_avx512
#elif defined(__AVX512F__) && defined(QEFT_HAS_AVX2)
#define QEFT_TARGET target_avx2_avx512f
#elif defined(__AVX512F__)
#define QEFT_TARGET target_portable_avx512f
#elif defined(QEFT_HAS_AVX2)
#define QEFT_TARGET target_avx2
#elif defined(__AVX2__) && defined(__FMA__)
#define QEFT_TARGET target_portable_avx2_fma
#elif defined(__AVX2__)
#define QEFT_TARGET target_portable_avx2
#elif defined(__FMA__)
#define QEFT_TARGET target_avx_fma
#elif defined(__AVX__)
#define QEFT_TARGET target_avx
#elif defined(__SSE3__)
#define QEFT_TARGET target_sse3
#else
#define QEFT_TARGET target_baseline
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
