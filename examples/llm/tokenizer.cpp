// SPDX-License-Identifier: Apache-2.0
#include "tokenizer.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <queue>
#include <unordered_map>
#include <utility>

#include "qeft/core/status.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;

namespace {

// ---- UTF-8 --------------------------------------------------------------------------------------

/// Length of the well-formed character at the start of s, or minus the length of the maximal ill-formed
/// part (Unicode, table 3-7).
int character_length(std::string_view s) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  int length = 0;
  unsigned low = 0x80;
  unsigned high = 0xbf;
  if (first >= 0xc2 && first <= 0xdf) {
    length = 2;
  } else if (first >= 0xe0 && first <= 0xef) {
    length = 3;
    if (first == 0xe0) low = 0xa0;
    if (first == 0xed) high = 0x9f;
  } else if (first >= 0xf0 && first <= 0xf4) {
    length = 4;
    if (first == 0xf0) low = 0x90;
    if (first == 0xf4) high = 0x8f;
  } else {
    return -1;
  }
  for (int i = 1; i < length; ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (at >= s.size() || byte(at) < low || byte(at) > high) return -i;
    low = 0x80;
    high = 0xbf;
  }
  return length;
}

std::string well_formed(std::string_view s) {
  std::string out;
  out.reserve(s.size());
  while (!s.empty()) {
    const int length = character_length(s);
    const auto bytes = static_cast<std::size_t>(std::abs(length));
    if (length > 0) {
      out.append(s.substr(0, bytes));
    } else {
      out += "\xef\xbf\xbd";
    }
    s.remove_prefix(bytes);
  }
  return out;
}

std::string nfc(const std::string& s) {
  utf8proc_uint8_t* mapped = nullptr;
  const auto length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(s.data()),
                                   static_cast<utf8proc_ssize_t>(s.size()), &mapped,
                                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE |
                                                                  UTF8PROC_COMPOSE));
  if (length < 0) fail(errc::invalid_argument, "tokenizer: " + std::string(utf8proc_errmsg(length)));
  std::string out(reinterpret_cast<char*>(mapped), static_cast<std::size_t>(length));
  std::free(mapped);
  return out;
}

// ---- Regular expressions ------------------------------------------------------------------------

/// PCRE2 pattern with Unicode classes. White space there lacks U+0085, which `tokenizers` counts.
class regex {
 public:
  regex(const std::string& pattern, const std::string& where) {
    const std::string translated = with_next_line(pattern);
    int code = 0;
    PCRE2_SIZE at = 0;
    pcre2_code* compiled = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()),
                                         translated.size(), PCRE2_UTF | PCRE2_UCP, &code, &at,
                                         nullptr);
    if (compiled == nullptr) {
      std::array<PCRE2_UCHAR, 256> message{};
      pcre2_get_error_message(code, message.data(), message.size());
      fail(errc::unsupported, where + ": pattern " + pattern + ": " +
                                  reinterpret_cast<const char*>(message.data()));
    }
    code_.reset(compiled, pcre2_code_free);
    pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);  // without it, matching is slower
  }

  /// Calls piece(begin, end) for every match and everything between, in order. @pre s is UTF-8
  template <class Piece>
  void split(std::string_view s, const Piece& piece) const {
    const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
        pcre2_match_data_create_from_pattern(code_.get(), nullptr), pcre2_match_data_free);
    std::size_t done = 0;
    std::size_t from = 0;
    while (from < s.size()) {
      const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(s.data()), s.size(),
                                    from, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, match.get(), nullptr);
      if (found == PCRE2_ERROR_NOMATCH) break;
      if (found < 0) {
        fail(errc::unsupported, "tokenizer: regular expression: PCRE2 error " +
                                    std::to_string(found));
      }
      const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
      if (range[0] > done) piece(done, range[0]);
      piece(range[0], range[1]);
      done = from = range[1];
    }
    if (done < s.size()) piece(done, s.size());
  }

 private:
  static std::string with_next_line(const std::string& pattern) {
    std::string out;
    bool in_class = false;
    for (std::size_t i = 0; i < pattern.size(); ++i) {
      const char c = pattern[i];
      if (c == '\\' && i + 1 < pattern.size()) {
        const char next = pattern[++i];
        if (next == 's') {
          out += in_class ? "\\s\\x{85}" : "[\\s\\x{85}]";
        } else if (next == 'S' && !in_class) {
          out += "[^\\s\\x{85}]";
        } else {
          out += c;
          out += next;
        }
        continue;
      }
      if (c == '[') in_class = true;
      if (c == ']') in_class = false;
      out += c;
    }
    return out;
  }

  std::shared_ptr<pcre2_code> code_;
};

