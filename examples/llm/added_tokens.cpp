// SPDX-License-Identifier: Apache-2.0
#include "added_tokens.hpp"

#include <algorithm>

#include "utf8.hpp"

namespace qeft_llm {

namespace {

bool touches_word(std::string_view text, std::size_t begin, std::size_t end) {
  return (begin > 0 && is_word(code_point_at(text, previous_character(text, begin)))) ||
         (end < text.size() && is_word(code_point_at(text, end)));
}

}  // namespace

void added_token_set::add(added_token token) {
  std::size_t at = 0;
  for (auto c = token.content.rbegin(); c != token.content.rend(); ++c) {
    const auto byte = static_cast<unsigned char>(*c);
    const auto [found, is_new] = edges_.try_emplace(edge(at, byte), states_.size());
    if (is_new) states_.emplace_back();
    if (at == 0) from_root_[byte] = found->second;
    at = found->second;
  }
  states_[at].longest = tokens_.size();
  tokens_.push_back(std::move(token));
}

void added_token_set::finish() {
  // By length, so that what a state falls back to is finished before it.
  std::vector<std::vector<std::pair<unsigned char, std::size_t>>> children(states_.size());
  for (const auto& [key, to] : edges_) {
    children[static_cast<std::size_t>(key >> 8U)].emplace_back(
        static_cast<unsigned char>(key & 0xffU), to);
  }
  std::vector<std::size_t> queue = {0};
  for (std::size_t i = 0; i < queue.size(); ++i) {
    const std::size_t parent = queue[i];
    for (const auto& [byte, at] : children[parent]) {
      queue.push_back(at);
      state& s = states_[at];
      if (parent != 0) s.fallback = next(states_[parent].fallback, byte);
      if (s.longest == none) s.longest = states_[s.fallback].longest;
    }
  }
}

std::size_t added_token_set::next(std::size_t from, unsigned char byte) const {
  for (; from != 0; from = states_[from].fallback) {
    const auto found = edges_.find(edge(from, byte));
    if (found != edges_.end()) return found->second;
  }
  return from_root_[byte];
}

std::vector<added_token_set::match> added_token_set::find(std::string_view text) const {
  std::vector<match> matches;
  if (tokens_.empty()) return matches;
  std::size_t at = 0;
  for (std::size_t i = text.size(); i-- > 0;) {
    at = next(at, static_cast<unsigned char>(text[i]));
    if (states_[at].longest != none) matches.push_back({i, states_[at].longest});
  }
  return matches;
}

std::pair<std::size_t, std::size_t> added_token_set::extent(std::string_view text,
                                                            const added_token& t, std::size_t begin,
                                                            std::size_t end, std::size_t done) {
  const std::pair<std::size_t, std::size_t> nothing = {begin, begin};
  if (t.single_word && touches_word(text, begin, end)) return nothing;
  if (t.lstrip) {
    while (begin > done && is_space(code_point_at(text, previous_character(text, begin)))) {
      begin = previous_character(text, begin);
    }
  }
  if (t.lstrip) begin = std::max(begin, done);  // what an earlier one took counts for that
  if (t.rstrip) {
    end = std::max(end, done);  // read once, however many matches lie in it
    while (end < text.size() && is_space(code_point_at(text, end))) {
      end += static_cast<std::size_t>(character_length(text.substr(end)));
    }
  }
  return begin < end ? std::pair(begin, end) : nothing;
}

}  // namespace qeft_llm
