// SPDX-License-Identifier: Apache-2.0
#include "tokenizer_json.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "qeft/core/status.hpp"
#include "qeft/io/json.hpp"
#include "utf8.hpp"

namespace qeft_llm {

using nlohmann::json;
using qeft::errc;
using qeft::fail;

namespace {

// What ByteLevel splits by, unless told not to: the pattern of GPT-2.
constexpr const char* byte_level_pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// A piece stays whole: a match of everything.
constexpr const char* whole_pattern = R"([\s\S]+)";

// Published files have up to a dozen steps in a component; every one costs time for every text.
constexpr std::size_t most_steps = 64;

/// How large a token may become in the steps of the file.
std::size_t token_limit(const std::string& token) { return 32 * token.size() + 4096; }

/// A value of the file, or the place where one is missing, and its path for errors.
class node {
 public:
  node(const json& document, const std::string& where) : value_(&document), where_(&where) {}

  /// Missing or null.
  bool absent() const { return value_ == nullptr || value_->is_null(); }
  const json& value() const { return *value_; }

  [[noreturn]] void corrupt(const std::string& what) const {
    fail(errc::corrupt_file, *where_ + ": " + what);
  }
  [[noreturn]] void unsupported(const std::string& what) const {
    fail(errc::unsupported, *where_ + ": " + what + " is not supported");
  }
  [[noreturn]] void refuse(const std::string& rule) const {
    constexpr std::size_t most_shown = 100;
    std::string shown = "missing";
    if (value_ != nullptr) shown = value_->dump(-1, ' ', false, json::error_handler_t::replace);
    if (shown.size() > most_shown) shown = well_formed(shown.substr(0, most_shown)) + "...";
    corrupt((path_.empty() ? "the file" : path_) + " is " + shown + ", but must be " + rule);
  }

  /// The value of a key.
  node at(const std::string& key) const {
    const bool plain = std::all_of(key.begin(), key.end(), [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
    });
    const auto found = object().find(key);
    node n = *this;
    n.value_ = found == value_->end() ? nullptr : &*found;
    n.path_ += plain ? (path_.empty() ? "" : ".") + key : "[" + json(key).dump() + "]";
    return n;
  }

  const json& object() const {
    if (value_ == nullptr || !value_->is_object()) refuse("an object");
    return *value_;
  }
  std::vector<node> list() const {
    if (value_ == nullptr || !value_->is_array()) refuse("a list");
    std::vector<node> all(value_->size(), *this);
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i].value_ = &(*value_)[i];
      all[i].path_ += "[" + std::to_string(i) + "]";
    }
    return all;
  }
  std::vector<node> list_or_empty() const { return absent() ? std::vector<node>() : list(); }

  const std::string& text() const {
    if (value_ == nullptr || !value_->is_string()) refuse("a string");
    const auto& text = value_->get_ref<const std::string&>();
    if (qeft::io::has_lone_surrogate(text)) refuse("text without lone surrogates");
    return text;
  }
  std::string text_or(const std::string& otherwise) const { return absent() ? otherwise : text(); }

  bool boolean_or(bool otherwise) const {
    if (absent()) return otherwise;
    if (!value_->is_boolean()) refuse("true or false");
    return value_->get<bool>();
  }

  double number_or(double otherwise) const {
    if (absent()) return otherwise;
    if (!value_->is_number()) refuse("a number");
    return value_->get<double>();
  }

  /// An integer of 32 bits: all there is in these files.
  long long integer() const {
    constexpr std::uint32_t largest = std::numeric_limits<std::uint32_t>::max();
    const bool good = value_ != nullptr && value_->is_number_integer() &&
                      (!value_->is_number_unsigned() || value_->get<std::uint64_t>() <= largest) &&
                      value_->get<std::int64_t>() >= -std::int64_t{largest};
    if (!good) refuse("an integer from 0 to " + std::to_string(largest));
    return value_->get<long long>();
  }

 private:
  const json* value_;
  const std::string* where_;
  std::string path_;
};

struct step_of_component {
  node step;
  std::string type;
};

void add_steps(const node& step, const char* list, int depth,
               std::vector<step_of_component>& steps) {
  const std::string& type = step.at("type").text();
  if (type == "Sequence") {
    if (depth == 8) step.unsupported("a Sequence nested so deeply");
    for (const node& part : step.at(list).list()) add_steps(part, list, depth + 1, steps);
    return;
  }
  if (steps.size() == most_steps) {
    step.unsupported("more than " + std::to_string(most_steps) + " " + list);
  }
  steps.push_back({step, type});
}

