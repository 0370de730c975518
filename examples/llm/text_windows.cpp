// SPDX-License-Identifier: Apache-2.0
#include "text_windows.hpp"

#include <random>
#include <string_view>
#include <utility>

#include "qeft/io/mapped_file.hpp"
#include "tokenizer.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

std::vector<std::vector<int>> text_windows(const tokenizer& tok, const std::string& file,
                                           index_t seq_len, index_t least) {
  const qeft::io::mapped_file mapped(file);
  const std::string_view text(reinterpret_cast<const char*>(mapped.bytes().data()),
                              static_cast<std::size_t>(mapped.bytes().size()));
  const auto prefix = static_cast<index_t>(tok.prefix().size());
  if (seq_len <= prefix) {
    fail(errc::invalid_argument, "text file " + file + ": windows of " + std::to_string(seq_len) +
                                     " tokens have no room behind the " + std::to_string(prefix) +
                                     " that the model wants in front of every text");
  }
  const std::vector<int> tokens = tok.encode(text, /*parse_special=*/false);
  const index_t step = seq_len - prefix;
  const index_t count = static_cast<index_t>(tokens.size()) / step;
  if (count < least) {
    fail(errc::invalid_argument, "text file " + file + " holds " + std::to_string(tokens.size()) +
                                     " tokens, but " + std::to_string(least) + " windows of " +
                                     std::to_string(seq_len) + " tokens need " +
                                     std::to_string(least * step));
  }
  std::vector<std::vector<int>> windows(static_cast<std::size_t>(count), tok.prefix());
  for (index_t w = 0; w < count; ++w) {
    const auto first = tokens.begin() + w * step;
    auto& window = windows[static_cast<std::size_t>(w)];
    window.insert(window.end(), first, first + step);
  }
  return windows;
}

std::vector<std::vector<int>> draw_windows(std::vector<std::vector<int>> windows, index_t count,
                                           std::uint64_t seed) {
  // std::shuffle is not the same everywhere, so the draw is spelled out.
  std::mt19937_64 rng(seed);
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    std::swap(windows[i], windows[i + rng() % (windows.size() - i)]);
  }
  windows.resize(static_cast<std::size_t>(count));
  return windows;
}

}  // namespace qeft_llm
