// SPDX-License-Identifier: Apache-2.0
// Codes are stored in bit planes of power-of-two width, so that none straddles a word and exactly
// `Bits` bits are spent per weight: 2 = <2>, 3 = <2,1>, 4 = <4>, 8 = <8>.
#pragma once

#include "qeft/core/math.hpp"

namespace qeft {

/// A list of code widths.
template <int... Bits>
struct width_list {
  QEFT_HOST_DEVICE static constexpr bool contains(int bits) noexcept {
    return ((bits == Bits) || ...);
  }
};

/// The code widths that are built in. How each is stored follows from bit_planes.
using supported_widths = width_list<2, 3, 4, 8>;

QEFT_HOST_DEVICE constexpr bool is_supported_bits(int bits) noexcept {
  return supported_widths::contains(bits);
}

/// Whether codes may have `Bits` bits where types are known at compile time; to be specialised for 5
/// or 6, which are not built in. Descriptors, and with them owners and files, do not know these.
template <int Bits>
inline constexpr bool is_width_v = is_supported_bits(Bits);

/// The planes of a `Bits`-bit code, lowest bits first: the widest power of two that fits, then a
/// second plane for the bits that are left, if any.
template <int Bits>
struct bit_planes {
  static_assert(is_width_v<Bits>, "qeft::bit_planes: Bits must be 2, 3, 4 or 8");

  static constexpr int low_width = Bits >= 8 ? 8 : Bits >= 4 ? 4 : 2;
  static_assert(Bits - low_width >= 0 && Bits - low_width <= 2,
                "qeft::bit_planes: the bits above the first plane must fit a plane of 1 or 2");
  static constexpr int count = Bits > low_width ? 2 : 1;

  /// Bits of the code held by plane p: a power of two.
  QEFT_HOST_DEVICE static constexpr int width(int p) noexcept {
    return p == 0 ? low_width : Bits - low_width;
  }
  /// Position in the code of the lowest bit of plane p.
  QEFT_HOST_DEVICE static constexpr int shift(int p) noexcept { return p == 0 ? 0 : low_width; }
};

/// A field of a 32-bit word.
struct code_address {
  index_t word;  // index of the word
  int shift;     // of the field's lowest bit
};

/// A plain array of `count` codes: plane by plane, each plane a dense little-endian bit string
/// padded to whole words. It stores a row of a row_packed matrix and every array of integer zero
/// points.
template <int Bits>
struct packed_array {
  using planes = bit_planes<Bits>;

  /// 32-bit words of plane p.
  QEFT_HOST_DEVICE static constexpr index_t plane_words(int p, index_t count) noexcept {
    return ceil_div(count * planes::width(p), 32);
  }
  /// 32-bit words of the array.
  QEFT_HOST_DEVICE static constexpr index_t words(index_t count) noexcept {
    index_t total = 0;
    for (int p = 0; p < planes::count; ++p) total += plane_words(p, count);
    return total;
  }
  /// Where plane p of code i lies.
  QEFT_HOST_DEVICE static constexpr code_address locate(int p, index_t i, index_t count) noexcept {
    const index_t first = p == 0 ? 0 : plane_words(0, count);
    const index_t bit = i * planes::width(p);
    return {first + bit / 32, static_cast<int>(bit % 32)};
  }
};

/// Reads a code whose planes `locate(p)` finds.
template <int Bits, class Locate>
QEFT_HOST_DEVICE constexpr unsigned gather_code(const std::uint32_t* words,
                                                const Locate& locate) noexcept {
  using planes = bit_planes<Bits>;
  unsigned code = 0;
  for (int p = 0; p < planes::count; ++p) {
    const code_address at = locate(p);
    const unsigned mask = (1U << static_cast<unsigned>(planes::width(p))) - 1U;
    code |= ((words[at.word] >> static_cast<unsigned>(at.shift)) & mask)
            << static_cast<unsigned>(planes::shift(p));
  }
  return code;
}

/// Writes a code (its upper bits are ignored) into the planes `locate(p)` finds.
template <int Bits, class Locate>
QEFT_HOST_DEVICE constexpr void scatter_code(std::uint32_t* words, unsigned code,
                                             const Locate& locate) noexcept {
  using planes = bit_planes<Bits>;
  for (int p = 0; p < planes::count; ++p) {
    const code_address at = locate(p);
    const unsigned mask = (1U << static_cast<unsigned>(planes::width(p))) - 1U;
    const unsigned field = (code >> static_cast<unsigned>(planes::shift(p))) & mask;
    words[at.word] = (words[at.word] & ~(mask << static_cast<unsigned>(at.shift))) |
                     (field << static_cast<unsigned>(at.shift));
  }
}

}  // namespace qeft
