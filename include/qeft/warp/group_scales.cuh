// SPDX-License-Identifier: Apache-2.0
// The parameters of a warp's rows, four groups at a time.
#pragma once

#include "qeft/arch/copy.cuh"
#include "qeft/arch/index.cuh"
#include "qeft/arch/shuffle.cuh"
#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/layout/fragment.hpp"
#include "qeft/thread/unpack.hpp"

namespace qeft::warp {

/// Scales and zero points of 16 rows, set after set of four groups. A lane loads those of two rows
/// and one group and makes of them what the loop needs; each group then takes that from the lane
/// which has it.
template <class Format>
class group_scales {
  using fragment = layout::fragment;
  using scalar = typename Format::scalar_type;
  using unpack = qeft::unpack<Format::bits, scalar>;
  static constexpr bool has_zeros = Format::zero == zero_kind::integer;
  static constexpr bool is_scaled = Format::zero == zero_kind::scaled;

 public:
  /// The zero points of two rows: two codes, or two scalars.
  using zero_pair = std::conditional_t<
      is_scaled, std::uint32_t,
      std::conditional_t<fragment::zero_width<Format::bits> == 4, std::uint8_t, std::uint16_t>>;

  /// Of rows r and r + 8, r = lane / 4.
  struct pair {
    float low;
    float high;
  };

  group_scales() = default;
  /// Loads a set. @param set its number among those of all rows: layout::fragment::group_sets of
  ///                         each tile of 16 rows
  template <class View>
  __device__ group_scales(const View& w, int set) : group_scales(ahead(w, set)) {
    advance();
  }
  /// The same, but what is loaded is there after the first `advance`.
  template <class View>
  static __device__ group_scales ahead(const View& w, int set) {
    const index_t first = index_t{set} * fragment::lanes + arch::lane();
    group_scales of_set;
    of_set.scales_ = reinterpret_cast<const std::uint32_t*>(w.scales) + first;
    if constexpr (has_zeros || is_scaled) {
      of_set.zeros_ = reinterpret_cast<const zero_pair*>(w.zeros) + first;
    }
    of_set.load_next();
    return of_set;
  }

  /// Starts to load the next set, which takes the place of the present one at `advance`.
  __device__ void load_next() {
    arch::load_once<1>(&next_scale_, scales_);
    scales_ += fragment::lanes;
    if constexpr (has_zeros || is_scaled) {
      next_zero_ = *zeros_;
      zeros_ += fragment::lanes;
    }
  }
  __device__ void advance() {
    scale_ = floats(next_scale_);
    if constexpr (has_zeros) {
      constexpr unsigned width = fragment::zero_width<Format::bits>;
      offsets_ = unpack::make_offsets(next_zero_ & ((1U << width) - 1U), next_zero_ >> width);
      for (auto& offset : offsets_.of) offset = arch::kept(offset);
    } else if constexpr (is_scaled) {
      const zero_parts zero = parts_of(scale_, floats(next_zero_));
      offsets_ = unpack::make_offsets(zero.low, zero.high);
      rest_ = zero.rest;
    } else {
      offsets_ = unpack::make_offsets(Format::mid_code, Format::mid_code);
    }
  }

  /// Scales of a group of the set, 0 <= group < 4, an int or a constant.
  template <class Group>
  __device__ pair scale(Group group) const {
    return from_lane(scale_, group);
  }
  /// What unpack adds to codes.
  template <class Group>
  __device__ typename unpack::offsets offsets(Group group) const {
    if constexpr (has_zeros || is_scaled) {
      typename unpack::offsets of_group;
      for (int i = 0; i < unpack::offset_count; ++i) {
        of_group.of[i] = from_lane(offsets_.of[i], group);
      }
      return of_group;
    } else {
      return offsets_;
    }
  }
  /// zero_parts::rest, when zero points are scaled.
  template <class Group>
  __device__ pair rest(Group group) const {
    static_assert(is_scaled);
    return from_lane(rest_, group);
  }

  /// Scaled zero points: the codes that stand for the weights nearest to 0, and what a weight has
  /// beside s (q - code): at most s / 2, unless the zero point is out of the codes' range. So what
  /// is added up is about as large as the weights are.
  struct zero_parts {
    unsigned low;
    unsigned high;
    pair rest;
  };
  static __device__ zero_parts parts_of(pair scale, pair zero) {
    const unsigned low = nearest_code(scale.low, zero.low);
    const unsigned high = nearest_code(scale.high, zero.high);
    return {low,
            high,
            {fmaf(scale.low, static_cast<float>(low), zero.low),
             fmaf(scale.high, static_cast<float>(high), zero.high)}};
  }
  static __device__ pair floats(std::uint32_t x) {
    scalar low;
    scalar high;
    asm("mov.b32 {%0, %1}, %2;" : "=h"(low.bits), "=h"(high.bits) : "r"(x));
    return {to_float(low), to_float(high)};
  }

 private:
  /// The code that stands for the weight nearest to 0, where weights are scale * code + zero.
  static __device__ unsigned nearest_code(float scale, float zero) {
    const float code = scale == 0.0F ? 0.0F : rintf(-zero / scale);
    return static_cast<unsigned>(fminf(fmaxf(code, 0.0F), static_cast<float>(Format::max_code)));
  }
  template <class T, class Group>
  static __device__ T from_lane(T x, Group group) {
    return arch::from_lane<fragment::groups_together>(x, group);
  }
  template <class Group>
  static __device__ pair from_lane(pair x, Group group) {
    return {from_lane(x.low, group), from_lane(x.high, group)};
  }

  const std::uint32_t* scales_ = nullptr;  // the next set's
  const zero_pair* zeros_ = nullptr;
  std::uint32_t next_scale_ = 0;
  std::uint32_t next_zero_ = 0;
  pair scale_ = {};
  pair rest_ = {};
  typename unpack::offsets offsets_ = {};
};

}  // namespace qeft::warp