// The pattern of GPT-2, which ByteLevel uses.
constexpr const char* byte_level_pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// The byte of each character of GPT-2's printable alphabet.
const std::unordered_map<std::uint32_t, unsigned char>& byte_alphabet() {
  static const auto table = [] {
    std::unordered_map<std::uint32_t, unsigned char> t;
    std::uint32_t next = 256;
    for (std::uint32_t b = 0; b < 256; ++b) {
      const bool printable =
          (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
      t[printable ? b : next++] = static_cast<unsigned char>(b);
    }
    return t;
  }();
  return table;
}

/// The bytes a vocabulary entry stands for, or nothing when it is not written in the byte alphabet.
std::optional<std::string> raw_bytes(const std::string& token) {
  std::string out;
  std::string_view rest = token;
  while (!rest.empty()) {
    const int length = character_length(rest);
    if (length <= 0) return std::nullopt;
    utf8proc_int32_t code = 0;
    utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(rest.data()), length, &code);
    const auto found = byte_alphabet().find(static_cast<std::uint32_t>(code));
    if (found == byte_alphabet().end()) return std::nullopt;
    out += static_cast<char>(found->second);
    rest.remove_prefix(static_cast<std::size_t>(length));
  }
  return out;
}

struct added_token {
  std::string content;
  int id;
  bool special;
};

struct merge_target {
  int rank;
  int id;
};

std::uint64_t pair_key(int left, int right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32U |
         static_cast<std::uint32_t>(right);
}

}  // namespace

struct tokenizer::tables {
  using piece_list = std::vector<std::string_view>;
  /// Cuts pieces into smaller ones.
  using splitter = std::function<void(std::string_view, piece_list&)>;

  std::unordered_map<std::string, int> vocabulary;  // as written in the file
  std::unordered_map<std::string, int> by_bytes;
  std::vector<std::string> bytes;  // of each id
  std::vector<bool> special;
  std::array<int, 256> byte_id{};  // -1 for a byte without a token
  std::unordered_map<std::uint64_t, merge_target> merges;
  std::vector<added_token> added;
  std::vector<splitter> splitters;
  std::vector<int> prefix;
  bool normalize_nfc = false;
  bool ignore_merges = false;

  void encode_text(std::string_view text, std::vector<int>& ids,
                   std::unordered_map<std::string_view, std::vector<int>>& cache) const;
  void merge_word(std::string_view word, std::vector<int>& ids) const;
};

