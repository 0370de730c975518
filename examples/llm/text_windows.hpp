// SPDX-License-Identifier: Apache-2.0
// Texts as windows of tokens, for calibration and evaluation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "qeft/core/config.hpp"

namespace qeft_llm {

class tokenizer;

/// Windows of `seq_len` tokens, each the tokenizer's prefix and then the next part of the text:
/// they tile the text, less an incomplete last one. Special tokens written in the text are plain
/// text.
/// @throws qeft::error when the file cannot be read, seq_len leaves no room for text, or the text
/// fills fewer than `least` windows
std::vector<std::vector<int>> text_windows(const tokenizer& tok, const std::string& file,
                                           qeft::index_t seq_len, qeft::index_t least);

/// A draw of `count` of the windows without repetition. It depends on the windows, `count` and
/// `seed` alone. @pre count <= windows.size()
std::vector<std::vector<int>> draw_windows(std::vector<std::vector<int>> windows,
                                           qeft::index_t count, std::uint64_t seed);

}  // namespace qeft_llm
