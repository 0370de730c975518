// SPDX-License-Identifier: Apache-2.0
// Thin vector wrappers, one per instruction set, and nothing else that depends on one.
//
// Each set has these static members (V = lanes):
//   floats, words        V floats; V 32-bit integers with & | << >> by uniform amounts
//   byte_sums            running sums of products of bytes, to be widened before they overflow
//   tokens               tokens per register block: 2 * tokens accumulators fit the register file
//   load(const T*)       V consecutive T as floats; T float, half_bits or bf16_bits
//   store(T*, floats)    rounds to nearest even
//   broadcast(const T*)  one float, or four bytes as one word, in every lane
//   fma(a, b, c)         a * b + c (one rounding where the instruction set has it)
//   to_floats(words)     signed conversion
//   unpack<Width>(p, i)  fields i .. i + V - 1 of Width bits of a dense bit string; V divides i
//   multiply_add(s, codes, x)   adds, for each word, 4 products of unsigned codes and signed x. At
//                        most 8 calls, with codes below 16, between zero and widen
//   widen(s)             the sums as words, one per lane
//   transpose(from, from_stride, to, to_stride)   to = transpose of a V x V block of floats
//   prefetch(address)    asks for a cache line that will be read soon; any address
#pragma once

#include <cmath>

#include "qeft/core/half.hpp"