/// The steps of a component, which may be missing, null, one object, or a Sequence of them.
std::vector<step_of_component> steps_of(const node& component, const char* list) {
  std::vector<step_of_component> steps;
  if (!component.absent()) add_steps(component, list, 0, steps);
  return steps;
}

decoding::replacement read_replace(const node& step, const std::string& component) {
  const node pattern = step.at("pattern").at("String");
  if (pattern.absent()) step.unsupported(component + " Replace with a regular expression");
  const std::string& from = pattern.text();
  if (from.empty()) step.unsupported(component + " Replace of nothing");
  const std::string& to = step.at("content").text();
  return {from, to, to};
}

bool is_character(const std::string& s) {
  return !s.empty() && character_length(s) == static_cast<int>(s.size());
}

struct metaspace {
  std::string space;
  prepend_scheme prepend;
};

metaspace read_metaspace(const node& step) {
  const std::string& space = step.at("replacement").text();
  if (!is_character(space)) {
    step.corrupt("Metaspace: the replacement is not a character: " + space);
  }
  const std::string scheme = step.at("prepend_scheme").text_or("always");
  if (scheme != "never" && scheme != "first" && scheme != "always") {
    step.corrupt("Metaspace: unknown prepend_scheme " + scheme);
  }
  if (scheme != "never" && !step.at("add_prefix_space").boolean_or(true)) {
    step.corrupt("Metaspace: add_prefix_space is false, but prepend_scheme is " + scheme);
  }
  return {space, scheme == "never"   ? prepend_scheme::never
                 : scheme == "first" ? prepend_scheme::first
                                     : prepend_scheme::always};
}

// ---- Normalizer ---------------------------------------------------------------------------------

normalizer read_normalizer(const node& step, const std::string& type) {
  if (type == "Prepend") {
    return [front = step.at("prepend").text()](std::string_view text, std::size_t limit) {
      check_growth(front.size() + text.size(), limit);
      return text.empty() ? std::string() : front + std::string(text);
    };
  }
  if (type == "Replace") {
    return [r = read_replace(step, "normalizer")](std::string_view text, std::size_t limit) {
      return replaced(text, r.from, r.to, limit);
    };
  }
  const std::array<std::pair<const char*, normal_form>, 4> forms{{{"NFC", normal_form::nfc},
                                                                  {"NFD", normal_form::nfd},
                                                                  {"NFKC", normal_form::nfkc},
                                                                  {"NFKD", normal_form::nfkd}}};
  const auto found = std::find_if(forms.begin(), forms.end(),
                                  [&](const auto& form) { return type == form.first; });
  if (found == forms.end()) step.unsupported("normalizer " + type);
  return [form = found->second](std::string_view text, std::size_t limit) {
    std::string out = normalized(text, form);
    check_growth(out.size(), limit);
    return out;
  };
}

// ---- Pre-tokenizer ------------------------------------------------------------------------------

splitter read_split(const node& step, const std::string& where) {
  const node pattern = step.at("pattern");
  const std::string text = pattern.at("Regex").absent()
                               ? regex::literal(pattern.at("String").text())
                               : pattern.at("Regex").text();
  const std::string& behavior = step.at("behavior").text();
  if (behavior == "Isolated") return {regex(text, where)};
  if (behavior != "Removed") step.unsupported("pre-tokenizer Split with behavior " + behavior);
  const bool invert = step.at("invert").boolean_or(false);
  return {regex(text, where), invert, !invert};
}

void read_byte_level(const node& step, const std::string& where, tokenizer_tables& t) {
  t.model.by_bytes = true;
  const bool use_regex = step.at("use_regex").boolean_or(true);
  const bool prefix_space = step.at("add_prefix_space").boolean_or(true);
  if (!use_regex && !prefix_space) return;
  t.splitters.push_back({regex(use_regex ? byte_level_pattern : whole_pattern, where), true, true,
                         prefix_space ? prepend_scheme::always : prepend_scheme::never});
}

