// SPDX-License-Identifier: Apache-2.0
#include "tokenizer.hpp"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <limits>
#include <unordered_map>
#include <utility>

#include "qeft/core/status.hpp"
#include "qeft/io/mapped_file.hpp"
#include "regex.hpp"
#include "tokenizer_json.hpp"
#include "tokenizer_tables.hpp"
#include "utf8.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;

namespace {

void check_size(std::string_view text) {
  if (text.size() > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
    fail(errc::invalid_argument, "tokenizer::encode: the text has " + std::to_string(text.size()) +
                                     " bytes, but must have fewer than 2^31");
  }
}

}  // namespace

std::string replaced(std::string_view text, std::string_view from, std::string_view to,
                     std::size_t limit) {
  std::string out;
  const auto append = [&](std::string_view part) {
    check_growth(out.size() + part.size(), limit);
    out += part;
  };
  std::size_t done = 0;
  for (std::size_t at; (at = text.find(from, done)) != std::string_view::npos;) {
    append(text.substr(done, at - done));
    append(to);
    done = at + from.size();
  }
  append(text.substr(done));
  return out;
}

void check_growth(std::size_t size, std::size_t limit) {
  if (size > limit) {
    fail(errc::unsupported, "tokenizer: the steps of tokenizer.json make more than " +
                                std::to_string(limit) + " bytes out of the text");
  }
}

namespace {

/// Working memory of one call of encode.
class encoder {
 public:
  explicit encoder(const tokenizer_tables& t) : t_(t) {
    for (const splitter& s : t.splitters) matchers_.emplace_back(s.pattern);
  }

  /// @param marks 1 where a special token does not count, as long as the text
  std::vector<int> run(std::string_view text, std::string_view marks) {
    start_ = text.data();
    left_ = 64 * text.size() + (std::size_t{1} << 20U);
    const auto emit = [&](const added_token& token) { ids_.push_back(token.id); };
    const auto words = [&](std::string_view part) { encode_plain(part); };
    const auto free = [](std::string_view m) { return m.find('\1') == std::string_view::npos; };
    t_.added.split(
        text,
        [&](std::size_t begin, std::size_t end) { return free(marks.substr(begin, end - begin)); },
        [&](std::string_view part) {
          // Normalisation moves bytes: one mark counts for the whole part.
          const auto begin = static_cast<std::size_t>(part.data() - text.data());
          const bool parse_special = free(marks.substr(begin, part.size()));
          for (const normalizer& step : t_.normalizers) part = keep(step(part, limit()));
          t_.added_normalized.split(
              part, [&](std::size_t, std::size_t) { return parse_special; }, words, emit);
        },
        emit);
    return std::move(ids_);
  }

 private:
  /// The most bytes that the next step may make.
  std::size_t limit() const {
    return std::min<std::size_t>(left_, std::numeric_limits<int>::max());
  }

  /// The cache refers to the text, so what is made on the way stays until the end.
  std::string_view keep(std::string s) {
    check_growth(s.size(), limit());
    left_ -= s.size();
    return kept_.emplace_back(std::move(s));
  }

  void encode_plain(std::string_view text) {
    pieces_.assign(1, text);
    for (std::size_t i = 0; i < t_.splitters.size(); ++i) {
      finer_.clear();
      for (const std::string_view piece : pieces_) {
        split_piece(t_.splitters[i], matchers_[i], piece);
      }
      pieces_.swap(finer_);
    }
    for (const std::string_view word : pieces_) encode_word(word);
  }

  void split_piece(const splitter& s, regex::matcher& matcher, std::string_view piece) {
    const bool is_first = piece.data() == start_;
    if (s.space != " ") piece = keep(replaced(piece, " ", s.space, limit()));
    const bool prepend =
        s.prepend == prepend_scheme::always || (s.prepend == prepend_scheme::first && is_first);
    if (prepend && piece.substr(0, s.space.size()) != s.space) {
      piece = keep(s.space + std::string(piece));
    }
    if (is_first) start_ = piece.data();
    const auto put = [&](bool wanted, std::size_t begin, std::size_t end) {
      if (wanted && begin < end) finer_.push_back(piece.substr(begin, end - begin));
    };
    std::size_t done = 0;
    for (regex::range match{}; matcher.find(piece, done, match); done = match.end) {
      put(s.keep_others, done, match.begin);
      put(s.keep_matches, match.begin, match.end);
    }
    put(s.keep_others, done, piece.size());
  }

  void encode_word(std::string_view word) {
    const auto [entry, is_new] = cache_.try_emplace(word);
    if (is_new) {
      entry->second.first = cached_.size();
      t_.model.encode(word, cached_);
      entry->second.second = cached_.size();
    }
    const auto at = [&](std::size_t i) { return cached_.begin() + static_cast<std::ptrdiff_t>(i); };
    ids_.insert(ids_.end(), at(entry->second.first), at(entry->second.second));
  }

