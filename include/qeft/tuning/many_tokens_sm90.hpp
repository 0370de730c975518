// SPDX-License-Identifier: Apache-2.0
// How a product with many tokens is spread over a device of compute capability 9.0. No choice
// changes a result.
#pragma once

#include "qeft/core/math.hpp"

namespace qeft::tuning {

/// What kernel::many_tokens_sm90 is made of.
struct many_tokens_sm90 {
  /// Columns of activations that are copied and multiplied together.
  static constexpr int stage_columns = 128;
  static constexpr int stages = 4;
  /// Warpgroups of a block: the first one copies, the others have 64 rows each.
  static constexpr int multiplying = 2;
  static constexpr int threads = 128 * (1 + multiplying);
  static constexpr int rows = 64 * multiplying;
  /// Registers of a thread that copies, and of one that multiplies.
  static constexpr int copying_registers = 40;
  static constexpr int multiplying_registers = 232;
  /// Blocks whose rows follow each other share the activations that they copy.
  static constexpr int cluster = 2;
  /// Blocks of tokens that are multiplied with the same rows at about the same time.
  static constexpr int band = 8;

  /// Whether this is for so many tokens: more than a quarter of a block's products are needed, and
  /// there are blocks for half of the device, if not parts of columns are spread over it.
  QEFT_HOST_DEVICE static constexpr bool suits(index_t row_blocks, index_t tokens,
                                               int multiprocessors) noexcept {
    return tokens > 32 && 2 * row_blocks * ceil_div(tokens, 64) >= multiprocessors;
  }
  /// Tokens of a block: 128 need the fewest instructions and bytes, about 9 for 8, but 64 may leave
  /// fewer multiprocessors without work.
  QEFT_HOST_DEVICE static constexpr int tokens_for(index_t row_blocks, index_t tokens,
                                                   int multiprocessors) noexcept {
    const auto time = [&](int each) QEFT_INLINE_LAMBDA {
      return ceil_div(row_blocks * ceil_div(tokens, each), multiprocessors) * each;
    };
    return 9 * time(64) < 8 * time(128) ? 64 : 128;
  }

  /// A block of rows and one of tokens.
  struct place {
    int row;
    int token;
  };
  /// The i-th place, of so many blocks of rows and of tokens: bands of tokens, in each row after row,
  /// so that what runs together has few rows and few tokens.
  QEFT_HOST_DEVICE static constexpr place place_of(int i, int row_blocks,
                                                   int token_blocks) noexcept {
    const int first = i / (band * row_blocks) * band;
    const int width = token_blocks - first < band ? token_blocks - first : band;
    const int in_band = i - first * row_blocks;
    return {in_band / width, first + in_band % width};
  }
};

}  // namespace qeft::tuning
