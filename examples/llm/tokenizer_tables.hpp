// SPDX-License-Identifier: Apache-2.0
// What a tokenizer.json says, ready to use.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "added_tokens.hpp"
#include "byte_pair.hpp"
#include "regex.hpp"

namespace qeft_llm {

/// One step of the normalizer. Throws qeft::error when the result is larger than `limit` bytes.
using normalizer = std::function<std::string(std::string_view text, std::size_t limit)>;

/// Which pieces get a space in front if they have none: none, that at the start of the text, all.
enum class prepend_scheme { never, first, always };

/// One step of the pre-tokenizer, applied to every piece that the step before left.
struct splitter {
  regex pattern;
  bool keep_matches = true;
  bool keep_others = true;
  prepend_scheme prepend = prepend_scheme::never;
  std::string space = " ";  // how spaces are written from here on
};

/// How tokens become text.
struct decoding {
  struct replacement {
    std::string from;
    std::string to;
    std::string to_if_first;  // in the first token
  };
  bool byte_level = false;                // tokens are in the alphabet of GPT-2
  std::vector<replacement> replacements;  // in every token, one behind the other
  bool byte_fallback = false;             // byte tokens become bytes
  std::string strip;                      // a character, taken off the start of the text ...
  std::size_t strip_limit = 0;            // ... as often as it is there, but not more often
};

/// What a token adds to the text.
struct token_text {
  std::string bytes;
  bool is_byte = false;  // a byte token
};

/// What there is to know of an id.
struct token_entry {
  token_text text;
  bool used = false;  // not a gap between the ids
  bool special = false;
};

struct tokenizer_tables {
  std::unordered_map<std::string, int> ids;        // by token, as written in the file
  std::vector<token_entry> tokens;                 // by id
  std::unordered_map<int, token_text> first_text;  // of tokens that differ when they come first
  added_token_set added;                           // found before normalisation
  added_token_set added_normalized;                // found after it
  std::vector<normalizer> normalizers;
  std::vector<splitter> splitters;
  byte_pair_model model;
  decoding decoder;
  std::vector<int> prefix;
};

/// Every occurrence of `from` replaced, from the left. Throws qeft::error when the result is larger
/// than `limit` bytes. @pre from is not empty
std::string replaced(std::string_view text, std::string_view from, std::string_view to,
                     std::size_t limit);

/// Throws qeft::error when `size` is above `limit`: the steps of a tokenizer.json make a text of
/// any size out of a few bytes.
void check_growth(std::size_t size, std::size_t limit);

}  // namespace qeft_llm