  const tokenizer_tables& t_;
  std::vector<regex::matcher> matchers_;
  std::deque<std::string> kept_;
  std::size_t left_ = 0;         // bytes that kept_ may grow by
  const char* start_ = nullptr;  // of the text, or what the pre-tokenizer made of it
  std::vector<std::string_view> pieces_;
  std::vector<std::string_view> finer_;
  std::unordered_map<std::string_view, std::pair<std::size_t, std::size_t>> cache_;  // in cached_
  std::vector<int> cached_;
  std::vector<int> ids_;
};

}  // namespace

std::vector<int> tokenizer::encode(std::string_view utf8, bool parse_special) const {
  check_size(utf8);
  const std::string text = well_formed(utf8);
  return encoder(*tables_).run(text, std::string(text.size(), parse_special ? '\0' : '\1'));
}

std::vector<int> tokenizer::encode_marked(std::string_view utf8, std::string_view marks) const {
  check_size(utf8);
  if (utf8.size() != marks.size()) {
    fail(errc::invalid_argument, "tokenizer::encode: the text has " + std::to_string(utf8.size()) +
                                     " bytes, but " + std::to_string(marks.size()) + " marks");
  }
  // What is repaired has another length, run by run of equal marks.
  std::string text;
  std::string repaired_marks;
  for (std::size_t begin = 0, end = 0; begin < utf8.size(); begin = end) {
    end = std::min(marks.find_first_not_of(marks[begin], begin), marks.size());
    text += well_formed(utf8.substr(begin, end - begin));
    repaired_marks.resize(text.size(), marks[begin]);
  }
  return encoder(*tables_).run(text, repaired_marks);
}

std::string tokenizer::decode(const std::vector<int>& ids, bool skip_special) const {
  streaming_decoder decoder(*this);
  std::string out;
  for (const int id : ids) {
    if (!(skip_special && is_special(id))) out += decoder.next(id);
  }
  return out + decoder.finish();
}

std::string_view tokenizer::bytes_of(int id) const noexcept {
  if (id < 0 || id >= vocab_size()) return {};
  return tables_->tokens[static_cast<std::size_t>(id)].text.bytes;
}

const std::vector<int>& tokenizer::prefix() const noexcept { return tables_->prefix; }

std::optional<int> tokenizer::id_of(const std::string& token) const {
  const auto found = tables_->ids.find(token);
  return found == tables_->ids.end() ? std::nullopt : std::optional<int>(found->second);
}

bool tokenizer::is_special(int id) const noexcept {
  return id >= 0 && id < vocab_size() && tables_->tokens[static_cast<std::size_t>(id)].special;
}

int tokenizer::vocab_size() const noexcept { return static_cast<int>(tables_->tokens.size()); }

tokenizer tokenizer::from_json(const std::string& text, const std::string& where) {
  return tokenizer(read_tokenizer_json(text, where));
}

tokenizer tokenizer::from_file(const std::string& path) {
  const qeft::io::mapped_file file(path);
  const auto* text = reinterpret_cast<const char*>(file.bytes().data());
  return from_json(std::string(text, static_cast<std::size_t>(file.bytes().size())), path);
}

std::string streaming_decoder::next(int id) {
  const tokenizer_tables& t = *tokenizer_.tables_;
  if (id < 0 || id >= tokenizer_.vocab_size()) return {};
  const token_entry& token = t.tokens[static_cast<std::size_t>(id)];
  if (!token.used) return {};
  const auto if_first = std::exchange(first_, false) ? t.first_text.find(id) : t.first_text.end();
  const token_text& text = if_first != t.first_text.end() ? if_first->second : token.text;

  if (!t.decoder.byte_level && !text.is_byte) return strip(release() + text.bytes);
  held_ += text.bytes;
  if (text.is_byte) return {};
  // An ill-formed part at the very end may be the start of a character.
  std::size_t whole = 0;
  while (whole < held_.size()) {
    const std::string_view rest = std::string_view(held_).substr(whole);
    const auto length = static_cast<std::size_t>(std::abs(character_length(rest)));
    if (character_length(rest) < 0 && length == rest.size()) break;
    whole += length;
  }
  std::string out = well_formed(std::string_view(held_).substr(0, whole));
  held_.erase(0, whole);
  return out;
}

std::string streaming_decoder::finish() {
  std::string out = strip(release());
  first_ = true;
  stripped_ = 0;
  return out;
}

std::string streaming_decoder::release() {
  const std::string held = std::exchange(held_, {});
  std::string out = well_formed(held);
  if (out == held || tokenizer_.tables_->decoder.byte_level) return out;
  out.clear();
  for (std::size_t i = 0; i < held.size(); ++i) out += "\ufffd";
  return out;
}

std::string streaming_decoder::strip(std::string part) {
  const decoding& d = tokenizer_.tables_->decoder;
  std::size_t from = 0;
  while (stripped_ < d.strip_limit && from < part.size()) {
    if (part.compare(from, d.strip.size(), d.strip) == 0) {
      from += d.strip.size();
      ++stripped_;
    } else {
      stripped_ = d.strip_limit;
    }
  }
  return part.erase(0, from);
}

}  // namespace qeft_llm
