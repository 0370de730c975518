// SPDX-License-Identifier: Apache-2.0
// How a product with many tokens is cut up. No choice changes a result.
#pragma once

#include "qeft/tuning/parts.hpp"

namespace qeft::tuning {

/// Fewer tokens are for tuning/few_tokens.hpp.
inline constexpr int many_tokens_from = 17;

/// A warp multiplies two tiles of 16 rows by four tiles of 8 tokens: each operand of activations is
/// used twice and each of weights four times, and the sums of a group, a part and all parts fit the
/// registers.
inline constexpr int many_row_tiles = 2;
inline constexpr int many_token_tiles = 4;
/// Warps of a block that share activations.
inline constexpr int many_row_warps = 4;
inline constexpr int many_block_rows = many_row_warps * many_row_tiles * 16;

/// Warps of a block that share weights.
constexpr int many_token_warps(index_t tokens) noexcept {
  return tokens <= many_token_tiles * 8 ? 1 : 2;
}
QEFT_HOST_DEVICE constexpr int many_block_tokens(int token_warps) noexcept {
  return token_warps * many_token_tiles * 8;
}

/// Whether a block takes one part of the columns only, because there are too few blocks otherwise.
/// @param row_blocks of many_block_rows rows
constexpr bool many_by_parts(index_t row_blocks, index_t tokens) noexcept {
  return tokens >= many_tokens_from &&
         row_blocks * ceil_div(tokens, many_block_tokens(many_token_warps(tokens))) < enough_blocks;
}

}  // namespace qeft::tuning