/// Byte-pair merging of one word: the pair of lowest rank first, the leftmost among equals.
void tokenizer::tables::merge_word(std::string_view word, std::vector<int>& ids) const {
  if (ignore_merges) {
    const auto whole = by_bytes.find(std::string(word));
    if (whole != by_bytes.end()) {
      ids.push_back(whole->second);
      return;
    }
  }
  struct symbol {
    int id;
    int previous;
    int next;  // -1 at the end; id is -1 once merged away
  };
  std::vector<symbol> symbols;
  for (const char c : word) {
    const int id = byte_id[static_cast<unsigned char>(c)];
    if (id < 0) continue;  // `tokenizers` drops bytes without a token too
    const int at = static_cast<int>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  struct candidate {
    int rank;
    int left;  // position
    std::uint64_t pair;
    bool operator<(const candidate& o) const {
      return rank != o.rank ? rank > o.rank : left > o.left;
    }
  };
  std::priority_queue<candidate> queue;
  const auto at = [&](int i) -> symbol& { return symbols[static_cast<std::size_t>(i)]; };
  const auto consider = [&](int left) {
    if (left < 0 || at(left).next < 0) return;
    const std::uint64_t pair = pair_key(at(left).id, at(at(left).next).id);
    const auto found = merges.find(pair);
    if (found != merges.end()) queue.push({found->second.rank, left, pair});
  };
  for (int i = 0; i < static_cast<int>(symbols.size()); ++i) consider(i);
  while (!queue.empty()) {
    const candidate c = queue.top();
    queue.pop();
    symbol& left = at(c.left);
    // A candidate is stale when one of its symbols has been merged since.
    if (left.id < 0 || left.next < 0 || pair_key(left.id, at(left.next).id) != c.pair) continue;
    symbol& right = at(left.next);
    left.id = merges.at(c.pair).id;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) at(left.next).previous = c.left;
    consider(left.previous);
    consider(c.left);
  }
  for (int i = 0; i >= 0; i = at(i).next) ids.push_back(at(i).id);
}

void tokenizer::tables::encode_text(
    std::string_view text, std::vector<int>& ids,
    std::unordered_map<std::string_view, std::vector<int>>& cache) const {
  piece_list pieces{text};
  for (const splitter& split : splitters) {
    piece_list finer;
    for (const std::string_view piece : pieces) split(piece, finer);
    pieces = std::move(finer);
  }
  for (const std::string_view piece : pieces) {
    const auto [entry, is_new] = cache.try_emplace(piece);
    if (is_new) merge_word(piece, entry->second);
    ids.insert(ids.end(), entry->second.begin(), entry->second.end());
  }
}

std::vector<int> tokenizer::encode(std::string_view utf8, bool parse_special) const {
  const tables& t = *tables_;
  const std::string text = well_formed(utf8);
  std::vector<int> ids;
  const auto plain = [&](std::string_view part) {
    if (part.empty()) return;
    const std::string normalized = t.normalize_nfc ? nfc(std::string(part)) : std::string(part);
    std::unordered_map<std::string_view, std::vector<int>> cache;
    t.encode_text(normalized, ids, cache);
  };
  std::size_t done = 0;
  std::size_t at = 0;
  while (parse_special && at < text.size()) {
    // The leftmost added token, the longest among those that start there.
    const added_token* best = nullptr;
    for (const added_token& a : t.added) {
      if (text.compare(at, a.content.size(), a.content) == 0 &&
          (best == nullptr || a.content.size() > best->content.size())) {
        best = &a;
      }
    }
    if (best == nullptr) {
      ++at;
      continue;
    }
    plain(std::string_view(text).substr(done, at - done));
    ids.push_back(best->id);
    at += best->content.size();
    done = at;
  }
  plain(std::string_view(text).substr(done));
  return ids;
}

std::string tokenizer::decode(const std::vector<int>& ids, bool skip_special) const {
  std::string out;
  for (const int id : ids) {
    if (id < 0 || id >= vocab_size()) {
      fail(errc::invalid_argument, "tokenizer::decode: id is " + std::to_string(id) +
                                       ", but must be in [0, " + std::to_string(vocab_size()) +
                                       ")");
    }
    const auto i = static_cast<std::size_t>(id);
    if (!(skip_special && tables_->special[i])) out += tables_->bytes[i];
  }
  return out;
}

const std::vector<int>& tokenizer::prefix() const noexcept { return tables_->prefix; }

std::optional<int> tokenizer::id_of(const std::string& token) const {
  const auto found = tables_->vocabulary.find(token);
  return found == tables_->vocabulary.end() ? std::nullopt : std::optional<int>(found->second);
}

