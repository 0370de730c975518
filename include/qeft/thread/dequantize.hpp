// SPDX-License-Identifier: Apache-2.0
// From a lane's packed codes to its weights in FP32, with the bits of the definition.
#pragma once

#include "qeft/format/quant_format.hpp"
#include "qeft/thread/unpack.hpp"

namespace qeft {

/// The eight weights that a lane has of 16 rows and a k-step of 16 columns: of[2 * reg + half] is
/// the one of layout::fragment::operand.
struct lane_weights {
  float of[8];
};

/// Turns a lane's words of layout::fragment into weights: qeft::dequantize, bit for bit.
template <class Format>
class lane_dequantizer {
  using scalar = typename Format::scalar_type;
  using unpack = qeft::unpack<Format::bits, scalar>;
  static constexpr bool is_scaled = Format::zero == zero_kind::scaled;

 public:
  lane_dequantizer() = default;
  /// The group whose parameters these are, of rows r (in the lower half) and r + 8 of a lane.
  /// @param scales two scalars
  /// @param zeros  two scalars when zero points are scaled; two fields of
  ///               layout::fragment::zero_width bits when they are integers; else ignored
  QEFT_HOST_DEVICE lane_dequantizer(std::uint32_t scales, [[maybe_unused]] std::uint32_t zeros) {
    halves(scales, scale_);
    if constexpr (is_scaled) {
      halves(zeros, zero_);
      offsets_ = unpack::make_offsets(0, 0);
    } else if constexpr (Format::zero == zero_kind::integer) {
      constexpr unsigned width = layout::fragment::zero_width<Format::bits>;
      constexpr unsigned mask = (1U << width) - 1U;
      offsets_ = unpack::make_offsets(zeros & mask, (zeros >> width) & mask);
    } else {
      offsets_ = unpack::make_offsets(Format::mid_code, Format::mid_code);
    }
  }

  /// Weights of k-step Step of a tile. q and q - z are exact, and so are their products with a
  /// scale: a weight is rounded once, where a scaled zero point is added.
  template <int Step>
  QEFT_HOST_DEVICE lane_weights step(const typename unpack::lane_words& words) const {
    std::uint32_t codes[4];
    unpack::template step<Step>(words, offsets_, codes);
    lane_weights w;
    for (int reg = 0; reg < 4; ++reg) {
      float q[2];
      halves(codes[reg], q);
      for (int half = 0; half < 2; ++half) {
        const float product = scale_[reg % 2] * q[half];
        w.of[2 * reg + half] = is_scaled ? product + zero_[reg % 2] : product;
      }
    }
    return w;
  }

  /// Weak columns are stored as they are. @param words the four of a k-step
  QEFT_HOST_DEVICE static lane_weights weak_step(const std::uint32_t (&words)[4]) {
    lane_weights w;
    for (int reg = 0; reg < 4; ++reg) {
      float x[2];
      halves(words[reg], x);
      w.of[2 * reg] = x[0];
      w.of[2 * reg + 1] = x[1];
    }
    return w;
  }

 private:
  QEFT_HOST_DEVICE static void halves(std::uint32_t x, float (&to)[2]) {
    to[0] = to_float(scalar{static_cast<std::uint16_t>(x)});
    to[1] = to_float(scalar{static_cast<std::uint16_t>(x >> 16U)});
  }

  float scale_[2] = {};
  float zero_[2] = {};
  typename unpack::offsets offsets_ = {};
};

}  // namespace qeft