#if defined(QEFT_HAS_AVX2) || defined(QEFT_HAS_AVX512)
#include <immintrin.h>
#endif

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu {

namespace isa {

/// The vectors of GCC and Clang: four lanes, one SSE or NEON register.
struct portable {
  static constexpr const char* name = "portable";
  static constexpr int lanes = 4;
  static constexpr int tokens = 6;

  using float_lanes = float __attribute__((vector_size(16)));
  using word_lanes = std::uint32_t __attribute__((vector_size(16)));

  struct floats {
    float_lanes v;
  };
  struct words {
    word_lanes v;

    friend QEFT_ALWAYS_INLINE words operator&(words a, std::uint32_t b) { return {a.v & b}; }
    friend QEFT_ALWAYS_INLINE words operator|(words a, words b) { return {a.v | b.v}; }
    friend QEFT_ALWAYS_INLINE words operator<<(words a, int b) { return {a.v << b}; }
    friend QEFT_ALWAYS_INLINE words operator>>(words a, int b) { return {a.v >> b}; }
    friend QEFT_ALWAYS_INLINE words operator+(words a, words b) { return {a.v + b.v}; }
  };
  using byte_sums = words;

  template <class T>
  QEFT_ALWAYS_INLINE static floats load(const T* p) {
    return {float_lanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <class T>
  QEFT_ALWAYS_INLINE static void store(T* p, floats a) {
    for (int i = 0; i < lanes; ++i) p[i] = from_float<T>(a.v[i]);
  }
  QEFT_ALWAYS_INLINE static floats zero() { return {float_lanes{}}; }
  QEFT_ALWAYS_INLINE static floats broadcast(const float* p) {
    return {float_lanes{*p, *p, *p, *p}};
  }
  QEFT_ALWAYS_INLINE static floats fma(floats a, floats b, floats c) {
    // Left to the compiler, fusing could differ from one loop to the next.
#if defined(QEFT_HAS_FMA)
    return {float_lanes{std::fma(a.v[0], b.v[0], c.v[0]), std::fma(a.v[1], b.v[1], c.v[1]),
                        std::fma(a.v[2], b.v[2], c.v[2]), std::fma(a.v[3], b.v[3], c.v[3])}};
#else
    return {a.v * b.v + c.v};
#endif
  }
  QEFT_ALWAYS_INLINE static floats mul(floats a, floats b) { return {a.v * b.v}; }
  QEFT_ALWAYS_INLINE static floats add(floats a, floats b) { return {a.v + b.v}; }
  QEFT_ALWAYS_INLINE static floats to_floats(words a) {
    const auto lane = [&](int i) { return static_cast<float>(static_cast<std::int32_t>(a.v[i])); };
    return {float_lanes{lane(0), lane(1), lane(2), lane(3)}};
  }
  QEFT_ALWAYS_INLINE static words zero_words() { return {word_lanes{}}; }
  QEFT_ALWAYS_INLINE static words load(const std::uint32_t* p) {
    return {word_lanes{p[0], p[1], p[2], p[3]}};
  }
  QEFT_ALWAYS_INLINE static void store(std::uint32_t* p, words a) {
    for (int i = 0; i < lanes; ++i) p[i] = a.v[i];
  }
  template <int Width>
  QEFT_ALWAYS_INLINE static words unpack(const std::uint32_t* p, index_t first) {
    words r{};
    for (int i = 0; i < lanes; ++i) {
      const index_t bit = (first + i) * Width;
      r.v[i] = (p[bit / 32] >> (bit % 32)) & ((1U << Width) - 1U);
    }
    return r;
  }
  QEFT_ALWAYS_INLINE static byte_sums zero_sums() { return zero_words(); }
  QEFT_ALWAYS_INLINE static words broadcast(const std::int8_t* p) {
    std::uint32_t u = 0;
    memcpy(&u, p, sizeof u);
    return {word_lanes{u, u, u, u}};
  }
  QEFT_ALWAYS_INLINE static byte_sums multiply_add(byte_sums s, words codes, words x) {
    for (int shift = 0; shift < 32; shift += 8) {
      // Sign extension of a byte: 0x80 changes sides.
      const word_lanes signed_byte = (((x.v >> shift) & 0xffU) ^ 0x80U) - 0x80U;
      s.v += ((codes.v >> shift) & 0xffU) * signed_byte;
    }
    return s;
  }
  QEFT_ALWAYS_INLINE static words widen(byte_sums s) { return s; }
  QEFT_ALWAYS_INLINE static void transpose(const float* from, index_t from_stride, float* to,
                                           index_t to_stride) {
    for (int i = 0; i < lanes; ++i) {
      for (int j = 0; j < lanes; ++j) to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
  QEFT_ALWAYS_INLINE static void prefetch(std::uintptr_t) {}
};

#if defined(QEFT_HAS_AVX2) || defined(QEFT_HAS_AVX512)
/// to = transpose of an 8 x 8 block.
QEFT_ALWAYS_INLINE void transpose_8x8(const float* from, index_t from_stride, float* to,
                                      index_t to_stride) {
  __m256 pair[8];  // elements of two rows
  for (int i = 0; i < 8; i += 2) {
    const __m256 a = _mm256_loadu_ps(from + i * from_stride);
    const __m256 b = _mm256_loadu_ps(from + (i + 1) * from_stride);
    pair[i] = _mm256_unpacklo_ps(a, b);
    pair[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  __m256 quad[8];  // of four
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
}
#endif

#if defined(QEFT_HAS_AVX2)
/// AVX2 with FMA and F16C.
struct avx2 {
  static constexpr const char* name = "avx2";
  static constexpr int lanes = 8;
  static constexpr int tokens = 6;

  struct floats {
    __m256 v;
  };
  struct words {
    __m256i v;

    friend QEFT_ALWAYS_INLINE words operator&(words a, std::uint32_t b) {
      return {_mm256_and_si256(a.v, _mm256_set1_epi32(static_cast<int>(b)))};
    }
    friend QEFT_ALWAYS_INLINE words operator|(words a, words b) {
      return {_mm256_or_si256(a.v, b.v)};
    }
    friend QEFT_ALWAYS_INLINE words operator<<(words a, int b) {
      return {_mm256_slli_epi32(a.v, b)};
    }
    friend QEFT_ALWAYS_INLINE words operator>>(words a, int b) {
      return {_mm256_srli_epi32(a.v, b)};
    }
    friend QEFT_ALWAYS_INLINE words operator+(words a, words b) {
      return {_mm256_add_epi32(a.v, b.v)};
    }
  };
  struct byte_sums {
    __m256i v;  // 16 sums of 16 bits
  };

  QEFT_ALWAYS_INLINE static floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  QEFT_ALWAYS_INLINE static floats load(const half_bits* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  QEFT_ALWAYS_INLINE static floats load(const bf16_bits* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  QEFT_ALWAYS_INLINE static void store(float* p, floats a) { _mm256_storeu_ps(p, a.v); }
  QEFT_ALWAYS_INLINE static void store(half_bits* p, floats a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  QEFT_ALWAYS_INLINE static void store(bf16_bits* p, floats a) {
    alignas(32) float v[lanes];
    _mm256_store_ps(v, a.v);
    for (int i = 0; i < lanes; ++i) p[i] = from_float<bf16_bits>(v[i]);
  }
  QEFT_ALWAYS_INLINE static floats zero() { return {_mm256_setzero_ps()}; }
  QEFT_ALWAYS_INLINE static floats broadcast(const float* p) { return {_mm256_broadcast_ss(p)}; }
  QEFT_ALWAYS_INLINE static floats fma(floats a, floats b, floats c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
  }
  QEFT_ALWAYS_INLINE static floats mul(floats a, floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
  QEFT_ALWAYS_INLINE static floats add(floats a, floats b) { return {_mm256_add_ps(a.v, b.v)}; }
  QEFT_ALWAYS_INLINE static floats to_floats(words a) { return {_mm256_cvtepi32_ps(a.v)}; }
  QEFT_ALWAYS_INLINE static words zero_words() { return {_mm256_setzero_si256()}; }
  QEFT_ALWAYS_INLINE static words load(const std::uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  QEFT_ALWAYS_INLINE static void store(std::uint32_t* p, words a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
  }
  template <int Width>
  QEFT_ALWAYS_INLINE static words unpack(const std::uint32_t* p, index_t first) {
    if constexpr (Width == 8) {
      const auto* bytes = reinterpret_cast<const __m128i*>(p + first / 4);
      return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes))};
    } else {  // eight fields lie in one word
      const __m256i word = _mm256_set1_epi32(static_cast<int>(p[first * Width / 32]));
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i shift =
          _mm256_add_epi32(_mm256_mullo_epi32(lane, _mm256_set1_epi32(Width)),
                           _mm256_set1_epi32(static_cast<int>(first * Width % 32)));
      return words{_mm256_srlv_epi32(word, shift)} & ((1U << Width) - 1U);
    }
  }
  QEFT_ALWAYS_INLINE static byte_sums zero_sums() { return {_mm256_setzero_si256()}; }
  QEFT_ALWAYS_INLINE static words broadcast(const std::int8_t* p) {
    std::int32_t u = 0;
    memcpy(&u, p, sizeof u);
    return {_mm256_set1_epi32(u)};
  }
  QEFT_ALWAYS_INLINE static byte_sums multiply_add(byte_sums s, words codes, words x) {
    return {_mm256_add_epi16(s.v, _mm256_maddubs_epi16(codes.v, x.v))};
  }
  QEFT_ALWAYS_INLINE static words widen(byte_sums s) {
    return {_mm256_madd_epi16(s.v, _mm256_set1_epi16(1))};
  }
  QEFT_ALWAYS_INLINE static void transpose(const float* from, index_t from_stride, float* to,
                                           index_t to_stride) {
    transpose_8x8(from, from_stride, to, to_stride);
  }
  QEFT_ALWAYS_INLINE static void prefetch(std::uintptr_t address) {
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
  }
};
#endif

#if defined(QEFT_HAS_AVX512)
/// AVX-512 F, BW, VL and DQ.
struct avx512 {
  static constexpr const char* name = "avx512";
  static constexpr int lanes = 16;
  static constexpr int tokens = 12;
  // Zeroing forms with all lanes on are the plain instructions; GCC 12 takes the unmasked ones for
  // reads of uninitialised registers and warns.
  static constexpr __mmask16 all = 0xffff;

  struct floats {
    __m512 v;
  };
  struct words {
    __m512i v;

    friend QEFT_ALWAYS_INLINE words operator&(words a, std::uint32_t b) {
      return {_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(b)))};
    }
    friend QEFT_ALWAYS_INLINE words operator|(words a, words b) {
      return {_mm512_or_si512(a.v, b.v)};
    }
    friend QEFT_ALWAYS_INLINE words operator<<(words a, int b) {
      return {_mm512_maskz_slli_epi32(all, a.v, static_cast<unsigned>(b))};
    }
    friend QEFT_ALWAYS_INLINE words operator>>(words a, int b) {
      return {_mm512_maskz_srli_epi32(all, a.v, static_cast<unsigned>(b))};
    }
    friend QEFT_ALWAYS_INLINE words operator+(words a, words b) {
      return {_mm512_add_epi32(a.v, b.v)};
    }
  };

  QEFT_ALWAYS_INLINE static floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  QEFT_ALWAYS_INLINE static floats load(const half_bits* p) {
    return {_mm512_maskz_cvtph_ps(all, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  QEFT_ALWAYS_INLINE static floats load(const bf16_bits* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(
        _mm512_maskz_slli_epi32(all, _mm512_maskz_cvtepu16_epi32(all, bits), 16))};
  }
  QEFT_ALWAYS_INLINE static void store(float* p, floats a) { _mm512_storeu_ps(p, a.v); }
  QEFT_ALWAYS_INLINE static void store(half_bits* p, floats a) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(p),
        _mm512_maskz_cvtps_ph(all, a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  QEFT_ALWAYS_INLINE static void store(bf16_bits* p, floats a) {
    alignas(64) float v[lanes];
    _mm512_store_ps(v, a.v);
    for (int i = 0; i < lanes; ++i) p[i] = from_float<bf16_bits>(v[i]);
  }
  QEFT_ALWAYS_INLINE static floats zero() { return {_mm512_setzero_ps()}; }
  QEFT_ALWAYS_INLINE static floats broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
  QEFT_ALWAYS_INLINE static floats fma(floats a, floats b, floats c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  QEFT_ALWAYS_INLINE static floats mul(floats a, floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
  QEFT_ALWAYS_INLINE static floats add(floats a, floats b) { return {_mm512_add_ps(a.v, b.v)}; }
  QEFT_ALWAYS_INLINE static floats to_floats(words a) {
    return {_mm512_maskz_cvtepi32_ps(all, a.v)};
  }
  QEFT_ALWAYS_INLINE static words zero_words() { return {_mm512_setzero_si512()}; }
  QEFT_ALWAYS_INLINE static words load(const std::uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  QEFT_ALWAYS_INLINE static void store(std::uint32_t* p, words a) { _mm512_storeu_si512(p, a.v); }
  template <int Width>
  QEFT_ALWAYS_INLINE static words unpack(const std::uint32_t* p, index_t first) {
    // Bring each lane the word that holds its field, without reading beyond the last of them.
    const __m512i bit = _mm512_add_epi32(
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                           _mm512_set1_epi32(Width)),
        _mm512_set1_epi32(static_cast<int>(first * Width % 32)));
    constexpr auto used = static_cast<__mmask16>((1U << (16 * Width > 32 ? Width / 2 : 1)) - 1U);
    const __m512i loaded = _mm512_maskz_loadu_epi32(used, p + first * Width / 32);
    const __m512i word =
        _mm512_maskz_permutexvar_epi32(all, _mm512_maskz_srli_epi32(all, bit, 5), loaded);
    const __m512i shift = _mm512_and_si512(bit, _mm512_set1_epi32(31));
    return words{_mm512_maskz_srlv_epi32(all, word, shift)} & ((1U << Width) - 1U);
  }
  QEFT_ALWAYS_INLINE static words broadcast(const std::int8_t* p) {
    std::int32_t u = 0;
    memcpy(&u, p, sizeof u);
    return {_mm512_set1_epi32(u)};
  }

  struct byte_sums {
    __m512i v;  // 32 sums of 16 bits
  };
  QEFT_ALWAYS_INLINE static byte_sums zero_sums() { return {_mm512_setzero_si512()}; }
  QEFT_ALWAYS_INLINE static byte_sums multiply_add(byte_sums s, words codes, words x) {
    return {_mm512_add_epi16(s.v, _mm512_maddubs_epi16(codes.v, x.v))};
  }
  QEFT_ALWAYS_INLINE static words widen(byte_sums s) {
    return {_mm512_madd_epi16(s.v, _mm512_set1_epi16(1))};
  }
  QEFT_ALWAYS_INLINE static void transpose(const float* from, index_t from_stride, float* to,
                                           index_t to_stride) {
    for (int i = 0; i < lanes; i += 8) {
      for (int j = 0; j < lanes; j += 8) {
        transpose_8x8(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
      }
    }
  }
  QEFT_ALWAYS_INLINE static void prefetch(std::uintptr_t address) {
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
  }
};
#endif

#if defined(QEFT_HAS_AVX512) && defined(QEFT_HAS_AVX512_VNNI)
/// avx512 with integer dot products of bytes.
struct avx512_vnni : avx512 {
  static constexpr const char* name = "avx512_vnni";

  using byte_sums = words;
  QEFT_ALWAYS_INLINE static byte_sums zero_sums() { return zero_words(); }
  QEFT_ALWAYS_INLINE static byte_sums multiply_add(byte_sums s, words codes, words x) {
    return {_mm512_dpbusd_epi32(s.v, codes.v, x.v)};
  }
  QEFT_ALWAYS_INLINE static words widen(byte_sums s) { return s; }
};
#endif

/// Stands where nvcc cannot compile the instruction set that its host compiler was asked for.
struct not_in_this_cuda_unit {};

}  // namespace isa

/// The best instruction set that this translation unit may use.
#if defined(QEFT_NO_NATIVE_ISA)
using native_isa = isa::not_in_this_cuda_unit;
#elif defined(QEFT_HAS_AVX512) && defined(QEFT_HAS_AVX512_VNNI)
using native_isa = isa::avx512_vnni;
#elif defined(QEFT_HAS_AVX512)
using native_isa = isa::avx512;
#elif defined(QEFT_HAS_AVX2)
using native_isa = isa::avx2;
#else
using native_isa = isa::portable;
#endif

}  // namespace cpu
}  // namespace QEFT_TARGET
}  // namespace qeft
