// SPDX-License-Identifier: Apache-2.0
#include "tokenizer.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <utility>

#include "byte_pair.hpp"
#include "qeft/core/status.hpp"
#include "qeft/io/mapped_file.hpp"
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

/// One step of the normalizer.
using normalizer = std::function<std::string(std::string_view)>;

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

// A piece stays whole: a match of everything.
constexpr const char* whole_pattern = R"([\s\S]+)";

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

/// Every occurrence of `from` replaced, from the left. @pre from is not empty
std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  std::size_t done = 0;
  for (std::size_t at; (at = text.find(from, done)) != std::string_view::npos;) {
    out.append(text.substr(done, at - done)).append(to);
    done = at + from.size();
  }
  return out.append(text.substr(done));
}

void check_size(std::string_view text) {
  if (text.size() > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
    fail(errc::invalid_argument, "tokenizer::encode: the text has " + std::to_string(text.size()) +
                                     " bytes, but must have fewer than 2^31");
  }
}

}  // namespace

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

namespace {

/// Working memory of one call of encode.
class encoder {
 public:
  explicit encoder(const tokenizer_tables& t) : t_(t) {
    for (const splitter& s : t.splitters) matchers_.emplace_back(s.pattern);
  }

  std::vector<int> run(std::string_view text, bool parse_special) {
    start_ = text.data();
    const auto emit = [&](const added_token& token) { ids_.push_back(token.id); };
    const auto words = [&](std::string_view part) { encode_plain(part); };
    t_.added.split(
        text, parse_special,
        [&](std::string_view part) {
          for (const normalizer& step : t_.normalizers) part = keep(step(part));
          t_.added_normalized.split(part, parse_special, words, emit);
        },
        emit);
    return std::move(ids_);
  }

 private:
  /// The cache refers to the text, so what is made on the way stays until the end.
  std::string_view keep(std::string s) {
    check_size(s);
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
    if (s.space != " ") piece = keep(replaced(piece, " ", s.space));
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
  return encoder(*tables_).run(text, parse_special);
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

// ---- Reading tokenizer.json ---------------------------------------------------------------------

namespace {

/// Fills the tables from a parsed tokenizer.json, component by component.
class reader {
 public:
  reader(const json& document, const std::string& where, tokenizer_tables& t)
      : document_(document), where_(where), t_(t) {}

  void run() {
    if (!document_.is_object()) corrupt("not a JSON object");
    read_normalizer();
    read_pre_tokenizer();
    read_decoder();
    read_vocabulary();  // whose tokens mean what the pre-tokenizer and the decoder take them for
    read_merges();
    read_added_tokens();  // some are normalised
    read_post_processor();
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
    for (const auto& [token, id] : model_ids_) {
      const auto word = t_.model.by_bytes ? bytes_of_token(token) : token;
      if (word && !word->empty()) {
        const auto letter = t_.model.letter_at(*word, 0);
        if (letter.length == word->size()) t_.model.letter_id[letter.value] = id;
        if (ignore_merges) t_.model.whole_words.emplace(*word, id);
      }
      set_text(id, token);
    }
    if (optional_value(model(), "byte_fallback", false)) {
      if (t_.model.by_bytes) refuse("model option byte_fallback with pre-tokenizer ByteLevel");
      for (std::size_t b = 0; b < 256; ++b) {
        const auto found = model_ids_.find(byte_token(static_cast<unsigned char>(b)));
        if (found != model_ids_.end()) t_.model.byte_id[b] = found->second;
      }
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
    if (at >= t_.tokens.size()) t_.tokens.resize(at + 1);
    if (t_.tokens[at].used) {
      corrupt("token " + token + " has id " + std::to_string(id) + " of another");
    }
    t_.tokens[at].used = true;
    t_.ids.emplace(token, static_cast<int>(id));
  }

  void set_text(int id, const std::string& token) {
    token_text text = text_of(token, /*is_first=*/false);
    token_text first = text_of(token, /*is_first=*/true);
    t_.first_text.erase(id);
    if (first.bytes != text.bytes) t_.first_text.emplace(id, std::move(first));
    t_.tokens[static_cast<std::size_t>(id)].text = std::move(text);
  }

  token_text text_of(const std::string& token, bool is_first) const {
    if (t_.decoder.byte_level) return {bytes_of_token(token).value_or(token)};
    token_text text{token};
    for (const decoding::replacement& r : t_.decoder.replacements) {
      text.bytes = replaced(text.bytes, r.from, is_first ? r.to_if_first : r.to);
    }
    const auto byte = t_.decoder.byte_fallback ? byte_of_token(text.bytes) : std::nullopt;
    if (byte) text = {std::string(1, static_cast<char>(*byte)), true};
    return text;
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
    for_each_part("normalizer", "normalizers", [&](const json& part, const std::string& type) {
      if (type == "Prepend") {
        const auto front = part.at("prepend").get<std::string>();
        t_.normalizers.emplace_back([front](std::string_view text) {
          return text.empty() ? std::string() : front + std::string(text);
        });
        return;
      }
      if (type == "Replace") {
        t_.normalizers.emplace_back([r = read_replace(part, "normalizer")](std::string_view text) {
          return replaced(text, r.from, r.to);
        });
        return;
      }
      const std::array<std::pair<const char*, normal_form>, 4> forms{{{"NFC", normal_form::nfc},
                                                                      {"NFD", normal_form::nfd},
                                                                      {"NFKC", normal_form::nfkc},
                                                                      {"NFKD", normal_form::nfkd}}};
      const auto found = std::find_if(forms.begin(), forms.end(),
                                      [&](const auto& form) { return type == form.first; });
      if (found == forms.end()) refuse("normalizer " + type);
      t_.normalizers.emplace_back(
          [form = found->second](std::string_view text) { return normalized(text, form); });
    });
  }

  decoding::replacement read_replace(const json& part, const std::string& component) const {
    const json& pattern = part.at("pattern");
    if (!pattern.contains("String")) refuse(component + " Replace with a regular expression");
    auto from = pattern["String"].get<std::string>();
    if (from.empty()) refuse(component + " Replace of nothing");
    const auto to = part.at("content").get<std::string>();
    return {std::move(from), to, to};
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
      t_.tokens[at].special = token.special;
      if (token.normalized) {
        for (const normalizer& step : t_.normalizers) token.content = step(token.content);
      }
      if (token.content.empty()) corrupt("an added token is empty");
      set_text(token.id, token.content);
      (token.normalized ? t_.added_normalized : t_.added).add(std::move(token));
    }
  }

  void read_pre_tokenizer() {
    bool& byte_level = t_.model.by_bytes;
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
        if (use_regex || prefix_space) {
          t_.splitters.push_back({regex(use_regex ? byte_level_pattern : whole_pattern, where_),
                                  true, true,
                                  prefix_space ? prepend_scheme::always : prepend_scheme::never});
        }
      } else if (type == "Metaspace") {
        const auto [space, prepend] = read_metaspace(part);
        if (prepend == prepend_scheme::first && !t_.normalizers.empty()) {
          // Which piece is at the start of the text is a matter of its alignment then.
          refuse("pre-tokenizer Metaspace with prepend_scheme first behind a normalizer");
        }
        const std::string s = regex::literal(space);
        const std::string words = s + "?[^" + s + "]+|" + s;  // a space belongs to what follows
        const bool split = optional_value(part, "split", true);
        t_.splitters.push_back(
            {regex(split ? words : whole_pattern, where_), true, true, prepend, space});
      } else {
        refuse("pre-tokenizer " + type);
      }
    });
  }

