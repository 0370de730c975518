// SPDX-License-Identifier: Apache-2.0
#include "byte_pair.hpp"

#include <algorithm>
#include <charconv>
#include <queue>

#include "utf8.hpp"

namespace qeft_llm {

namespace {

/// The ids of a word while it is being merged, as a linked list in an array.
class symbol_list {
 public:
  void push_back(int id) {
    const int at = static_cast<int>(symbols_.size());
    if (at > 0) symbols_.back().next = at;
    symbols_.push_back({id, at - 1, -1});
  }

  bool empty() const { return symbols_.empty(); }
  int size() const { return static_cast<int>(symbols_.size()); }
  int id(int at) const { return symbol(at).id; }
  int previous(int at) const { return symbol(at).previous; }
  int next(int at) const { return symbol(at).next; }

  /// Makes `at` and its successor one symbol.
  void merge(int at, int id) {
    const int gone = next(at);
    const int after = next(gone);
    symbol(gone).id = -1;
    symbol(at).id = id;
    symbol(at).next = after;
    if (after >= 0) symbol(after).previous = at;
  }

 private:
  struct node {
    int id;        // -1 once merged into its predecessor
    int previous;  // -1 at the start
    int next;      // -1 at the end
  };
  const node& symbol(int at) const { return symbols_[static_cast<std::size_t>(at)]; }
  node& symbol(int at) { return symbols_[static_cast<std::size_t>(at)]; }

  std::vector<node> symbols_;
};

struct candidate {
  byte_pair_model::merge merge;
  int at;             // position of the left symbol
  std::uint64_t key;  // the pair it was found for

  /// std::priority_queue takes the greatest first.
  bool operator<(const candidate& o) const {
    return merge.rank != o.merge.rank ? merge.rank > o.merge.rank : at > o.at;
  }
};

}  // namespace

byte_pair_model::letter byte_pair_model::letter_at(std::string_view word, std::size_t at) const {
  if (by_bytes) return {static_cast<unsigned char>(word[at]), 1};
  return {code_point_at(word, at), static_cast<std::size_t>(character_length(word.substr(at)))};
}

void byte_pair_model::encode(std::string_view word, std::vector<int>& ids) const {
  if (!whole_words.empty()) {
    const auto found = whole_words.find(std::string(word));
    if (found != whole_words.end()) return ids.push_back(found->second);
  }

  symbol_list symbols;
  // An unknown token is put when a letter with a token follows: spelt letters overtake it and do
  // not end a run, as in `tokenizers`.
  bool unknown = false;
  const auto put_unknown = [&] {
    if (unknown) symbols.push_back(*unknown_id);
    unknown = false;
  };
  const auto byte_at = [&](char c) { return byte_id[static_cast<unsigned char>(c)]; };
  for (std::size_t at = 0, length = 0; at < word.size(); at += length) {
    const letter next = letter_at(word, at);
    length = next.length;
    const std::string_view bytes = word.substr(at, length);
    const auto found = letter_id.find(next.value);
    if (found != letter_id.end()) {
      put_unknown();
      symbols.push_back(found->second);
    } else if (std::all_of(bytes.begin(), bytes.end(), [&](char c) { return byte_at(c) >= 0; })) {
      for (const char c : bytes) symbols.push_back(byte_at(c));
    } else if (unknown_id) {
      if (!fuse_unknown) put_unknown();
      unknown = true;
    }
  }
  put_unknown();
  if (symbols.empty()) return;

  std::priority_queue<candidate> queue;
  const auto key_at = [&](int at) {
    return pair_key(symbols.id(at), symbols.id(symbols.next(at)));
  };
  const auto consider = [&](int at) {
    if (at < 0 || symbols.next(at) < 0) return;
    const std::uint64_t key = key_at(at);
    const auto found = merges.find(key);
    if (found != merges.end()) queue.push({found->second, at, key});
  };
  for (int at = 0; at < symbols.size(); ++at) consider(at);
  while (!queue.empty()) {
    const candidate best = queue.top();
    queue.pop();
    const bool stale =
        symbols.id(best.at) < 0 || symbols.next(best.at) < 0 || key_at(best.at) != best.key;
    if (stale) continue;
    symbols.merge(best.at, best.merge.id);
    consider(symbols.previous(best.at));
    consider(best.at);
  }
  for (int at = 0; at >= 0; at = symbols.next(at)) ids.push_back(symbols.id(at));
}

std::optional<std::string> bytes_of_token(std::string_view token) {
  // Printable Latin-1 characters stand for their own byte, the characters from U+0100 for the other
  // bytes in ascending order.
  static const auto byte_of = [] {
    std::array<int, 512> table{};
    table.fill(-1);
    std::size_t next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable =
          (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
      table[printable ? static_cast<std::size_t>(b) : next++] = b;
    }
    return table;
  }();

  std::string bytes;
  for (std::size_t at = 0; at < token.size();) {
    const int length = character_length(token.substr(at));
    if (length < 0) return std::nullopt;
    const std::uint32_t code = code_point_at(token, at);
    if (code >= byte_of.size() || byte_of[code] < 0) return std::nullopt;
    bytes += static_cast<char>(byte_of[code]);
    at += static_cast<std::size_t>(length);
  }
  return bytes;
}

std::string byte_token(unsigned char byte) {
  constexpr std::string_view digits = "0123456789ABCDEF";
  return std::string("<0x") + digits[byte / 16] + digits[byte % 16] + '>';
}

std::optional<unsigned char> byte_of_token(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token.back() != '>') return std::nullopt;
  unsigned char byte = 0;
  const char* end = token.data() + 5;
  const auto [read, error] = std::from_chars(token.data() + 3, end, byte, 16);
  if (error != std::errc() || read != end) return std::nullopt;
  return byte;
}

}  // namespace qeft_llm
