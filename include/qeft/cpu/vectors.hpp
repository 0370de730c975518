// SPDX-License-Identifier: Apache-2.0
// Several vectors of an instruction set as one: the kernels work on all rows of a tile at a time.
#pragma once

#include <utility>

#include "qeft/cpu/simd.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

/// T[N], for a signed N.
template <class T, index_t N>
using c_array = T[static_cast<std::size_t>(N)];

/// N vectors of Isa side by side, with the members of an instruction set. Factors that are one
/// vector of Isa (`same`) count for all N.
template <class Isa, int N, class Indices = std::make_integer_sequence<int, N>>
struct vectors;

template <class Isa, int N, int... At>
struct vectors<Isa, N, std::integer_sequence<int, At...>> {
  static constexpr int lanes = N * Isa::lanes;
  using same = typename Isa::floats;

  struct floats {
    c_array<typename Isa::floats, N> v;
  };
  struct words {
    c_array<typename Isa::words, N> v;

    friend QEFT_ALWAYS_INLINE words operator&(words a, std::uint32_t b) {
      return {{a.v[At] & b...}};
    }
    friend QEFT_ALWAYS_INLINE words operator|(words a, words b) { return {{a.v[At] | b.v[At]...}}; }
    friend QEFT_ALWAYS_INLINE words operator<<(words a, int b) { return {{a.v[At] << b...}}; }
    friend QEFT_ALWAYS_INLINE words operator>>(words a, int b) { return {{a.v[At] >> b...}}; }
    friend QEFT_ALWAYS_INLINE words operator+(words a, words b) { return {{a.v[At] + b.v[At]...}}; }
  };
  struct byte_sums {
    c_array<typename Isa::byte_sums, N> v;
  };

  template <class T>
  QEFT_ALWAYS_INLINE static floats load(const T* p) {
    return {{Isa::load(p + At * Isa::lanes)...}};
  }
  QEFT_ALWAYS_INLINE static words load(const std::uint32_t* p) {
    return {{Isa::load(p + At * Isa::lanes)...}};
  }
  template <class T>
  QEFT_ALWAYS_INLINE static void store(T* p, const floats& a) {
    (Isa::store(p + At * Isa::lanes, a.v[At]), ...);
  }
  QEFT_ALWAYS_INLINE static void store(std::uint32_t* p, const words& a) {
    (Isa::store(p + At * Isa::lanes, a.v[At]), ...);
  }
  QEFT_ALWAYS_INLINE static floats zero() { return {{(static_cast<void>(At), Isa::zero())...}}; }
  QEFT_ALWAYS_INLINE static floats broadcast(const float* p) {
    return {{(static_cast<void>(At), Isa::broadcast(p))...}};
  }
  QEFT_ALWAYS_INLINE static floats fma(const floats& a, same b, const floats& c) {
    return {{Isa::fma(a.v[At], b, c.v[At])...}};
  }
  QEFT_ALWAYS_INLINE static floats fma(const floats& a, const floats& b, const floats& c) {
    return {{Isa::fma(a.v[At], b.v[At], c.v[At])...}};
  }
  QEFT_ALWAYS_INLINE static floats mul(const floats& a, same b) {
    return {{Isa::mul(a.v[At], b)...}};
  }
  QEFT_ALWAYS_INLINE static floats mul(const floats& a, const floats& b) {
    return {{Isa::mul(a.v[At], b.v[At])...}};
  }
  QEFT_ALWAYS_INLINE static floats add(const floats& a, const floats& b) {
    return {{Isa::add(a.v[At], b.v[At])...}};
  }
  QEFT_ALWAYS_INLINE static floats to_floats(const words& a) {
    return {{Isa::to_floats(a.v[At])...}};
  }
  template <int Width>
  QEFT_ALWAYS_INLINE static words unpack(const std::uint32_t* p, index_t first) {
    return {{Isa::template unpack<Width>(p, first + At * Isa::lanes)...}};
  }
  QEFT_ALWAYS_INLINE static words zero_words() {
    return {{(static_cast<void>(At), Isa::zero_words())...}};
  }
  QEFT_ALWAYS_INLINE static byte_sums zero_sums() {
    return {{(static_cast<void>(At), Isa::zero_sums())...}};
  }
  QEFT_ALWAYS_INLINE static byte_sums multiply_add(const byte_sums& s, const words& codes,
                                                   typename Isa::words x) {
    return {{Isa::multiply_add(s.v[At], codes.v[At], x)...}};
  }
  QEFT_ALWAYS_INLINE static words widen(const byte_sums& s) { return {{Isa::widen(s.v[At])...}}; }
};

template <class Body, int... Index>
QEFT_ALWAYS_INLINE void unroll_indices(const Body& body, std::integer_sequence<int, Index...>) {
  (body(std::integral_constant<int, Index>{}), ...);
}

/// body(integral_constant 0) ... body(integral_constant N - 1).
template <int N, class Body>
QEFT_ALWAYS_INLINE void unroll(const Body& body) {
  unroll_indices(body, std::make_integer_sequence<int, N>{});
}

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
