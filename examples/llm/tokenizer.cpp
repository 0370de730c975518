// SPDX-License-Identifier: Apache-2.0
#include "tokenizer.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <utility>

#include "byte_pair.hpp"
#include "qeft/core/status.hpp"
#include "regex.hpp"
#include "utf8.hpp"

namespace qeft_llm {

using nlohmann::json;
using qeft::errc;
using qeft::fail;

namespace {

// What ByteLevel splits by, unless told not to: the pattern of GPT-2.
constexpr const char* byte_level_pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct added_token {
  std::string content;
  int id = 0;
  bool special = false;
  bool normalized = false;   // looked for in the normalised text
  bool single_word = false;  // not next to a word character
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space behind it
};

/// Finds added tokens in text.
class added_token_set {
 public:
  void add(added_token token) {
    tokens_.push_back(std::move(token));
    const auto longer = [this](std::size_t a, std::size_t b) {
      return tokens_[a].content.size() > tokens_[b].content.size();
    };
    auto& same_start = by_first_byte_[static_cast<unsigned char>(tokens_.back().content[0])];
    const std::size_t added = tokens_.size() - 1;
    same_start.insert(std::upper_bound(same_start.begin(), same_start.end(), added, longer), added);
  }

  /// Calls plain(part) and token(t) in the order of the text; parts may be empty.
  template <class Plain, class Token>
  void split(std::string_view text, bool parse_special, const Plain& plain,
             const Token& token) const {
    std::size_t done = 0;
    std::size_t at = 0;
    while (const added_token* t = find(text, at)) {
      std::size_t begin = at;
      std::size_t end = at + t->content.size();
      at = end;  // also when the match does not count: matches never overlap
      if (t->special && !parse_special) continue;
      if (t->single_word && touches_word(text, begin, end)) continue;
      if (t->lstrip) {
        while (begin > done && is_space(code_point_at(text, previous_character(text, begin)))) {
          begin = previous_character(text, begin);
        }
      }
      if (t->rstrip) {
        while (end < text.size() && is_space(code_point_at(text, end))) {
          end += static_cast<std::size_t>(character_length(text.substr(end)));
        }
      }
      if (done < begin) plain(text.substr(done, begin - done));
      token(*t);
      done = end;
    }
    if (done < text.size()) plain(text.substr(done));
  }

 private:
  /// The leftmost token at or after `at`, the longest among those that start there.
  const added_token* find(std::string_view text, std::size_t& at) const {
    for (; at < text.size(); ++at) {
      for (const std::size_t i : by_first_byte_[static_cast<unsigned char>(text[at])]) {
        const std::string& content = tokens_[i].content;
        if (text.compare(at, content.size(), content) == 0) return &tokens_[i];
      }
    }
    return nullptr;
  }

  static bool touches_word(std::string_view text, std::size_t begin, std::size_t end) {
    return (begin > 0 && is_word(code_point_at(text, previous_character(text, begin)))) ||
           (end < text.size() && is_word(code_point_at(text, end)));
  }

  std::vector<added_token> tokens_;
  std::array<std::vector<std::size_t>, 256> by_first_byte_;  // longest first
};

/// One step of the pre-tokenizer, applied to every piece that the step before left.
struct splitter {
  regex pattern;
  bool keep_matches = true;
  bool keep_others = true;
  bool add_prefix_space = false;
};

}  // namespace

struct tokenizer_tables {
  std::unordered_map<std::string, int> ids;  // by token, as written in the file
  std::vector<std::string> bytes;            // of each id; empty for an unused one
  std::vector<bool> special;                 // of each id
  added_token_set added;                     // found before normalisation
  added_token_set added_normalized;          // found after it
  std::vector<normal_form> normalizers;
  std::vector<splitter> splitters;
  byte_pair_model model;
  std::vector<int> prefix;
};

namespace {

/// Working memory of one call of encode.
class encoder {
 public:
  explicit encoder(const tokenizer_tables& t) : t_(t) {
    for (const splitter& s : t.splitters) matchers_.emplace_back(s.pattern);
  }

  std::vector<int> run(std::string_view text, bool parse_special) {
    const auto emit = [&](const added_token& token) { ids_.push_back(token.id); };
    const auto words = [&](std::string_view part) { encode_plain(part); };
    t_.added.split(
        text, parse_special,
        [&](std::string_view part) {
          for (const normal_form form : t_.normalizers) part = keep(normalized(part, form));
          t_.added_normalized.split(part, parse_special, words, emit);
        },
        emit);
    return std::move(ids_);
  }

