// SPDX-License-Identifier: Apache-2.0
// What the bits mean: bit width, group size, kind of zero point and element type (METHOD section
// 1).
#pragma once

#include <type_traits>

#include "qeft/core/half.hpp"
#include "qeft/format/bit_planes.hpp"

namespace qeft {

/// How a code q becomes a weight: s is the group's scale, z its zero point.
enum class zero_kind : std::uint8_t {
  symmetric,  // w = s * (q - 2^(b-1)); nothing stored
  integer,    // w = s * (q - z), z an integer in [0, 2^b - 1] packed in b bits
  scaled,     // w = s * q + z, z stored in the element type (the authors' -s*z)
};

/// Group size that stands for one group per row.
inline constexpr index_t per_channel = -1;

constexpr bool is_supported_group_size(index_t group_size) {
  return group_size == per_channel || (group_size > 0 && group_size % 32 == 0);
}

/// @tparam Bits      2, 3, 4 or 8 bits per code, or a width of the user's (is_width_v)
/// @tparam GroupSize dense columns that share a scale: a multiple of 32, per_channel, or dynamic;
///                   the last group of a row may be shorter
/// @tparam Zero      kind of zero point
/// @tparam Scalar    half_bits or bf16_bits: type of scales, scaled zeros and weak columns
template <int Bits, index_t GroupSize = dynamic, zero_kind Zero = zero_kind::integer,
          class Scalar = half_bits>
struct quant_format {
  static_assert(is_width_v<Bits>, "qeft::quant_format: Bits must be 2, 3, 4 or 8");
  static_assert(GroupSize == dynamic || is_supported_group_size(GroupSize),
                "qeft::quant_format: GroupSize must be a positive multiple of 32, "
                "qeft::per_channel or qeft::dynamic");
  static_assert(std::is_same_v<Scalar, half_bits> || std::is_same_v<Scalar, bf16_bits>,
                "qeft::quant_format: Scalar must be qeft::half_bits or qeft::bf16_bits");

  static constexpr int bits = Bits;
  static constexpr index_t group_size = GroupSize;
  static constexpr zero_kind zero = Zero;
  static constexpr unsigned max_code = (1U << static_cast<unsigned>(Bits)) - 1U;
  static constexpr unsigned mid_code = 1U << static_cast<unsigned>(Bits - 1);

  using planes = bit_planes<Bits>;
  using scalar_type = Scalar;
  /// What the array of zero points holds: packed codes, or scalars.
  using zero_type = std::conditional_t<Zero == zero_kind::scaled, Scalar, std::uint32_t>;
};

template <class T>
inline constexpr bool is_quant_format_v = false;
template <int Bits, index_t GroupSize, zero_kind Zero, class Scalar>
inline constexpr bool is_quant_format_v<quant_format<Bits, GroupSize, Zero, Scalar>> = true;

/// The parameters of one group. For symmetric and integer formats `zero` is the integer z.
struct group_params {
  float scale;
  float zero;
};

/// The single dequantisation formula. All products are exact in FP32 (8-bit code x 11-bit scale),
/// so contraction into fused multiply-adds cannot change a result.
template <class Format>
QEFT_HOST_DEVICE constexpr float dequantize_code(unsigned code, group_params g) noexcept {
  if constexpr (Format::zero == zero_kind::scaled) {
    return g.scale * static_cast<float>(code) + g.zero;
  } else {
    return g.scale * (static_cast<float>(code) - g.zero);
  }
}

}  // namespace qeft
