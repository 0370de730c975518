// SPDX-License-Identifier: Apache-2.0
// A layer over simd_tile with all of its format but the code width behind function pointers that
// are called once per chunk: the heavy code is compiled per code width, not per format.
#pragma once

#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/cpu/exact_dot.hpp"

namespace qeft::cpu::detail {

/// The parameters of a group for the 32 rows of a tile, in the form w = scale * q + offset.
struct alignas(64) group_lanes {
  float scale[layout::simd_tile::rows];
  float offset[layout::simd_tile::rows];
};

/// Parameters of rows [32 * tile, 32 * tile + 32); those of padding rows are zero. The offset is
/// -scale * z, which is exact in FP32 (an 11-bit by an 8-bit number), or the scaled zero point.
template <class Isa, class F>
void load_group(const quantized_matrix_view<F, weak_tail<>, layout::simd_tile>& w, index_t tile,
                index_t group, group_lanes& lanes) {
  const layout::extent e = w.extent();
  const index_t first = layout::simd_tile::param_index(e, tile * tile_rows, group);
  for (index_t i = 0; i < tile_rows; i += Isa::lanes) {
    const auto scale = Isa::load(w.scales + first + i);
    Isa::store(lanes.scale + i, scale);
    if constexpr (F::zero == zero_kind::scaled) {
      Isa::store(lanes.offset + i, Isa::load(w.zeros + first + i));
    } else if constexpr (F::zero == zero_kind::symmetric) {
      const float minus_mid = -static_cast<float>(F::mid_code);
      Isa::store(lanes.offset + i, Isa::mul(scale, Isa::broadcast(&minus_mid)));
    } else {
      using planes = bit_planes<F::bits>;
      auto zero = Isa::template unpack<planes::width(0)>(w.zeros, first + i);
      if constexpr (planes::count == 2) {
        const index_t count = layout::simd_tile::padded_rows(e.out_channels) * e.groups;
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

/// Valid while the view it was made of lives.
template <class Isa>
class tile_layer {
 public:
  template <class F>
  explicit tile_layer(const quantized_matrix_view<F, weak_tail<>, layout::simd_tile>& w)
      : out_channels(w.out_channels),
        in_channels(w.in_channels),
        dense(w.dense_columns()),
        group_size(w.group_size()),
        weak(w.weak_columns()),
        codes(w.codes),
        view_(&w),
        load_group_(&call_load_group<F>),
        dot_weak_{&call_dot_weak<F, 1>, &call_dot_weak<F, gemv_tiles<Isa>>},
        decode_weak_(&call_decode_weak<F>) {}

  index_t out_channels;
  index_t in_channels;
  index_t dense;       // columns with codes
  index_t group_size;  // in columns
  index_t weak;        // columns
  const std::uint32_t* codes;

  index_t tiles() const noexcept { return ceil_div(out_channels, tile_rows); }

  void load_group(index_t tile, index_t group, group_lanes& lanes) const {
    load_group_(view_, tile, group, lanes);
  }
  /// acc(Tiles, 32) = weak columns [first, first + columns) * x, for 1 or gemv_tiles tiles.
  template <int Tiles>
  void dot_weak(index_t tile, index_t first, index_t columns, const float* x, float* acc) const {
    dot_weak_[Tiles == 1 ? 0 : 1](view_, tile, first, columns, x, acc);
  }
  /// panel(columns, 32) = weak columns [first, first + columns).
  void decode_weak(index_t tile, index_t first, index_t columns, float* panel) const {
    decode_weak_(view_, tile, first, columns, panel);
  }

 private:
  template <class F>
  using view_of = quantized_matrix_view<F, weak_tail<>, layout::simd_tile>;

  template <class F>
  static const typename F::scalar_type* weak_values(const view_of<F>& w, index_t tile, index_t j) {
    return w.weak_values + layout::simd_tile::weak_index(w.extent(), tile * tile_rows, j);
  }

  template <class F>
  static void call_load_group(const void* view, index_t tile, index_t group, group_lanes& lanes) {
    detail::load_group<Isa>(*static_cast<const view_of<F>*>(view), tile, group, lanes);
  }
  template <class F, int Tiles>
  static void call_dot_weak(const void* view, index_t tile, index_t first, index_t columns,
                            const float* x, float* acc) {
    array<const typename F::scalar_type*, Tiles> values;
    for (int t = 0; t < Tiles; ++t) {
      values[t] = weak_values<F>(*static_cast<const view_of<F>*>(view), tile + t, first);
    }
    detail::dot_weak<Isa, Tiles>(values, columns, x, acc);
  }
  template <class F>
  static void call_decode_weak(const void* view, index_t tile, index_t first, index_t columns,
                               float* panel) {
    decode_weak_panel<Isa>(weak_values<F>(*static_cast<const view_of<F>*>(view), tile, first),
                           columns, panel);
  }

  const void* view_;
  void (*load_group_)(const void*, index_t, index_t, group_lanes&);
  void (*dot_weak_[2])(const void*, index_t, index_t, index_t, const float*, float*);
  void (*decode_weak_)(const void*, index_t, index_t, index_t, float*);
};

/// Where outputs go: any element type behind one signature.
struct output_rows {
  void* y;  // (tokens, OC)
  /// Writes values(count) to y[offset ...].
  void (*store)(void* y, index_t offset, const float* values, index_t count);
};

template <class Isa, class Y>
void store_outputs(void* y, index_t offset, const float* values, index_t count) {
  Y* out = static_cast<Y*>(y) + offset;
  index_t i = 0;
  for (; i + Isa::lanes <= count; i += Isa::lanes) Isa::store(out + i, Isa::load(values + i));
  for (; i < count; ++i) out[i] = from_float<Y>(values[i]);
}

template <class Isa, class Y>
output_rows make_output(Y* y) {
  return {y, &store_outputs<Isa, Y>};
}

}  // namespace qeft::cpu::detail