  std::pair<std::string, prepend_scheme> read_metaspace(const json& part) const {
    auto space = part.at("replacement").get<std::string>();
    if (space.empty() || character_length(space) != static_cast<int>(space.size())) {
      corrupt("Metaspace: the replacement is not a character: " + space);
    }
    const auto scheme = optional_value<std::string>(part, "prepend_scheme", "always");
    if (scheme != "never" && scheme != "first" && scheme != "always") {
      corrupt("Metaspace: unknown prepend_scheme " + scheme);
    }
    if (scheme != "never" && !optional_value(part, "add_prefix_space", true)) {
      corrupt("Metaspace: add_prefix_space is false, but prepend_scheme is " + scheme);
    }
    return {std::move(space), scheme == "never"   ? prepend_scheme::never
                              : scheme == "first" ? prepend_scheme::first
                                                  : prepend_scheme::always};
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
          if (value < 0 || value >= static_cast<long long>(t_.tokens.size())) {
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
    decoding& d = t_.decoder;
    std::string previous;
    for_each_part("decoder", "decoders", [&](const json& part, const std::string& type) {
      // Single tokens until ByteFallback, which makes characters of several; one text behind Fuse.
      const bool in_tokens = previous.empty() || previous == "Replace" || previous == "Metaspace";
      if (type == "ByteLevel" && previous.empty()) {
        d.byte_level = true;
      } else if (type == "Replace" && in_tokens) {
        d.replacements.push_back(read_replace(part, "decoder"));
      } else if (type == "Metaspace" && in_tokens) {
        const auto [space, prepend] = read_metaspace(part);
        d.replacements.push_back({space, " ", prepend == prepend_scheme::never ? " " : ""});
      } else if (type == "ByteFallback" && in_tokens) {
        d.byte_fallback = true;
      } else if (type == "Strip" && previous == "Fuse") {
        read_strip(part);
      } else if (type == "Fuse" && (in_tokens || previous == "ByteFallback")) {
        // All is one text in the end.
      } else {
        refuse("decoder " + type + (previous.empty() ? "" : " behind " + previous));
      }
      previous = type;
    });
    if (previous.empty()) refuse("a missing decoder");
  }

  void read_strip(const json& part) {
    if (part.at("stop").get<long long>() != 0) refuse("decoder Strip at the end");
    t_.decoder.strip = part.at("content").get<std::string>();
    const std::string& strip = t_.decoder.strip;
    if (strip.empty() || character_length(strip) != static_cast<int>(strip.size())) {
      corrupt("decoder Strip: the content is not a character: " + strip);
    }
    const auto limit = part.at("start").get<long long>();
    if (limit < 0) corrupt("decoder Strip: start is " + std::to_string(limit));
    t_.decoder.strip_limit = static_cast<std::size_t>(limit);
  }

  const json& document_;
  const std::string& where_;
  tokenizer_tables& t_;
  std::unordered_map<std::string, int> model_ids_;  // without added tokens
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
  const qeft::io::mapped_file file(path);
  const auto* text = reinterpret_cast<const char*>(file.bytes().data());
  return from_json(std::string(text, static_cast<std::size_t>(file.bytes().size())), path);
}

// ---- Streaming ----------------------------------------------------------------------------------

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
