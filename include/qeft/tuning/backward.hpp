// SPDX-License-Identifier: Apache-2.0
// How the gradients of a layer are spread over a device. Not by the number of tokens or
// multiprocessors, so that results depend on neither.
#pragma once

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

/// What a block of the weak columns' gradient takes: rows of the layer, 16 per warp, and weak
/// columns, as many.
inline constexpr int weak_gradient_tile = 64;
/// Tokens of a stage, which tensor cores add up, and stages: while one is multiplied, the others
/// come.
inline constexpr int weak_gradient_tokens = 32;
inline constexpr int weak_gradient_stages = 4;

}  // namespace qeft::tuning