 private:
  /// The cache refers to the text, so what is made on the way stays until the end.
  std::string_view keep(std::string s) { return kept_.emplace_back(std::move(s)); }

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
    if (s.add_prefix_space && piece[0] != ' ') piece = keep(" " + std::string(piece));
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
  std::vector<std::string_view> pieces_;
  std::vector<std::string_view> finer_;
  std::unordered_map<std::string_view, std::pair<std::size_t, std::size_t>> cache_;  // in cached_
  std::vector<int> cached_;
  std::vector<int> ids_;
};

}  // namespace

std::vector<int> tokenizer::encode(std::string_view utf8, bool parse_special) const {
  if (utf8.size() > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
    fail(errc::invalid_argument, "tokenizer::encode: the text has " + std::to_string(utf8.size()) +
                                     " bytes, but must have fewer than 2^31");
  }
  const std::string text = well_formed(utf8);
  return encoder(*tables_).run(text, parse_special);
}

std::string tokenizer::decode(const std::vector<int>& ids, bool skip_special) const {
  std::string out;
  for (const int id : ids) {
    if (!(skip_special && is_special(id))) out += bytes_of(id);
  }
  return well_formed(out);
}

std::string_view tokenizer::bytes_of(int id) const noexcept {
  if (id < 0 || id >= vocab_size()) return {};
  return tables_->bytes[static_cast<std::size_t>(id)];
}

const std::vector<int>& tokenizer::prefix() const noexcept { return tables_->prefix; }

std::optional<int> tokenizer::id_of(const std::string& token) const {
  const auto found = tables_->ids.find(token);
  return found == tables_->ids.end() ? std::nullopt : std::optional<int>(found->second);
}

bool tokenizer::is_special(int id) const noexcept {
  return id >= 0 && id < vocab_size() && tables_->special[static_cast<std::size_t>(id)];
}

int tokenizer::vocab_size() const noexcept { return static_cast<int>(tables_->bytes.size()); }

// ---- Reading tokenizer.json ---------------------------------------------------------------------

namespace {

/// Fills the tables from a parsed tokenizer.json, component by component.
class reader {
 public:
  reader(const json& document, const std::string& where, tokenizer_tables& t)
      : document_(document), where_(where), t_(t) {}

  void run() {
    read_vocabulary();
    read_merges();
    read_normalizer();
    read_added_tokens();  // some are normalised
    read_pre_tokenizer();
    read_post_processor();
    read_decoder();
  }

 private:
  [[noreturn]] void corrupt(const std::string& what) const {
    fail(errc::corrupt_file, where_ + ": " + what);
  }
  [[noreturn]] void refuse(const std::string& what) const {
    fail(errc::unsupported, where_ + ": " + what + " is not supported");
  }

  /// The value of a key that may be missing or null.
  template <class T>
  static T optional_value(const json& j, const char* key, T otherwise) {
    const auto found = j.find(key);
    return found == j.end() || found->is_null() ? otherwise : found->template get<T>();
  }

  /// A component may be missing, null, one object, or a Sequence of them.
  template <class Body>
  void for_each_part(const char* component, const char* list, const Body& body) const {
    const auto found = document_.find(component);
    if (found != document_.end() && !found->is_null()) {
      for_each_part_of(*found, component, list, body, 0);
    }
  }
  template <class Body>
  void for_each_part_of(const json& j, const char* component, const char* list, const Body& body,
                        int depth) const {
    const auto type = j.at("type").get<std::string>();
    if (type != "Sequence") return body(j, type);
    if (depth == 8) refuse(std::string(component) + " nested so deeply");
    for (const json& part : j.at(list)) for_each_part_of(part, component, list, body, depth + 1);
  }

  const json& model() const { return document_.at("model"); }

  void read_vocabulary() {
    if (const auto type = optional_value<std::string>(model(), "type", "BPE"); type != "BPE") {
      refuse("model " + type);
    }
    if (optional_value(model(), "byte_fallback", false)) refuse("model option byte_fallback");
    if (optional_value(model(), "dropout", 0.0) != 0.0) refuse("model option dropout");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!optional_value<std::string>(model(), key, "").empty()) {
        refuse(std::string("model option ") + key);
      }
    }

    const json& vocabulary = model().at("vocab");
    const std::size_t added = added_tokens().size();
    if (!vocabulary.is_object()) corrupt("vocab is not an object");
    id_limit_ = static_cast<long long>(2 * (vocabulary.size() + added)) + 65536;
    for (const auto& [token, id] : vocabulary.items()) claim(token, id.get<long long>());
    model_ids_ = t_.ids;