int tokenizer::vocab_size() const noexcept { return static_cast<int>(tables_->bytes.size()); }

// ---- Reading tokenizer.json ---------------------------------------------------------------------

namespace {

using nlohmann::json;

/// Components may be null, one object, or a Sequence of them.
template <class Body>
void for_each_component(const json& j, const char* list, const Body& body) {
  if (j.is_null()) return;
  if (j.at("type") == "Sequence") {
    for (const json& part : j.at(list)) for_each_component(part, list, body);
  } else {
    body(j);
  }
}

[[noreturn]] void refuse(const std::string& where, const std::string& what) {
  fail(errc::unsupported, where + ": " + what + " is not supported");
}

}  // namespace

tokenizer tokenizer::from_json(const std::string& text, const std::string& where) {
  auto t = std::make_shared<tables>();
  try {
    const json j = json::parse(text);
    const json& model = j.at("model");
    if (model.value("type", "BPE") != "BPE") refuse(where, "model " + model.at("type").dump());
    for (const char* key : {"byte_fallback", "fuse_unk"}) {
      if (model.value(key, false)) refuse(where, std::string("model option ") + key);
    }
    t->ignore_merges = model.value("ignore_merges", false);

    // Vocabulary and added tokens share the ids; both must stay in a sane range.
    std::vector<std::pair<std::string, long long>> entries;
    for (const auto& [token, id] : model.at("vocab").items()) {
      entries.emplace_back(token, id.get<long long>());
    }
    const std::size_t in_model = entries.size();
    const json added = j.value("added_tokens", json::array());
    for (const json& a : added) {
      entries.emplace_back(a.at("content").get<std::string>(), a.at("id").get<long long>());
    }
    const auto limit = static_cast<long long>(2 * entries.size() + 65536);
    long long largest = -1;
    for (const auto& [token, id] : entries) {
      if (id < 0 || id >= limit) {
        fail(errc::corrupt_file, where + ": token " + token + " has id " + std::to_string(id) +
                                     ", but ids must be in [0, " + std::to_string(limit) + ")");
      }
      largest = std::max(largest, id);
    }
    t->bytes.resize(static_cast<std::size_t>(largest + 1));
    t->special.resize(t->bytes.size(), false);
    for (std::size_t i = 0; i < in_model; ++i) {
      const auto& [token, id] = entries[i];
      t->vocabulary[token] = static_cast<int>(id);
      if (auto raw = raw_bytes(token)) {
        t->by_bytes[*raw] = static_cast<int>(id);
        t->bytes[static_cast<std::size_t>(id)] = std::move(*raw);
      } else {
        t->bytes[static_cast<std::size_t>(id)] = token;
      }
    }
    for (const json& a : added) {
      const auto content = a.at("content").get<std::string>();
      const int id = a.at("id").get<int>();
      for (const char* key : {"lstrip", "rstrip", "single_word"}) {
        if (a.value(key, false)) refuse(where, "added token " + content + " with " + key);
      }
      if (content.empty()) fail(errc::corrupt_file, where + ": an added token is empty");
      t->vocabulary[content] = id;
      t->bytes[static_cast<std::size_t>(id)] = content;
      t->special[static_cast<std::size_t>(id)] = a.value("special", false);
      t->added.push_back({content, id, a.value("special", false)});
    }
    for (std::size_t b = 0; b < 256; ++b) {
      const auto found = t->by_bytes.find(std::string(1, static_cast<char>(b)));
      t->byte_id[b] = found == t->by_bytes.end() ? -1 : found->second;
    }

    int rank = 0;
    for (const json& m : model.at("merges")) {
      std::string left;
      std::string right;
      if (m.is_string()) {
        const auto both = m.get<std::string>();
        const std::size_t space = both.find(' ');
        left = both.substr(0, space);
        right = space == std::string::npos ? "" : both.substr(space + 1);
      } else {
        left = m.at(0).get<std::string>();
        right = m.at(1).get<std::string>();
      }
      const auto l = t->vocabulary.find(left);
      const auto r = t->vocabulary.find(right);
      const auto merged = t->vocabulary.find(left + right);
      if (l == t->vocabulary.end() || r == t->vocabulary.end() || merged == t->vocabulary.end()) {
        fail(errc::corrupt_file, where + ": merge " + std::to_string(rank) + " (" + left + " " +
                                     right + ") names a token that is not in the vocabulary");
      }
      t->merges.emplace(pair_key(l->second, r->second), merge_target{rank++, merged->second});
    }

    for_each_component(j.value("normalizer", json()), "normalizers", [&](const json& part) {
      if (part.at("type") != "NFC") refuse(where, "normalizer " + part.at("type").dump());
      t->normalize_nfc = true;
    });

    bool byte_level = false;
    const auto split_by = [&](const std::string& pattern) {
      t->splitters.emplace_back([r = regex(pattern, where)](std::string_view s,
                                                            tables::piece_list& out) {
        r.split(s, [&](std::size_t begin, std::size_t end) {
          out.push_back(s.substr(begin, end - begin));
        });
      });
    };
    for_each_component(j.value("pre_tokenizer", json()), "pretokenizers", [&](const json& part) {
      const auto type = part.at("type").get<std::string>();
      if (type == "Digits") {
        split_by(part.value("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)");
      } else if (type == "Split") {
        if (part.value("behavior", "") != "Isolated" || part.value("invert", false)) {
          refuse(where, "pre-tokenizer Split with behavior " + part.value("behavior", ""));
        }
        split_by(part.at("pattern").at("Regex").get<std::string>());
      } else if (type == "ByteLevel") {
        if (part.value("add_prefix_space", false)) {
          refuse(where, "pre-tokenizer ByteLevel with add_prefix_space");
        }
        if (part.value("use_regex", true)) split_by(byte_level_pattern);
        byte_level = true;
      } else {
        refuse(where, "pre-tokenizer " + type);
      }
    });
    if (!byte_level) refuse(where, "a pre-tokenizer without ByteLevel");

    for_each_component(j.value("post_processor", json()), "processors", [&](const json& part) {
      if (part.at("type") == "ByteLevel") return;
      if (part.at("type") != "TemplateProcessing") {
        refuse(where, "post-processor " + part.at("type").dump());
      }
      for (const json& piece : part.at("single")) {
        if (piece.contains("Sequence")) break;
        const auto token = piece.at("SpecialToken").at("id").get<std::string>();
        t->prefix.push_back(t->vocabulary.at(token));
      }
    });
  } catch (const json::exception& e) {
    fail(errc::corrupt_file, where + ": " + e.what());
  } catch (const std::out_of_range&) {
    fail(errc::corrupt_file, where + ": a template names a token that is not in the vocabulary");
  }
  return tokenizer(std::move(t));
}

tokenizer tokenizer::from_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(errc::io_error, path + ": " + std::strerror(errno));
  return from_json(std::string(std::istreambuf_iterator<char>(in), {}), path);
}

std::string streaming_decoder::next(int id) {
  held_ += tokenizer_.decode({id});
  std::string out;
  std::string_view rest = held_;
  while (!rest.empty()) {
    const int length = character_length(rest);
    // An ill-formed part at the very end may be the start of a character.
    if (length < 0 && static_cast<std::size_t>(-length) == rest.size() && rest.size() < 4) break;
    const auto bytes = static_cast<std::size_t>(std::abs(length));
    out += length > 0 ? std::string(rest.substr(0, bytes)) : "\xef\xbf\xbd";
    rest.remove_prefix(bytes);
  }
  held_ = std::string(rest);
  return out;
}

std::string streaming_decoder::finish() {
  std::string out = well_formed(held_);
  held_.clear();
  return out;
}

}  // namespace qeft_llm