splitter read_metaspace_splitter(const node& step, const std::string& where,
                                 const tokenizer_tables& t) {
  const metaspace m = read_metaspace(step);
  if (m.prepend == prepend_scheme::first && !t.normalizers.empty()) {
    // Which piece is at the start of the text is a matter of its alignment then.
    step.unsupported("pre-tokenizer Metaspace with prepend_scheme first behind a normalizer");
  }
  const std::string s = regex::literal(m.space);
  const std::string words = s + "?[^" + s + "]+|" + s;  // a space belongs to what follows
  const bool split = step.at("split").boolean_or(true);
  return {regex(split ? words : whole_pattern, where), true, true, m.prepend, m.space};
}

void read_pre_tokenizer(const node& component, const std::string& where, tokenizer_tables& t) {
  for (const auto& [step, type] : steps_of(component, "pretokenizers")) {
    if (t.model.by_bytes) step.unsupported("pre-tokenizer " + type + " behind ByteLevel");
    if (type == "Digits") {
      const bool individual = step.at("individual_digits").boolean_or(false);
      t.splitters.push_back({regex(individual ? R"(\p{N})" : R"(\p{N}+)", where)});
    } else if (type == "Split") {
      t.splitters.push_back(read_split(step, where));
    } else if (type == "ByteLevel") {
      read_byte_level(step, where, t);
    } else if (type == "Metaspace") {
      t.splitters.push_back(read_metaspace_splitter(step, where, t));
    } else {
      step.unsupported("pre-tokenizer " + type);
    }
  }
}

// ---- Decoder ------------------------------------------------------------------------------------

void read_strip(const node& step, decoding& d) {
  if (step.at("stop").integer() != 0) step.unsupported("decoder Strip at the end");
  d.strip = step.at("content").text();
  if (!is_character(d.strip)) {
    step.corrupt("decoder Strip: the content is not a character: " + d.strip);
  }
  const long long limit = step.at("start").integer();
  if (limit < 0) step.corrupt("decoder Strip: start is " + std::to_string(limit));
  d.strip_limit = static_cast<std::size_t>(limit);
}

decoding read_decoder(const node& component) {
  decoding d;
  std::string previous;
  for (const auto& [step, type] : steps_of(component, "decoders")) {
    // Single tokens until ByteFallback, which makes characters of several; one text behind Fuse.
    const bool in_tokens = previous.empty() || previous == "Replace" || previous == "Metaspace";
    if (type == "ByteLevel" && previous.empty()) {
      d.byte_level = true;
    } else if (type == "Replace" && in_tokens) {
      d.replacements.push_back(read_replace(step, "decoder"));
    } else if (type == "Metaspace" && in_tokens) {
      const metaspace m = read_metaspace(step);
      d.replacements.push_back({m.space, " ", m.prepend == prepend_scheme::never ? " " : ""});
    } else if (type == "ByteFallback" && in_tokens) {
      d.byte_fallback = true;
    } else if (type == "Strip" && previous == "Fuse") {
      read_strip(step, d);
    } else if (type == "Fuse" && (in_tokens || previous == "ByteFallback")) {
      // All is one text in the end.
    } else {
      step.unsupported("decoder " + type + (previous.empty() ? "" : " behind " + previous));
    }
    previous = type;
  }
  if (previous.empty()) component.unsupported("a missing decoder");
  return d;
}

// ---- Vocabulary ---------------------------------------------------------------------------------

/// Fills in ids, tokens and merges. @pre the other components are read: tokens mean what the
/// pre-tokenizer and the decoder take them for
class vocabulary_reader {
 public:
  vocabulary_reader(const node& document, tokenizer_tables& t)
      : model_(document.at("model")), added_(document.at("added_tokens").list_or_empty()), t_(t) {}

  void run() {
    check_model();
    read_vocabulary();
    read_letters();
    read_merges();
    read_added_tokens();
  }