    const bool ignore_merges = optional_value(model(), "ignore_merges", false);
    t_.model.byte_id.fill(-1);
    for (const auto& [token, id] : model_ids_) {
      auto bytes = bytes_of_token(token);
      if (bytes && bytes->size() == 1) {
        t_.model.byte_id[static_cast<unsigned char>(bytes->front())] = id;
      }
      if (bytes && ignore_merges) t_.model.whole_words.emplace(*bytes, id);
      t_.bytes[static_cast<std::size_t>(id)] = bytes ? std::move(*bytes) : token;
    }

    const auto unknown = optional_value<std::string>(model(), "unk_token", "");
    if (!unknown.empty()) t_.model.unknown_id = model_id(unknown, "unk_token");
    t_.model.fuse_unknown = optional_value(model(), "fuse_unk", false);
  }

  /// Enters a token and its id, which no other token may have.
  void claim(const std::string& token, long long id) {
    if (id < 0 || id >= id_limit_) {  // the limit keeps the tables in proportion to the file
      corrupt("token " + token + " has id " + std::to_string(id) + ", but ids must be in [0, " +
              std::to_string(id_limit_) + ")");
    }
    const auto at = static_cast<std::size_t>(id);
    if (at >= t_.bytes.size()) {
      t_.bytes.resize(at + 1);
      t_.special.resize(at + 1);
      taken_.resize(at + 1);
    }
    if (taken_[at]) corrupt("token " + token + " has id " + std::to_string(id) + " of another");
    taken_[at] = true;
    t_.ids.emplace(token, static_cast<int>(id));
  }

  int model_id(const std::string& token, const std::string& user) const {
    const auto found = model_ids_.find(token);
    if (found == model_ids_.end()) corrupt(user + " names " + token + ", not in the vocabulary");
    return found->second;
  }

  void read_merges() {
    int rank = 0;
    for (const json& m : model().at("merges")) {
      const std::string name = "merge " + std::to_string(rank);
      std::string left;
      std::string right;
      if (m.is_string()) {
        const auto both = m.get<std::string>();
        const std::size_t space = both.find(' ');
        if (space == std::string::npos || both.find(' ', space + 1) != std::string::npos) {
          corrupt(name + " is not two tokens: " + both);
        }
        left = both.substr(0, space);
        right = both.substr(space + 1);
      } else {
        if (!m.is_array() || m.size() != 2) corrupt(name + " is not two tokens: " + m.dump());
        left = m[0].get<std::string>();
        right = m[1].get<std::string>();
      }
      const auto key = byte_pair_model::pair_key(model_id(left, name), model_id(right, name));
      // Of a merge listed twice the later counts, as in `tokenizers`.
      t_.model.merges[key] = {rank, model_id(left + right, name)};
      ++rank;
    }
  }

  void read_normalizer() {
    for_each_part("normalizer", "normalizers", [&](const json&, const std::string& type) {
      const std::array<std::pair<const char*, normal_form>, 4> forms{{{"NFC", normal_form::nfc},
                                                                      {"NFD", normal_form::nfd},
                                                                      {"NFKC", normal_form::nfkc},
                                                                      {"NFKD", normal_form::nfkd}}};
      const auto found = std::find_if(forms.begin(), forms.end(),
                                      [&](const auto& form) { return type == form.first; });
      if (found == forms.end()) refuse("normalizer " + type);
      t_.normalizers.push_back(found->second);
    });
  }

  const json& added_tokens() const {
    static const json none = json::array();
    const auto found = document_.find("added_tokens");
    return found == document_.end() || found->is_null() ? none : *found;
  }

  void read_added_tokens() {
    for (const json& a : added_tokens()) {
      added_token token;
      token.content = a.at("content").get<std::string>();
      token.special = optional_value(a, "special", false);
      token.normalized = optional_value(a, "normalized", false);
      token.single_word = optional_value(a, "single_word", false);
      token.lstrip = optional_value(a, "lstrip", false);
      token.rstrip = optional_value(a, "rstrip", false);
      if (token.content.empty()) corrupt("an added token is empty");

      const auto id = a.at("id").get<long long>();
      const auto in_model = model_ids_.find(token.content);
      if (in_model == model_ids_.end()) {
        if (t_.ids.count(token.content) != 0)
          corrupt("added token " + token.content + " is there twice");
        claim(token.content, id);
      } else if (id != in_model->second) {
        corrupt("added token " + token.content + " has id " + std::to_string(id) +
                ", but its id in the vocabulary is " + std::to_string(in_model->second));
      }
      token.id = static_cast<int>(id);
      const auto at = static_cast<std::size_t>(id);
      t_.special[at] = token.special;
      if (token.normalized) {
        for (const normal_form form : t_.normalizers) {
          token.content = normalized(token.content, form);
        }
      }
      t_.bytes[at] = bytes_of_token(token.content).value_or(token.content);
      (token.normalized ? t_.added_normalized : t_.added).add(std::move(token));
    }
  }

