// SPDX-License-Identifier: Apache-2.0
// How the gradients of a layer are spread over a device. What is summed up by itself depends on the
// layer's shape alone, so that results depend neither on tokens nor on multiprocessors.
#pragma once

#include "qeft/tuning/parts.hpp"

namespace qeft::tuning {

/// Rows of the layer that a warp multiplies in one round of its loop.
inline constexpr int round_rows = 64;
/// Rows that tensor cores add up before their sum is added to others: they round in one direction.
/// A row makes two products.
inline constexpr int chain_rows = 128;
/// Tiles of 16 columns and 8 tokens whose sums a warp has.
inline constexpr int gradient_tiles = 16;
/// A block of the input's gradient has warps beside each other, and as many for either half of the
/// rows.
inline constexpr int column_warps = 4;
inline constexpr int row_parts = 2;

/// Runs of rows of either half, which are summed up by themselves; then their sums are added run
/// after run, that of the first half and that of the second one.
struct row_runs {
  int count;
  int rows;  // of each but the last one, a multiple of chain_rows
};
inline constexpr int most_row_runs = 8;
/// So many that a run takes much longer than adding its sums.
inline constexpr int least_run_rows = 4 * chain_rows;
/// @param rows of a half
constexpr row_runs make_row_runs(index_t rows) noexcept {
  const index_t even = round_up(ceil_div(rows, most_row_runs), chain_rows);
  const index_t each = even < least_run_rows ? least_run_rows : even;
  return {static_cast<int>(ceil_div(rows, each)), static_cast<int>(each)};
}
/// Whether a block takes one run only, because too few blocks keep a device busy otherwise.
constexpr bool gradient_by_runs(index_t blocks) noexcept { return blocks < enough_blocks; }

/// What a block of the weak columns' gradient takes: rows of the layer, 16 per warp, and weak
/// columns, as many.
inline constexpr int weak_gradient_tile = 64;
/// Tokens of a stage, which tensor cores add up, and stages: while one is multiplied, the others
/// come.
inline constexpr int weak_gradient_tokens = 32;
inline constexpr int weak_gradient_stages = 4;

}  // namespace qeft::tuning
