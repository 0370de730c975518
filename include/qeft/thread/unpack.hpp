// SPDX-License-Identifier: Apache-2.0
// From packed codes to what tensor cores multiply: pairs of 16-bit floats that hold q - z exactly.
// The scale of a group is applied to FP32 sums later, never to them.
#pragma once

#include "qeft/core/half.hpp"
#include "qeft/layout/fragment.hpp"

namespace qeft {

/// Arithmetic on two 16-bit floats in a word, the first one in its lower half. Callable on the
/// host, where it is slow.
template <class Scalar>
struct pair_of;

inline namespace QEFT_TARGET {
namespace detail {

/// a * b + c in each half, rounded once.
template <class Scalar>
QEFT_HOST_DEVICE std::uint32_t fma_halves(std::uint32_t a, std::uint32_t b,
                                          std::uint32_t c) noexcept {
  std::uint32_t result = 0;
  for (unsigned shift = 0; shift < 32; shift += 16) {
    const auto part = [shift](std::uint32_t x) QEFT_INLINE_LAMBDA {
      return static_cast<double>(to_float(Scalar{static_cast<std::uint16_t>(x >> shift)}));
    };
    // Products of two and the sums that follow here are exact in double.
    const auto x = static_cast<float>(part(a) * part(b) + part(c));
    result |= static_cast<std::uint32_t>(from_float<Scalar>(x).bits) << shift;
  }
  return result;
}

}  // namespace detail
}  // namespace QEFT_TARGET

template <>
struct pair_of<half_bits> {
  static constexpr int mantissa_bits = 10;
  /// 2^10 twice: or-ing an integer below 2^10 into it adds that integer.
  static constexpr std::uint32_t magic = 0x64006400U;
  /// 2^exponent twice.
  QEFT_HOST_DEVICE static constexpr std::uint32_t power(int exponent) noexcept {
    return static_cast<std::uint32_t>(exponent + 15) * 0x04000400U;
  }
  /// a 2^Exponent + c, rounded once.
  template <int Exponent>
  QEFT_HOST_DEVICE static std::uint32_t scaled_sum(std::uint32_t a, std::uint32_t c) noexcept {
#if QEFT_DEVICE_CODE
    std::uint32_t d;
    if constexpr (Exponent == 0) {
      asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(c));
    } else {
      asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(power(Exponent)), "r"(c));
    }
    return d;
#else
    return detail::fma_halves<half_bits>(a, power(Exponent), c);
#endif
  }
};

template <>
struct pair_of<bf16_bits> {
  static constexpr int mantissa_bits = 7;
  static constexpr std::uint32_t magic = 0x43004300U;  // 2^7 twice
  QEFT_HOST_DEVICE static constexpr std::uint32_t power(int exponent) noexcept {
    return static_cast<std::uint32_t>(exponent + 127) * 0x00800080U;
  }
  template <int Exponent>
  QEFT_HOST_DEVICE static std::uint32_t scaled_sum(std::uint32_t a, std::uint32_t c) noexcept {
#if QEFT_DEVICE_CODE
    std::uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(power(Exponent)), "r"(c));
    return d;
#else
    return detail::fma_halves<bf16_bits>(a, power(Exponent), c);
#endif
  }
};

inline namespace QEFT_TARGET {

/// (a & Mask) | bits, one instruction.
template <std::uint32_t Mask>
QEFT_HOST_DEVICE std::uint32_t masked_or(std::uint32_t a, std::uint32_t bits) noexcept {
#if QEFT_DEVICE_CODE
  std::uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "n"(Mask), "r"(bits));
  return d;
#else
  return (a & Mask) | bits;
#endif
}
/// The same with constant bits, which then take no register.
template <std::uint32_t Mask, std::uint32_t Bits>
QEFT_HOST_DEVICE std::uint32_t masked_or(std::uint32_t a) noexcept {
#if QEFT_DEVICE_CODE
  std::uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "n"(Mask), "n"(Bits));
  return d;
#else
  return (a & Mask) | Bits;
#endif
}

}  // namespace QEFT_TARGET

/// Turns a lane's words of layout::fragment into operand registers of mma.m16n8k16.
///
/// A field of `Bits` bits at bit P of half a word, masked and or-ed into 2^m (m mantissa bits), is
/// 2^m + q 2^P; times 2^-P, less 2^(m - P) + z, it is q - z. All of it is exact.
template <int Bits, class Scalar>
class unpack {
  using planes = bit_planes<Bits>;
  using pair = pair_of<Scalar>;
  static constexpr int low_width = planes::width(0);
  /// 8-bit codes do not fit the mantissa of BF16: they are brought over in two halves.
  static constexpr bool in_halves = Bits > pair::mantissa_bits;

