// SPDX-License-Identifier: Apache-2.0
// Added tokens of a tokenizer, and where they are in a text.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace qeft_llm {

struct added_token {
  std::string content;
  int id = 0;
  bool special = false;
  bool normalized = false;   // looked for in the normalised text
  bool single_word = false;  // not next to a word character
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space behind it
};

/// Finds added tokens in text, in time proportional to the text, however many there are.
///
/// An automaton of Aho and Corasick over the reversed tokens reads the text from its end: behind
/// each byte it knows the longest token that starts there.
class added_token_set {
 public:
  added_token_set() : states_(1) { from_root_.fill(0); }

  /// Of tokens with the same content the one added last is found. @pre the content is not empty
  void add(added_token token);
  /// To be called once, behind the last add.
  void finish();

  /// Calls plain(part) and token(t) in the order of the text; parts are not empty. The leftmost
  /// token counts, the longest among those that start there.
  /// @param parse_special parse_special(begin, end) says whether a special token counts there
  template <class ParseSpecial, class Plain, class Token>
  void split(std::string_view text, const ParseSpecial& parse_special, const Plain& plain,
             const Token& token) const {
    std::size_t done = 0;
    std::size_t at = 0;
    const std::vector<match> matches = find(text);
    for (auto m = matches.rbegin(); m != matches.rend(); ++m) {
      if (m->begin < at) continue;
      const added_token& t = tokens_[m->token];
      at = m->begin + t.content.size();  // also when it does not count: matches never overlap
      if (t.special && !parse_special(m->begin, at)) continue;
      const std::pair<std::size_t, std::size_t> taken = extent(text, t, m->begin, at, done);
      if (taken.first == taken.second) continue;
      if (done < taken.first) plain(text.substr(done, taken.first - done));
      token(t);
      done = taken.second;
    }
    if (done < text.size()) plain(text.substr(done));
  }

 private:
  static constexpr std::size_t none = static_cast<std::size_t>(-1);

  /// A prefix of reversed tokens.
  struct state {
    std::size_t fallback = 0;    // the longest proper suffix that is a state
    std::size_t longest = none;  // index of the longest token that ends here, reversed
  };
  struct match {
    std::size_t begin;
    std::size_t token;
  };

  /// The longest token at every place where one starts, from the last to the first.
  std::vector<match> find(std::string_view text) const;
  /// What a match takes from the text, white space included; empty when it does not count.
  static std::pair<std::size_t, std::size_t> extent(std::string_view text, const added_token& t,
                                                    std::size_t begin, std::size_t end,
                                                    std::size_t done);

  static std::uint64_t edge(std::size_t from, unsigned char byte) noexcept {
    return static_cast<std::uint64_t>(from) << 8U | byte;
  }
  /// The state behind `byte`, or the root.
  std::size_t next(std::size_t from, unsigned char byte) const;

  std::vector<added_token> tokens_;
  std::vector<state> states_;  // the root first, children behind their parents
  std::unordered_map<std::uint64_t, std::size_t> edges_;
  std::array<std::size_t, 256> from_root_;  // most of a text is far from any token
};

}  // namespace qeft_llm