 private:
  void check_model() const {
    const std::string type = model_.at("type").text_or("BPE");
    if (type != "BPE") model_.unsupported("model " + type);
    if (model_.at("dropout").number_or(0) != 0) model_.unsupported("model option dropout");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!model_.at(key).text_or("").empty()) {
        model_.unsupported(std::string("model option ") + key);
      }
    }
  }

  void read_vocabulary() {
    const node vocabulary = model_.at("vocab");
    id_limit_ = static_cast<long long>(2 * (vocabulary.object().size() + added_.size())) + 65536;
    for (const auto& [token, id] : vocabulary.object().items()) {
      if (!id.is_number_integer()) vocabulary.at(token).integer();  // says so
      if (qeft::io::has_lone_surrogate(token)) {
        vocabulary.corrupt("model.vocab holds " + qeft::io::dump_json(token) +
                           ", which has a lone surrogate");
      }
      claim(token, id.get<long long>());
    }
    model_ids_ = t_.ids;
  }

  /// What words are spelt with.
  void read_letters() {
    const bool ignore_merges = model_.at("ignore_merges").boolean_or(false);
    for (const auto& [token, id] : model_ids_) {
      const auto word = t_.model.by_bytes ? bytes_of_token(token) : token;
      if (word && !word->empty()) {
        const auto letter = t_.model.letter_at(*word, 0);
        if (letter.length == word->size()) t_.model.letter_id[letter.value] = id;
        if (ignore_merges) t_.model.whole_words.emplace(*word, id);
      }
      set_text(id, token);
    }
    if (model_.at("byte_fallback").boolean_or(false)) {
      if (t_.model.by_bytes) {
        model_.unsupported("model option byte_fallback with pre-tokenizer ByteLevel");
      }
      for (std::size_t b = 0; b < 256; ++b) {
        const auto found = model_ids_.find(byte_token(static_cast<unsigned char>(b)));
        if (found != model_ids_.end()) t_.model.byte_id[b] = found->second;
      }
    }
    const std::string unknown = model_.at("unk_token").text_or("");
    if (!unknown.empty()) t_.model.unknown_id = model_id(unknown, "unk_token");
    t_.model.fuse_unknown = model_.at("fuse_unk").boolean_or(false);
  }

  /// Enters a token and its id, which no other token may have.
  void claim(const std::string& token, long long id) {
    if (id < 0 || id >= id_limit_) {  // the limit keeps the tables in proportion to the file
      model_.corrupt("token " + token + " has id " + std::to_string(id) +
                     ", but ids must be in [0, " + std::to_string(id_limit_) + ")");
    }
    const auto at = static_cast<std::size_t>(id);
    if (at >= t_.tokens.size()) t_.tokens.resize(at + 1);
    if (t_.tokens[at].used) {
      model_.corrupt("token " + token + " has id " + std::to_string(id) + " of another");
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
      text.bytes =
          replaced(text.bytes, r.from, is_first ? r.to_if_first : r.to, token_limit(token));
    }
    const auto byte = t_.decoder.byte_fallback ? byte_of_token(text.bytes) : std::nullopt;
    if (byte) text = {std::string(1, static_cast<char>(*byte)), true};
    return text;
  }

  int model_id(const std::string& token, const std::string& user) const {
    const auto found = model_ids_.find(token);
    if (found == model_ids_.end()) {
      model_.corrupt(user + " names " + token + ", not in the vocabulary");
    }
    return found->second;
  }

  void read_merges() {
    const node merges = model_.at("merges");
    if (merges.absent() || !merges.value().is_array()) merges.refuse("a list");
    int rank = 0;
    for (const json& m : merges.value()) {
      const std::string name = "merge " + std::to_string(rank);
      std::string left;
      std::string right;
      if (m.is_string()) {
        const auto& both = m.get_ref<const std::string&>();
        const std::size_t space = both.find(' ');
        if (space == std::string::npos || both.find(' ', space + 1) != std::string::npos) {
          merges.corrupt(name + " is not two tokens: " + both);
        }
        left = both.substr(0, space);
        right = both.substr(space + 1);
      } else {
        if (!m.is_array() || m.size() != 2 || !m[0].is_string() || !m[1].is_string()) {
          merges.corrupt(name + " is not two tokens: " + m.dump());
        }
        left = m[0].get<std::string>();
        right = m[1].get<std::string>();
      }
      const auto key = byte_pair_model::pair_key(model_id(left, name), model_id(right, name));
      // Of a merge listed twice the later counts, as in `tokenizers`.
      t_.model.merges[key] = {rank, model_id(left + right, name)};
      ++rank;
    }
  }

  /// The id that `tokenizers` gives to an added token that the vocabulary lacks.
  long long next_added_id() const {
    const auto vocabulary = static_cast<long long>(model_ids_.size());
    return std::max(vocabulary, largest_added_id_ + 1);
  }

  void read_added_tokens() {
    std::vector<added_token> tokens;
    std::unordered_map<int, std::size_t> place;  // in `tokens`, by id
    std::string renumbered;
    for (const node& a : added_) {
      added_token token;
      token.content = a.at("content").text();
      token.special = a.at("special").boolean_or(false);
      token.normalized = a.at("normalized").boolean_or(false);
      token.single_word = a.at("single_word").boolean_or(false);
      token.lstrip = a.at("lstrip").boolean_or(false);
      token.rstrip = a.at("rstrip").boolean_or(false);
      const long long said = a.at("id").integer();
      if (said < 0) a.at("id").refuse("an integer from 0 to 4294967295");
      if (token.content.empty()) continue;  // `tokenizers` ignores it

      if (t_.ids.count(token.content) == 0) claim(token.content, next_added_id());
      token.id = t_.ids.at(token.content);
      largest_added_id_ = std::max<long long>(largest_added_id_, token.id);
      if (token.id != said && renumbered.empty()) {
        renumbered =
            token.content + " is " + std::to_string(token.id) + ", not " + std::to_string(said);
      }
      // Of a token listed twice the later options count.
      const auto [found, is_new] = place.try_emplace(token.id, tokens.size());
      if (is_new) tokens.emplace_back();
      tokens[found->second] = std::move(token);
    }
    for (added_token& token : tokens) add(std::move(token));
    t_.added.finish();
    t_.added_normalized.finish();
    if (!renumbered.empty()) {
      std::fprintf(
          stderr,
          "notice: added tokens of tokenizer.json are numbered as `tokenizers` does it, not "
          "as the file says: %s\n",
          renumbered.c_str());
    }
  }

  void add(added_token token) {
    t_.tokens[static_cast<std::size_t>(token.id)].special = token.special;
    if (token.normalized) {
      const std::size_t limit = token_limit(token.content);
      for (const normalizer& step : t_.normalizers) token.content = step(token.content, limit);
    }
    set_text(token.id, token.content);
    if (token.content.empty()) return;  // nothing is left of it that could be found
    (token.normalized ? t_.added_normalized : t_.added).add(std::move(token));
  }

  node model_;
  std::vector<node> added_;
  tokenizer_tables& t_;
  std::unordered_map<std::string, int> model_ids_;  // without added tokens
  long long id_limit_ = 0;
  long long largest_added_id_ = -1;
};

