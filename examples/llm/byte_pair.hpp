// SPDX-License-Identifier: Apache-2.0
// Byte-pair encoding of one word (Sennrich et al., arXiv:1508.07909) over the bytes of UTF-8.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace qeft_llm {

/// Tables of the model and the merging itself. Ids are not negative.
struct byte_pair_model {
  struct merge {
    int rank;
    int id;  // of the merged token
  };

  std::array<int, 256> byte_id{};                    // -1 for a byte without a token
  std::unordered_map<std::uint64_t, merge> merges;   // by pair_key
  std::unordered_map<std::string, int> whole_words;  // bytes of tokens taken without merging
  std::optional<int> unknown_id;  // stands for a byte without a token; such bytes vanish without it
  bool fuse_unknown = false;      // one unknown token for a run of such bytes

  static std::uint64_t pair_key(int left, int right) noexcept {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32U |
           static_cast<std::uint32_t>(right);
  }

  /// Appends the ids of `word`: the pair of lowest rank is merged first, the leftmost among equals,
  /// until no pair is left. O(n log n). @pre fewer than 2^31 bytes
  void encode(std::string_view word, std::vector<int>& ids) const;
};

/// The bytes that a token of the printable alphabet of GPT-2 stands for ("Ġthe" is " the"), or
/// nothing when it has another character.
std::optional<std::string> bytes_of_token(std::string_view token);

}  // namespace qeft_llm