 public:
  /// k-steps of a tile.
  static constexpr int steps =
      static_cast<int>(layout::fragment::columns<Bits>) / layout::fragment::step_columns;
  /// A lane's words of the planes of a tile, first plane first.
  static constexpr int words = 4 * Bits / low_width;
  using lane_words = std::uint32_t[static_cast<std::size_t>(words)];

  /// Different numbers that are added to the registers: to register r number r % offset_count.
  /// (Fields of 4 and 8 bits lie alike in registers r and r + 2.)
  static constexpr int offset_count = low_width == 2 ? 4 : 2;
  struct offsets {
    std::uint32_t of[static_cast<std::size_t>(offset_count)];
  };
  /// @param zero of rows r (registers 0 and 2) and r + 8 (1 and 3) of a lane: at most 2^Bits - 1; 0
  ///             leaves the codes as they are
  QEFT_HOST_DEVICE static constexpr offsets make_offsets(unsigned zero, unsigned zero8) noexcept {
    offsets add{};
    for (int i = 0; i < offset_count; ++i) add.of[i] = offset(i, i % 2 == 0 ? zero : zero8);
    return add;
  }

  /// The operand of k-step Step, 0 <= Step < steps.
  template <int Step>
  QEFT_HOST_DEVICE static void step(const lane_words& w, const offsets& add,
                                    std::uint32_t (&a)[4]) noexcept {
    a[0] = one<Step, 0>(w, add.of[0 % offset_count]);
    a[1] = one<Step, 1>(w, add.of[1 % offset_count]);
    a[2] = one<Step, 2>(w, add.of[2 % offset_count]);
    a[3] = one<Step, 3>(w, add.of[3 % offset_count]);
  }

 private:
  /// Where the field of register `reg` is once shifted: as far up as its place allows, so that one
  /// shifted word serves several registers.
  QEFT_HOST_DEVICE static constexpr int position(int reg) noexcept {
    const int at = reg * low_width % 8;  // whatever the step
    return at + Bits <= pair::mantissa_bits ? at : 0;
  }
  QEFT_HOST_DEVICE static constexpr std::uint32_t field(int width, int at) noexcept {
    return ((1U << static_cast<unsigned>(width)) - 1U) * 0x00010001U << static_cast<unsigned>(at);
  }
  /// x shifted to the right by Right places, or to the left by -Right.
  template <int Right>
  QEFT_HOST_DEVICE static constexpr std::uint32_t shifted(std::uint32_t x) noexcept {
    if constexpr (Right >= 0) {
      return x >> static_cast<unsigned>(Right);
    } else {
      return x << static_cast<unsigned>(-Right);
    }
  }
  QEFT_HOST_DEVICE static constexpr std::uint32_t offset(int reg, unsigned zero) noexcept {
    constexpr int m = pair::mantissa_bits;
    constexpr std::uint32_t sign = 0x80008000U;
    if constexpr (in_halves) {
      return zero == 0 ? sign
                       : sign | from_float<Scalar>(static_cast<float>(zero)).bits * 0x00010001U;
    } else {
      // -(2^(m - P) + z): the mantissa's unit is 2^-P.
      const int p = position(reg);
      return (sign | pair::power(m - p)) + zero * (0x00010001U << static_cast<unsigned>(p));
    }
  }
  template <int Step, int Reg>
  QEFT_HOST_DEVICE static std::uint32_t one(const lane_words& w, std::uint32_t add) noexcept {
    constexpr layout::tile_address low = layout::fragment::locate_register<Bits>(0, Step, Reg);
    if constexpr (in_halves) {
      const std::uint32_t upper =
          pair::template scaled_sum<4>(nibble<low.shift + 4>(w[low.word]), add);
      return pair::template scaled_sum<0>(nibble<low.shift>(w[low.word]), upper);
    } else {
      constexpr int p = position(Reg);
      constexpr std::uint32_t low_mask = field(low_width, p);
      const std::uint32_t at_p = shifted<low.shift - p>(w[low.word]);
      std::uint32_t x;
      if constexpr (planes::count == 2) {
        constexpr layout::tile_address high = layout::fragment::locate_register<Bits>(1, Step, Reg);
        constexpr std::uint32_t high_mask = field(planes::width(1), p + low_width);
        x = masked_or<high_mask, pair::magic>(
            shifted<high.shift - p - low_width>(w[4 + high.word]));
        x = masked_or<low_mask>(at_p, x);
      } else {
        x = masked_or<low_mask, pair::magic>(at_p);
      }
      return pair::template scaled_sum<-p>(x, add);
    }
  }
  /// Four bits from Shift on, as a number.
  template <int Shift>
  QEFT_HOST_DEVICE static std::uint32_t nibble(std::uint32_t w) noexcept {
    return pair::template scaled_sum<0>(masked_or<field(4, 0), pair::magic>(shifted<Shift>(w)),
                                        0x80008000U | pair::magic);
  }
};

}  // namespace qeft