// ---- Post-processor -----------------------------------------------------------------------------

/// The tokens that a template puts in front of the text.
std::vector<int> read_template(const node& step, const tokenizer_tables& t) {
  std::vector<int> prefix;
  bool text_seen = false;
  for (const node& piece : step.at("single").list()) {
    if (!piece.at("Sequence").absent()) {
      text_seen = true;
      continue;
    }
    if (text_seen) {
      step.unsupported("post-processor TemplateProcessing with tokens behind the text");
    }
    const std::string& name = piece.at("SpecialToken").at("id").text();
    for (const node& id : step.at("special_tokens").at(name).at("ids").list()) {
      const long long value = id.integer();
      if (value < 0 || value >= static_cast<long long>(t.tokens.size())) {
        step.corrupt("post-processor: token " + name + " has id " + std::to_string(value) +
                     ", which is not in the vocabulary");
      }
      prefix.push_back(static_cast<int>(value));
    }
  }
  return prefix;
}

void read_post_processor(const node& component, tokenizer_tables& t) {
  for (const auto& [step, type] : steps_of(component, "processors")) {
    if (type == "ByteLevel") continue;  // only moves offsets
    if (type != "TemplateProcessing") step.unsupported("post-processor " + type);
    const std::vector<int> prefix = read_template(step, t);
    t.prefix.insert(t.prefix.begin(), prefix.begin(), prefix.end());
  }
}

}  // namespace

std::shared_ptr<const tokenizer_tables> read_tokenizer_json(std::string_view text,
                                                            const std::string& where) {
  auto t = std::make_shared<tokenizer_tables>();
  const json parsed = qeft::io::parse_json(text, where);
  const node document(parsed, where);
  for (const auto& [step, type] : steps_of(document.at("normalizer"), "normalizers")) {
    t->normalizers.push_back(read_normalizer(step, type));
  }
  read_pre_tokenizer(document.at("pre_tokenizer"), where, *t);
  t->decoder = read_decoder(document.at("decoder"));
  vocabulary_reader(document, *t).run();
  read_post_processor(document.at("post_processor"), *t);
  return t;
}

}  // namespace qeft_llm