  void read_pre_tokenizer() {
    bool byte_level = false;
    for_each_part("pre_tokenizer", "pretokenizers", [&](const json& part, const std::string& type) {
      if (byte_level) refuse("pre-tokenizer " + type + " behind ByteLevel");
      if (type == "Digits") {
        const bool individual = optional_value(part, "individual_digits", false);
        t_.splitters.push_back({regex(individual ? R"(\p{N})" : R"(\p{N}+)", where_)});
      } else if (type == "Split") {
        read_split(part);
      } else if (type == "ByteLevel") {
        byte_level = true;
        const bool use_regex = optional_value(part, "use_regex", true);
        const bool prefix_space = optional_value(part, "add_prefix_space", true);
        // Without its pattern a piece stays whole: a match of everything.
        if (use_regex || prefix_space) {
          t_.splitters.push_back({regex(use_regex ? byte_level_pattern : R"([\s\S]+)", where_),
                                  true, true, prefix_space});
        }
      } else {
        refuse("pre-tokenizer " + type);
      }
    });
    if (!byte_level) refuse("a pre-tokenizer without ByteLevel");
  }

  void read_split(const json& part) {
    const json& pattern = part.at("pattern");
    const std::string text = pattern.contains("Regex")
                                 ? pattern["Regex"].get<std::string>()
                                 : regex::literal(pattern.at("String").get<std::string>());
    const auto behavior = part.at("behavior").get<std::string>();
    if (behavior == "Isolated") {
      t_.splitters.push_back({regex(text, where_)});
    } else if (behavior == "Removed") {
      const bool invert = optional_value(part, "invert", false);
      t_.splitters.push_back({regex(text, where_), invert, !invert});
    } else {
      refuse("pre-tokenizer Split with behavior " + behavior);
    }
  }

  void read_post_processor() {
    for_each_part("post_processor", "processors", [&](const json& part, const std::string& type) {
      if (type == "ByteLevel") return;  // only moves offsets
      if (type != "TemplateProcessing") refuse("post-processor " + type);
      bool text_seen = false;
      std::vector<int> prefix;
      for (const json& piece : part.at("single")) {
        if (piece.contains("Sequence")) {
          text_seen = true;
          continue;
        }
        if (text_seen) refuse("post-processor TemplateProcessing with tokens behind the text");
        const auto name = piece.at("SpecialToken").at("id").get<std::string>();
        for (const json& id : part.at("special_tokens").at(name).at("ids")) {
          const auto value = id.get<long long>();
          if (value < 0 || value >= static_cast<long long>(t_.bytes.size())) {
            corrupt("post-processor: token " + name + " has id " + std::to_string(value) +
                    ", which is not in the vocabulary");
          }
          prefix.push_back(static_cast<int>(value));
        }
      }
      t_.prefix.insert(t_.prefix.begin(), prefix.begin(), prefix.end());
    });
  }

  void read_decoder() {
    bool byte_level = false;
    for_each_part("decoder", "decoders", [&](const json&, const std::string& type) {
      if (type != "ByteLevel") refuse("decoder " + type);
      byte_level = true;
    });
    if (!byte_level) refuse("a decoder without ByteLevel");
  }

  const json& document_;
  const std::string& where_;
  tokenizer_tables& t_;
  std::unordered_map<std::string, int> model_ids_;  // without added tokens
  std::vector<bool> taken_;                         // ids
  long long id_limit_ = 0;
};

}  // namespace

tokenizer tokenizer::from_json(const std::string& text, const std::string& where) {
  auto t = std::make_shared<tokenizer_tables>();
  try {
    const json document = json::parse(text);
    reader(document, where, *t).run();
  } catch (const json::exception& e) {
    fail(errc::corrupt_file, where + ": " + e.what());
  }
  return tokenizer(std::move(t));
}

tokenizer tokenizer::from_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(errc::io_error, path + ": " + std::strerror(errno));
  const std::string text(std::istreambuf_iterator<char>(in), {});
  if (in.bad()) fail(errc::io_error, path + ": " + std::strerror(errno));
  return from_json(text, path);
}

// ---- Streaming ----------------------------------------------------------------------------------

std::string streaming_decoder::next(int id) {
  held_ += tokenizer_.bytes_of(id);
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
  std::string out = well_formed(held_);
  held_.clear();
  return out;
}

}  // namespace qeft_llm
