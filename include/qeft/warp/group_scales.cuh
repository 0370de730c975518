// SPDX-License-Identifier: Apache-2.0
// The parameters of a warp's rows, four groups at a time.
#pragma once

#include "qeft/arch/copy.cuh"
#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/layout/fragment.hpp"
#include "qeft/thread/unpack.hpp"

namespace qeft::warp {

/// Scales and zero points of 16 rows. A lane loads those of two rows and one of four groups; each
/// group then takes its own from the lane that has them.
template <class Format>
class group_scales {
  using fragment = layout::fragment;
  using scalar = typename Format::scalar_type;
  static constexpr bool has_zeros = Format::zero == zero_kind::integer;
  static constexpr bool is_scaled = Format::zero == zero_kind::scaled;

 public:
  /// Of rows r and r + 8, r = lane / 4.
  struct pair {
    float low;
    float high;
  };

  group_scales() = default;
  /// @param first_set number of the rows' first set of four groups among those of all rows:
  ///                  layout::fragment::group_sets of each tile of 16 rows
  template <class View>
  __device__ group_scales(const View& w, int first_set) {
    const index_t first =
        index_t{first_set} * fragment::lanes + static_cast<int>(threadIdx.x % 32U);
    scales_ = reinterpret_cast<const std::uint32_t*>(w.scales) + first;
    if constexpr (has_zeros || is_scaled) {
      zeros_ = reinterpret_cast<const zero_pair*>(w.zeros) + first;
    }
  }

  /// Loads set `set` of four groups.
  __device__ void load(int set) {
    prefetch(set);
    advance();
  }
  /// Starts to load a set which takes the place of the loaded one at `advance`.
  __device__ void prefetch(int set) {
    arch::load_once<1>(&next_scale_, scales_ + static_cast<index_t>(set) * fragment::lanes);
    if constexpr (has_zeros || is_scaled) {
      next_zero_ = zeros_[static_cast<index_t>(set) * fragment::lanes];
    }
  }
  __device__ void advance() {
    scale_ = next_scale_;
    zero_ = next_zero_;
  }

  /// Scales of a group of the loaded set, 0 <= group < 4.
  __device__ pair scale(int group) const { return floats(from_lane(scale_, group)); }
  /// What unpack adds to codes.
  __device__ typename unpack<Format::bits, scalar>::offsets offsets(int group) const {
    using unpack = qeft::unpack<Format::bits, scalar>;
    if constexpr (has_zeros) {
      constexpr unsigned width = fragment::zero_width<Format::bits>;
      const std::uint32_t both = from_lane(zero_, group);
      return unpack::make_offsets(both & ((1U << width) - 1U), both >> width);
    } else if constexpr (is_scaled) {
      const pair s = scale(group);
      const pair z = floats(from_lane(zero_, group));
      return unpack::make_offsets(nearest_code(s.low, z.low), nearest_code(s.high, z.high));
    } else {
      return unpack::make_offsets(Format::mid_code, Format::mid_code);
    }
  }
  /// What a weight has beside s (q - z) with the z of `offsets`, when zero points are scaled: at
  /// most s / 2, unless the zero point is out of the codes' range. So what is added up is about as
  /// large as the weights are.
  __device__ pair rest(int group) const {
    static_assert(is_scaled);
    const pair s = scale(group);
    const pair z = floats(from_lane(zero_, group));
    return {fmaf(s.low, static_cast<float>(nearest_code(s.low, z.low)), z.low),
            fmaf(s.high, static_cast<float>(nearest_code(s.high, z.high)), z.high)};
  }

 private:
  /// The zero points of two rows: two codes, or two scalars.
  using zero_pair = std::conditional_t<
      is_scaled, std::uint32_t,
      std::conditional_t<fragment::zero_width<Format::bits> == 4, std::uint8_t, std::uint16_t>>;

  static __device__ std::uint32_t from_lane(std::uint32_t x, int group) {
    return __shfl_sync(0xffffffffU, x, group, fragment::groups_together);
  }
  /// The code that stands for the weight nearest to 0, where weights are scale * code + zero.
  static __device__ unsigned nearest_code(float scale, float zero) {
    const float code = scale == 0.0F ? 0.0F : rintf(-zero / scale);
    return static_cast<unsigned>(fminf(fmaxf(code, 0.0F), static_cast<float>(Format::max_code)));
  }
  static __device__ pair floats(std::uint32_t x) {
    scalar low;
    scalar high;
    asm("mov.b32 {%0, %1}, %2;" : "=h"(low.bits), "=h"(high.bits) : "r"(x));
    return {to_float(low), to_float(high)};
  }

  const std::uint32_t* scales_ = nullptr;
  const zero_pair* zeros_ = nullptr;
  std::uint32_t scale_ = 0;
  std::uint32_t zero_ = 0;
  std::uint32_t next_scale_ = 0;
  std::uint32_t next_zero_ = 0;
};

}  // namespace qeft::warp
