// SPDX-License-Identifier: Apache-2.0
#include "regex.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>

#include "qeft/core/status.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;

namespace {

// White_Space of Unicode and its complement, as the inside of a class. PCRE2's own \s also takes
// U+180E, which Unicode no longer counts as white space, and leaves out U+0085.
constexpr const char* spaces =
    R"(\x{9}-\x{D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F})"
    R"(\x{205F}\x{3000})";
constexpr const char* not_spaces =
    R"(\x{0}-\x{8}\x{E}-\x{1F}\x{21}-\x{84}\x{86}-\x{9F}\x{A1}-\x{167F}\x{1681}-\x{1FFF})"
    R"(\x{200B}-\x{2027}\x{202A}-\x{202E}\x{2030}-\x{205E}\x{2060}-\x{2FFF}\x{3001}-\x{10FFFF})";

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_ascii_punctuation(char c) {
  return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') ||
         (c >= '{' && c <= '~');
}
bool one_of(char c, std::string_view set) { return set.find(c) != std::string_view::npos; }

/// Oniguruma's pattern for PCRE2. Only constructs known to mean the same are let through.
class translator {
 public:
  translator(std::string_view pattern, const std::string& where) : p_(pattern), where_(where) {}

  std::string run() {
    while (at_ < p_.size()) {
      const char c = p_[at_];
      if (c == '\\') {
        escape();
      } else if (in_class_) {
        if (c == '[') refuse("a [ inside a class");
        if (rest("&&")) refuse("the class operator &&");
        if (c == ']') in_class_ = false;
        copy(1);
      } else if (c == '[') {
        open_class();
      } else if (c == '(') {
        open_group();
      } else if (c == '{') {
        repeat();
      } else {
        if (one_of(c, "^$")) refuse(std::string("the anchor ") + c);
        copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  bool rest(std::string_view prefix) const { return p_.substr(at_, prefix.size()) == prefix; }

  void copy(std::size_t count) {
    out_ += p_.substr(at_, count);
    at_ += count;
  }

  [[noreturn]] void refuse(const std::string& what) const {
    fail(errc::unsupported, where_ + ": the pattern " + std::string(p_) + " uses " + what +
                                ", which is not supported");
  }

  void escape() {
    const char kind = at_ + 1 < p_.size() ? p_[at_ + 1] : '\0';
    if (kind == 's' || kind == 'S') {
      const std::string inside = kind == 's' ? spaces : not_spaces;
      out_ += in_class_ ? inside : '[' + inside + ']';
      at_ += 2;
    } else if (kind == 'p' || kind == 'P') {
      // Only general categories such as {L} or {Lu}: scripts have changed their meaning in PCRE2.
      const std::size_t end = p_.find('}', at_);
      const std::string_view name =
          rest(std::string{'\\', kind, '{'}) && end != std::string_view::npos
              ? p_.substr(at_ + 3, end - at_ - 3)
              : std::string_view();
      if (name.empty() || name.size() > 2 || !one_of(name[0], "LMNPSZC") ||
          (name.size() == 2 && !(name[1] >= 'a' && name[1] <= 'z'))) {
        refuse("a property that is not a general category");
      }
      copy(end + 1 - at_);
    } else if (rest("\\x{")) {
      const std::size_t end = p_.find('}', at_);
      if (end == std::string_view::npos) refuse("\\x{ without }");
      copy(end + 1 - at_);
    } else if (one_of(kind, "dDrntf") || is_ascii_punctuation(kind)) {
      copy(2);
    } else {
      refuse(std::string("the escape \\") + kind);
    }
  }

  void open_class() {
    copy(rest("[^") ? 2 : 1);
    if (rest("]")) refuse("an empty class");
    in_class_ = true;
  }

  void open_group() {
    if (rest("(*")) refuse("(*");
    if (rest("(?")) {
      for (const std::string_view kind : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"}) {
        if (rest(kind)) return copy(kind.size());
      }
      refuse("the group " + std::string(p_.substr(at_, 4)));
    }
    copy(1);
  }

  /// {n}, {n,} or {n,m}. A + or ? behind one means something else in Oniguruma.
  void repeat() {
    std::size_t end = at_ + 1;
    while (end < p_.size() && (is_digit(p_[end]) || p_[end] == ',')) ++end;
    if (end >= p_.size() || p_[end] != '}' || !is_digit(p_[at_ + 1]))
      refuse("a { that is no count");
    if (end + 1 < p_.size() && one_of(p_[end + 1], "+?")) refuse("a + or ? behind a count");
    copy(end + 1 - at_);
  }

  std::string_view p_;
  const std::string& where_;
  std::size_t at_ = 0;
  bool in_class_ = false;
  std::string out_;
};

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> message{};
  pcre2_get_error_message(code, message.data(), message.size());
  return reinterpret_cast<const char*>(message.data());
}

}  // namespace

regex::regex(std::string_view pattern, const std::string& where) {
  const std::string translated = translator(pattern, where).run();
  int error = 0;
  PCRE2_SIZE at = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()),
                                   translated.size(), PCRE2_UTF | PCRE2_UCP, &error, &at, nullptr);
  if (code == nullptr) {
    fail(errc::unsupported,
         where + ": the pattern " + std::string(pattern) + ": " + pcre2_message(error));
  }
  code_.reset(code, [](pcre2_code* c) { pcre2_code_free(c); });
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is no JIT, the interpreter matches
}

std::string regex::literal(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (is_ascii_punctuation(c)) out += '\\';
    out += c;
  }
  return out;
}

regex::matcher::matcher(const regex& r)
    : code_(r.code_), match_data_(pcre2_match_data_create(1, nullptr), [](pcre2_match_data* m) {
        pcre2_match_data_free(m);
      }) {}

bool regex::matcher::find(std::string_view s, std::size_t from, range& found) {
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  auto* data = static_cast<pcre2_match_data*>(match_data_.get());
  const auto match = [&](std::uint32_t options) {
    return pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(s.data()), s.size(), from,
                       PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY | options, data, nullptr);
  };
  int result = match(0);
  if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = match(PCRE2_NO_JIT);
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result < 0) {
    fail(errc::unsupported, "tokenizer: splitting the text: " + pcre2_message(result));
  }
  const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(data);
  found = {offsets[0], offsets[1]};
  return true;
}

}  // namespace qeft_llm
