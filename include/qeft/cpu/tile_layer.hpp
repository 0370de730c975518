// SPDX-License-Identifier: Apache-2.0
// A layer over simd_tile whose format is known at run time, all but the code width: what depends on
// the rest is decided once per chunk, so the heavy code is compiled per code width, not per format.
#pragma once

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/cpu/chunks.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

struct tile_layer {
  layout::extent extent;
  index_t columns_per_group;
  zero_kind zero;
  scalar_kind scalar;
  const std::uint32_t* codes;
  const void* scales;  // of `scalar`, as zeros where they are scaled, and weak_values
  const void* zeros;   // words of packed codes where they are integers
  const void* weak_values;

  index_t tiles() const noexcept { return ceil_div(extent.out_channels, tile_rows); }
};

template <class F, class W>
tile_layer make_tile_layer(const quantized_matrix_view<F, W, layout::simd_tile>& w) {
  return {w.extent(), w.columns_per_group,
          F::zero,    scalar_kind_of<typename F::scalar_type>::value,
          w.codes,    w.scales,
          w.zeros,    w.weak_values};
}

template <class M>
tile_layer make_tile_layer(const quantized_matrix<layout::simd_tile, M>& w) {
  const matrix_descriptor& d = w.descriptor();
  return {d.extent(),     d.columns_per_group(), d.zero,           d.scalar,
          w.code_words(), w.scales().data(),     w.zeros().data(), w.weak().data()};
}

/// body(pointer to the layer's scalar type)
template <class Body>
QEFT_ALWAYS_INLINE auto with_scalars(scalar_kind kind, const void* values, const Body& body) {
  if (kind == scalar_kind::half) return body(static_cast<const half_bits*>(values));
  return body(static_cast<const bf16_bits*>(values));
}

/// 32 scalars from `first` on.
template <class Isa>
typename row_vectors<Isa>::floats load_rows(scalar_kind kind, const void* values, index_t first) {
  return with_scalars(kind, values,
                      [&](const auto* p) { return row_vectors<Isa>::load(p + first); });
}

/// The parameters of a group for the 32 rows of a tile, in the form w = scale * q + offset.
template <class Isa>
struct group_lanes {
  typename row_vectors<Isa>::floats scale;
  typename row_vectors<Isa>::floats offset;
};

/// -z of rows [32 * tile, 32 * tile + 32), for integer and symmetric zero points; those of padding
/// rows are whole numbers as well.
template <int Bits, class Isa>
typename row_vectors<Isa>::floats load_minus_zeros(const tile_layer& w, index_t tile,
                                                   index_t group) {
  using rows = row_vectors<Isa>;
  using planes = bit_planes<Bits>;
  if (w.zero == zero_kind::symmetric) {
    const float minus_mid = -static_cast<float>(1U << (Bits - 1));
    return rows::broadcast(&minus_mid);
  }
  const float minus_one = -1.0F;
  const auto* words = static_cast<const std::uint32_t*>(w.zeros);
  const auto plane = [&](int p) {
    return words + layout::simd_tile::locate_zero<Bits>(w.extent, p, tile * tile_rows, group).word;
  };
  auto zero = rows::template unpack<planes::width(0)>(plane(0), 0);
  if constexpr (planes::count == 2) {
    zero = zero | (rows::template unpack<planes::width(1)>(plane(1), 0) << planes::shift(1));
  }
  return rows::mul(rows::to_floats(zero), Isa::broadcast(&minus_one));
}

/// Parameters of rows [32 * tile, 32 * tile + 32); those of padding rows are zero. The offset is
/// -scale * z, which is exact in FP32 (an 11-bit by an 8-bit number), or the scaled zero point.
template <int Bits, class Isa>
group_lanes<Isa> load_group(const tile_layer& w, index_t tile, index_t group) {
  const index_t first = layout::simd_tile::scale_index(w.extent, tile * tile_rows, group);
  const auto scale = load_rows<Isa>(w.scalar, w.scales, first);
  if (w.zero == zero_kind::scaled) return {scale, load_rows<Isa>(w.scalar, w.zeros, first)};
  return {scale, row_vectors<Isa>::mul(scale, load_minus_zeros<Bits, Isa>(w, tile, group))};
}

/// acc(Tiles, 32) = weak columns [first, first + columns) of the given row tiles, times x.
template <class Isa, int Tiles>
void dot_weak(const tile_layer& w, const index_t* tiles, index_t first, index_t columns,
              const float* x, float* acc) {
  using rows = row_vectors<Isa>;
  with_scalars(w.scalar, w.weak_values, [&](const auto* weak) {
    c_array<decltype(weak), Tiles> values;
    c_array<typename rows::floats, Tiles> sum;
    unroll<Tiles>([&](auto i) QEFT_INLINE_LAMBDA {
      values[i] = weak + layout::simd_tile::weak_index(w.extent, tiles[i] * tile_rows, first);
      sum[i] = rows::zero();
    });
    for (index_t c = 0; c < columns; ++c) {
      const auto xc = Isa::broadcast(x + c);
      unroll<Tiles>([&](auto i) QEFT_INLINE_LAMBDA {
        Isa::prefetch(reinterpret_cast<std::uintptr_t>(values[i]) + prefetch_bytes);
        sum[i] = rows::fma(rows::load(values[i]), xc, sum[i]);
        values[i] += tile_rows;
      });
    }
    unroll<Tiles>([&](auto i) QEFT_INLINE_LAMBDA { rows::store(acc + i * tile_rows, sum[i]); });
  });
}

/// panel(columns, 32) = weak columns [first, first + columns) of one row tile.
template <class Isa>
void decode_weak(const tile_layer& w, index_t tile, index_t first, index_t columns, float* panel) {
  using rows = row_vectors<Isa>;
  with_scalars(w.scalar, w.weak_values, [&](const auto* weak) {
    weak += layout::simd_tile::weak_index(w.extent, tile * tile_rows, first);
    for (index_t i = 0; i < columns * tile_rows; i += tile_rows) {
      rows::store(panel + i, rows::load(weak + i));
    }
  });
}

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
