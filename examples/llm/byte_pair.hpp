// SPDX-License-Identifier: Apache-2.0
// Byte-pair encoding of one word (Sennrich et al., arXiv:1508.07909) over the bytes or the
// characters of UTF-8.
#pragma once

#include <array>
#include <cstddef>
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

  byte_pair_model() { byte_id.fill(-1); }

  bool by_bytes = false;  // merging starts from the bytes of a word, else from its characters
  std::unordered_map<std::uint32_t, int> letter_id;  // by value of the byte or code point
  std::array<int, 256> byte_id{};  // spell a letter without a token; -1 for a byte without one
  std::unordered_map<std::uint64_t, merge> merges;   // by pair_key
  std::unordered_map<std::string, int> whole_words;  // taken without merging
  std::optional<int> unknown_id;  // for a letter that cannot be spelt; without it, such ones vanish
  bool fuse_unknown = false;      // one unknown token for a run of such letters

  struct letter {
    std::uint32_t value;
    std::size_t length;  // in bytes
  };
  letter letter_at(std::string_view word, std::size_t at) const;

  static std::uint64_t pair_key(int left, int right) noexcept {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32U |
           static_cast<std::uint32_t>(right);
  }

  /// Appends the ids of `word`: the pair of lowest rank is merged first, the leftmost among equals,
  /// until no pair is left. O(n log n). @pre well-formed UTF-8 of fewer than 2^31 bytes
  void encode(std::string_view word, std::vector<int>& ids) const;
};

/// The bytes that a token of the printable alphabet of GPT-2 stands for ("Ġthe" is " the"), or
/// nothing when it has another character.
std::optional<std::string> bytes_of_token(std::string_view token);

/// The token that spells a byte in a vocabulary of characters: <0x0A> for the line feed.
std::string byte_token(unsigned char byte);

/// The byte that such a token spells (in hexadecimal digits of either case), or nothing.
std::optional<unsigned char> byte_of_token(std::string_view token);

}  // namespace qeft_llm
