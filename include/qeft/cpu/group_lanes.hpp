// SPDX-License-Identifier: Apache-2.0
// The parameters of one group for the 32 rows of a tile, as vectors of floats.
#pragma once

#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/cpu/simd.hpp"
#include "qeft/layout/simd_tile.hpp"

namespace qeft::cpu::detail {

/// A tile of rows and a group in the form w = scale * q + offset: the offset is -scale * z, which
/// is exact in FP32 (an 11-bit by an 8-bit number), or the scaled zero point.
struct alignas(64) group_lanes {
  float scale[layout::simd_tile::rows];
  float offset[layout::simd_tile::rows];
};

/// The parameters of rows [32 * tile, 32 * tile + 32); those of padding rows are zero.
template <class Isa, class F, class W>
void load_group(const quantized_matrix_view<F, W, layout::simd_tile>& w, index_t tile,
                index_t group, group_lanes& lanes) {
  const layout::extent e = w.extent();
  const index_t first = layout::simd_tile::param_index(e, tile * layout::simd_tile::rows, group);
  for (index_t i = 0; i < layout::simd_tile::rows; i += Isa::lanes) {
    const auto scale = Isa::load(w.scales + first + i);
    Isa::store(lanes.scale + i, scale);
    if constexpr (F::zero == zero_kind::scaled) {
      Isa::store(lanes.offset + i, Isa::load(w.zeros + first + i));
    } else if constexpr (F::zero == zero_kind::symmetric) {
      const float minus_mid = -static_cast<float>(F::mid_code);
      Isa::store(lanes.offset + i, Isa::mul(scale, Isa::broadcast(&minus_mid)));
    } else {
      using planes = bit_planes<F::bits>;
      const index_t count = layout::simd_tile::padded_rows(e.out_channels) * e.groups;
      auto zero = Isa::template unpack<planes::width(0)>(w.zeros, first + i);
      if constexpr (planes::count == 2) {
        const std::uint32_t* plane = w.zeros + packed_array<F::bits>::plane_words(0, count);
        zero =
            zero | (Isa::template unpack<planes::width(1)>(plane, first + i) << planes::shift(1));
      }
      const float minus_one = -1.0F;
      const auto minus_zero = Isa::mul(Isa::to_floats(zero), Isa::broadcast(&minus_one));
      Isa::store(lanes.offset + i, Isa::mul(scale, minus_zero));
    }
  }
}

}  // namespace qeft::cpu::detail
