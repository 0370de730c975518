// SPDX-License-Identifier: Apache-2.0
// How a row of a layer is cut for the warps of a block.
#pragma once

#include "qeft/core/math.hpp"

namespace qeft::tuning {

/// Blocks that keep any device busy.
inline constexpr index_t enough_blocks = 128;

/// Columns that a warp multiplies in one round of its loop, and of which parts are a multiple.
inline constexpr int chunk_columns = 512;
/// Columns that it adds up on tensor cores at most.
inline constexpr int stage_columns = chunk_columns / 2;
/// Parts of the dense columns of a row, at most; as many of the weak ones.
inline constexpr int most_parts = 8;

/// Runs of columns that are summed up one by one, their sums then in this order: first the dense
/// ones, then the weak ones. They depend on shape and bits alone, so that a result depends neither
/// on the number of multiprocessors nor on who sums up what.
struct parts {
  int dense;          // number of parts
  int dense_columns;  // columns of each, but the last one
  int weak;
  int weak_columns;

  QEFT_HOST_DEVICE constexpr int count() const noexcept { return dense + weak; }
};

/// A part of weak columns takes about one and a half times as many bytes as one of dense columns,
/// or more: so the usual k is one part.
QEFT_HOST_DEVICE constexpr parts make_parts(int bits, index_t dense, index_t weak) noexcept {
  const auto length = [](index_t columns, index_t unit) QEFT_INLINE_LAMBDA {
    return round_up(ceil_div(columns, most_parts), unit);
  };
  parts p{};
  const index_t d = length(dense, chunk_columns);
  const index_t alike = round_up((d == 0 ? chunk_columns : d) * bits * 3 / 32, 16);
  const index_t w = length(weak, 16) > alike ? length(weak, 16) : alike;
  p.dense_columns = static_cast<int>(d);
  p.dense = dense == 0 ? 0 : static_cast<int>(ceil_div(dense, d));
  p.weak_columns = static_cast<int>(w);
  p.weak = static_cast<int>(ceil_div(weak, w));
  return p;
}

}  // namespace qeft::tuning
