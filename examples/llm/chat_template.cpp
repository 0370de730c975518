// SPDX-License-Identifier: Apache-2.0
#include "chat_template.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <ctime>
#include <functional>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>

#include "qeft/core/status.hpp"
#include "qeft/io/json.hpp"
#include "qeft/io/json_fields.hpp"
#include "qeft/io/mapped_file.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;

// ---- The parsed template ------------------------------------------------------------------------

/// A statement or an expression; what children and text are depends on the kind.
struct template_node {
  enum kind_type {
    // statements
    text,       // text
    output,     // [expression]
    block,      // statements
    condition,  // [expression, then-block, else-block]
    loop,       // names; [list, filter or null, body, else-block]
    assign,     // names (one, or object and attribute); [expression]
    capture,    // names; [block]
    leave,      // break
    proceed,    // continue
    // expressions
    literal,    // value
    name,       // text
    attribute,  // text; [object]
    item,       // [object, index]
    slice,      // [object, first, last, step], each but the object may be null
    call,       // [function, arguments...]; names: of the arguments, "" for positional ones
    filter,     // text; [operand, arguments...]; names as above
    test,       // text; [operand, arguments...]
    unary,      // text; [operand]
    binary,     // text; [left, right]
    choice,     // [condition, then, else or null]
    list,       // [items...]
    mapping,    // [key, value, key, value...]
  };

  kind_type kind = block;
  int line = 0;
  std::string text_;
  std::vector<std::string> names;
  template_value value;
  std::vector<std::unique_ptr<template_node>> children;

  const template_node& child(std::size_t i) const { return *children[i]; }
  bool has(std::size_t i) const { return i < children.size() && children[i] != nullptr; }
};

namespace {

using node = template_node;
using node_ptr = std::unique_ptr<template_node>;

/// What errors begin with, and the limits that keep hostile templates from hanging.
class reporter {
 public:
  explicit reporter(const std::string& where) : where_(where) {}
  [[noreturn]] void unsupported(int line, const std::string& what) const {
    fail(errc::unsupported, where_ + ": line " + std::to_string(line) + ": " + what);
  }
  [[noreturn]] void refuse(int line, const std::string& what) const {
    fail(errc::invalid_argument, where_ + ": line " + std::to_string(line) + ": " + what);
  }

 private:
  const std::string& where_;
};

// ---- Lexer --------------------------------------------------------------------------------------

struct piece {
  enum kind_type { text, output, statement } kind;
  std::string content;  // without delimiters
  int line;
};

bool is_blank(char c) { return c == ' ' || c == '\t'; }
bool is_white(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

/// \n for \r\n and \r, as jinja2 reads templates.
std::string with_newlines(const std::string& source) {
  std::string text;
  for (std::size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n') continue;
    text += source[i] == '\r' ? '\n' : source[i];
  }
  return text;
}

/// Cuts a template into text and tags, white space control applied.
std::vector<piece> cut(std::string source, const reporter& report) {
  source = with_newlines(source);
  if (!source.empty() && source.back() == '\n') source.pop_back();

  std::vector<piece> pieces;
  int line = 1;
  std::size_t at = 0;
  bool strip_next = false;    // behind -%}
  bool newline_next = false;  // behind %}: trim_blocks
  while (true) {
    std::size_t tag = at;
    do {
      tag = source.find('{', tag);
    } while (tag != std::string::npos &&
             (tag + 1 >= source.size() || !std::strchr("{%#", source[tag + 1])) && ++tag != 0);
    std::string text = source.substr(at, tag == std::string::npos ? tag : tag - at);
    const int text_line = line;
    line += static_cast<int>(std::count(text.begin(), text.end(), '\n'));
    const bool starts_line_before =
        pieces.empty() || newline_next || (at > 0 && source[at - 1] == '\n');
    if (strip_next) {
      text.erase(0, static_cast<std::size_t>(std::find_if_not(text.begin(), text.end(), is_white) -
                                             text.begin()));
    } else if (newline_next && !text.empty() && text[0] == '\n') {
      text.erase(0, 1);
    }
    if (tag == std::string::npos) {
      if (!text.empty()) pieces.push_back({piece::text, text, text_line});
      return pieces;
    }

    const char kind = source[tag + 1];
    const char control = tag + 2 < source.size() ? source[tag + 2] : '\0';
    if (control == '-') {
      while (!text.empty() && is_white(text.back())) text.pop_back();
    } else if (kind != '{' && control != '+') {  // lstrip_blocks
      std::size_t begin = text.size();
      while (begin > 0 && is_blank(text[begin - 1])) --begin;
      const bool whole_line =
          begin > 0 ? text[begin - 1] == '\n'
                    : starts_line_before && !strip_next &&
                          (at == 0 || source[tag - (text.size() - begin) - 1] == '\n');
      if (whole_line) text.erase(begin);
    }
    if (!text.empty()) pieces.push_back({piece::text, text, text_line});

    const std::string close = kind == '{' ? "}}" : kind == '%' ? "%}" : "#}";
    std::size_t body = tag + 2 + (control == '-' || control == '+' ? 1 : 0);
    std::size_t end = body;
    if (kind == '#') {
      end = source.find(close, body);
    } else {  // a delimiter inside of a string does not count
      char quote = '\0';
      int braces = 0;
      for (; end < source.size(); ++end) {
        const char c = source[end];
        if (quote != '\0') {
          if (c == '\\')
            ++end;
          else if (c == quote)
            quote = '\0';
        } else if (c == '\'' || c == '"') {
          quote = c;
        } else if (braces == 0 && source.compare(end, 2, close) == 0) {
          break;
        } else if (c == '{') {
          ++braces;
        } else if (c == '}') {
          --braces;
        }
      }
      if (end >= source.size()) end = std::string::npos;
    }
    if (end == std::string::npos) report.unsupported(line, "a tag is not closed");
    std::string content = source.substr(body, end - body);
    const int tag_line = line;
    line += static_cast<int>(std::count(content.begin(), content.end(), '\n'));
    const char last = content.empty() ? '\0' : content.back();
    strip_next = last == '-';
    newline_next = kind != '{' && last != '-' && last != '+';
    if (last == '-' || last == '+') content.pop_back();
    if (kind != '#') {
      pieces.push_back({kind == '{' ? piece::output : piece::statement, content, tag_line});
    }
    at = end + 2;
  }
}

struct token {
  enum kind_type { end, name, number, string, symbol } kind = end;
  std::string text;
};

std::vector<token> tokens_of(const piece& p, const reporter& report) {
  const std::string& s = p.content;
  std::vector<token> tokens;
  std::size_t at = 0;
  while (true) {
    while (at < s.size() && is_white(s[at])) ++at;
    if (at == s.size()) break;
    const auto c = static_cast<unsigned char>(s[at]);
    std::size_t end = at + 1;
    if (std::isalpha(c) != 0 || c == '_') {
      while (end < s.size() &&
             (std::isalnum(static_cast<unsigned char>(s[end])) || s[end] == '_')) {
        ++end;
      }
      tokens.push_back({token::name, s.substr(at, end - at)});
    } else if (std::isdigit(c) != 0) {
      while (end < s.size() && std::isdigit(static_cast<unsigned char>(s[end]))) ++end;
      if (end < s.size() && s[end] == '.') report.unsupported(p.line, "a fraction");
      if (end - at > 15) report.unsupported(p.line, "a number of more than 15 digits");
      tokens.push_back({token::number, s.substr(at, end - at)});
    } else if (c == '\'' || c == '"') {
      std::string text;
      for (; end < s.size() && s[end] != s[at]; ++end) {
        if (s[end] != '\\') {
          text += s[end];
          continue;
        }
        const char escaped = ++end < s.size() ? s[end] : '\0';
        const char* known = "nrt\\'\"";
        const char* found = escaped == '\0' ? nullptr : std::strchr(known, escaped);
        if (found == nullptr) report.unsupported(p.line, std::string("the escape \\") + escaped);
        text += "\n\r\t\\'\""[found - known];
      }
      ++end;
      tokens.push_back({token::string, text});
    } else {
      const std::string two = s.substr(at, 2);
      for (const char* symbol : {"==", "!=", "<=", ">=", "//", "**"}) {
        if (two == symbol) end = at + 2;
      }
      if (!std::strchr("=!<>+-*/%~|.,:()[]{}", s[at])) {
        report.unsupported(p.line, std::string("the character ") + s[at]);
      }
      tokens.push_back({token::symbol, s.substr(at, end - at)});
    }
    at = end;
  }
  tokens.push_back({});
  return tokens;
}

// ---- Parser -------------------------------------------------------------------------------------

bool one_of(const std::string& s, std::initializer_list<const char*> all) {
  return std::any_of(all.begin(), all.end(), [&](const char* x) { return s == x; });
}

bool known_filter(const std::string& s) {
  return one_of(s, {"trim",       "tojson",  "length", "count",      "upper",      "lower", "title",
                    "capitalize", "default", "d",      "first",      "last",       "join",  "list",
                    "string",     "replace", "items",  "selectattr", "rejectattr", "safe"});
}
bool known_test(const std::string& s) {
  return one_of(
      s, {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number",
          "integer", "boolean", "true", "false", "odd", "even", "equalto", "eq", "ne", "in"});
}

class parser {
 public:
  parser(std::vector<piece> pieces, const reporter& report)
      : pieces_(std::move(pieces)), report_(report) {}

  node_ptr run() {
    node_ptr root = parse_block({});
    if (next_ < pieces_.size()) report_.unsupported(line(), "{% " + word_ + " %} without a start");
    return root;
  }

 private:
  static constexpr int most_depth = 100;

  struct guard {
    guard(parser& p) : p_(p) {
      if (++p_.depth_ > most_depth) p_.unsupported("such deep nesting");
    }
    ~guard() { --p_.depth_; }
    parser& p_;
  };

  int line() const { return next_ < pieces_.size() ? pieces_[next_].line : last_line_; }
  [[noreturn]] void unsupported(const std::string& what) const {
    report_.unsupported(last_line_, what + " is not supported");
  }

  node_ptr make(node::kind_type kind, std::string text = {}) const {
    auto n = std::make_unique<node>();
    n->kind = kind;
    n->line = last_line_;
    n->text_ = std::move(text);
    return n;
  }
  template <class... Children>
  node_ptr make_of(node::kind_type kind, std::string text, Children... children) const {
    node_ptr n = make(kind, std::move(text));
    (n->children.push_back(std::move(children)), ...);
    return n;
  }

  void open(const piece& p) {
    last_line_ = p.line;
    tokens_ = tokens_of(p, report_);
    at_ = 0;
  }
  const token& peek(std::size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  bool is_symbol(const char* s) const { return peek().kind == token::symbol && peek().text == s; }
  bool is_name(const char* s) const { return peek().kind == token::name && peek().text == s; }
  bool take(const char* s) {
    if (!is_symbol(s) && !is_name(s)) return false;
    ++at_;
    return true;
  }
  void expect(const char* s) {
    if (!take(s)) report_.unsupported(last_line_, std::string("expected ") + s + " " + near());
  }
  std::string near() const {
    return peek().kind == token::end ? "at the end of the tag" : "at " + peek().text;
  }
  std::string take_name() {
    if (peek().kind != token::name) report_.unsupported(last_line_, "expected a name " + near());
    return tokens_[at_++].text;
  }
  void expect_end() {
    if (peek().kind != token::end) report_.unsupported(last_line_, "unexpected " + peek().text);
  }

  /// Statements until one of `ends`, whose tag is opened behind its first word, which is word_.
  node_ptr parse_block(std::initializer_list<const char*> ends) {
    const guard g(*this);
    node_ptr all = make(node::block);
    for (; next_ < pieces_.size(); ++next_) {
      const piece& p = pieces_[next_];
      last_line_ = p.line;
      if (p.kind == piece::text) {
        all->children.push_back(make(node::text, p.content));
        continue;
      }
      open(p);
      if (p.kind == piece::output) {
        all->children.push_back(make_of(node::output, "", parse_expression()));
        expect_end();
        continue;
      }
      word_ = take_name();
      if (one_of(word_, ends)) return all;
      if (word_.compare(0, 3, "end") == 0 || one_of(word_, {"else", "elif"})) return all;
      all->children.push_back(parse_statement());
    }
    return all;
  }

  void close(const char* end) {
    if (next_ >= pieces_.size() || word_ != end) {
      report_.unsupported(line(), std::string("{% ") + end + " %} is missing");
    }
    expect_end();
  }

  node_ptr parse_statement() {
    const std::string word = word_;
    if (word == "if") return parse_if();
    if (word == "for") return parse_for();
    if (word == "set") return parse_set();
    if (word == "break" || word == "continue") {
      expect_end();
      return make(word == "break" ? node::leave : node::proceed);
    }
    if (word == "generation") {  // marks what an assistant said, for training
      expect_end();
      ++next_;
      node_ptr body = parse_block({"endgeneration"});
      close("endgeneration");
      return body;
    }
    unsupported("the statement {% " + word + " %}");
  }

  node_ptr parse_if() {
    node_ptr condition = parse_or();  // Jinja takes no `a if b` here
    expect_end();
    ++next_;
    node_ptr then = parse_block({"elif", "else", "endif"});
    node_ptr n = make_of(node::condition, "", std::move(condition), std::move(then));
    if (word_ == "elif" && next_ < pieces_.size()) {
      const guard g(*this);
      n->children.push_back(parse_if());
      return n;
    }
    if (word_ == "else" && next_ < pieces_.size()) {
      expect_end();
      ++next_;
      n->children.push_back(parse_block({"endif"}));
    } else {
      n->children.push_back(nullptr);
    }
    close("endif");
    return n;
  }

  node_ptr parse_for() {
    node_ptr n = make(node::loop);
    do {
      n->names.push_back(take_name());
    } while (take(","));
    expect("in");
    n->children.push_back(parse_or());
    n->children.push_back(take("if") ? parse_expression() : nullptr);
    if (is_name("recursive")) unsupported("a recursive loop");
    expect_end();
    ++next_;
    n->children.push_back(parse_block({"else", "endfor"}));
    if (word_ == "else" && next_ < pieces_.size()) {
      expect_end();
      ++next_;
      n->children.push_back(parse_block({"endfor"}));
    } else {
      n->children.push_back(nullptr);
    }
    close("endfor");
    return n;
  }

  node_ptr parse_set() {
    std::vector<std::string> target = {take_name()};
    if (take(".")) target.push_back(take_name());
    if (is_symbol(",")) unsupported("{% set %} of several names");
    node_ptr n;
    if (take("=")) {
      n = make_of(node::assign, "", parse_expression());
      expect_end();
    } else {
      expect_end();
      ++next_;
      n = make_of(node::capture, "", parse_block({"endset"}));
      close("endset");
    }
    n->names = std::move(target);
    return n;
  }

  // Expressions, from the loosest binding to the tightest.

  node_ptr parse_expression() {
    const guard g(*this);
    node_ptr value = parse_or();
    while (take("if")) {
      node_ptr condition = parse_or();
      node_ptr otherwise = take("else") ? parse_expression() : nullptr;
      value =
          make_of(node::choice, "", std::move(condition), std::move(value), std::move(otherwise));
    }
    return value;
  }

  template <class Operand>
  node_ptr parse_binary(std::initializer_list<const char*> operators, const Operand& operand) {
    node_ptr left = operand();
    while (true) {
      const char* found = nullptr;
      for (const char* o : operators) {
        if (found == nullptr && take(o)) found = o;
      }
      if (found == nullptr) return left;
      left = make_of(node::binary, found, std::move(left), operand());
    }
  }

  node_ptr parse_or() {
    return parse_binary({"or"}, [&] { return parse_binary({"and"}, [&] { return parse_not(); }); });
  }
  node_ptr parse_not() {
    const guard g(*this);
    if (is_name("not") && !(peek(1).kind == token::name && peek(1).text == "in")) {
      ++at_;
      return make_of(node::unary, "not", parse_not());
    }
    return parse_comparison();
  }
  node_ptr parse_comparison() {
    node_ptr left = parse_sum();
    bool chained = false;
    while (true) {
      std::string found;
      for (const char* o : {"==", "!=", "<=", ">=", "<", ">", "in"}) {
        if (found.empty() && take(o)) found = o;
      }
      if (found.empty() && is_name("not") && peek(1).text == "in") {
        at_ += 2;
        found = "not in";
      }
      if (found.empty()) return left;
      if (chained) unsupported("a chain of comparisons");
      chained = true;
      left = make_of(node::binary, found, std::move(left), parse_sum());
    }
  }
  node_ptr parse_sum() {
    return parse_binary({"+", "-"}, [&] {
      return parse_binary({"~"}, [&] {
        return parse_binary({"*", "//", "/", "%"}, [&] { return parse_unary(); });
      });
    });
  }
  node_ptr parse_unary() {
    const guard g(*this);
    if (take("-")) return make_of(node::unary, "-", parse_unary());
    if (is_symbol("**")) unsupported("the operator **");
    node_ptr value = parse_postfix(parse_primary());
    return parse_filters(std::move(value));
  }

  node_ptr parse_primary() {
    const token t = peek();
    ++at_;
    if (t.kind == token::string) {
      node_ptr n = make(node::literal);
      std::string text = t.text;
      while (peek().kind == token::string) text += tokens_[at_++].text;  // as Python joins them
      n->value = marked_text::plain(text);
      return n;
    }
    if (t.kind == token::number) {
      node_ptr n = make(node::literal);
      n->value = std::stoll(t.text);
      return n;
    }
    if (t.kind == token::name) {
      if (one_of(t.text, {"true", "True", "false", "False"})) {
        node_ptr n = make(node::literal);
        n->value = t.text == "true" || t.text == "True";
        return n;
      }
      if (one_of(t.text, {"none", "None"})) {
        node_ptr n = make(node::literal);
        n->value = none_value{};
        return n;
      }
      return make(node::name, t.text);
    }
    if (t.kind == token::symbol && t.text == "(") {
      node_ptr inside = parse_expression();
      if (is_symbol(",")) unsupported("a tuple");
      expect(")");
      return inside;
    }
    if (t.kind == token::symbol && t.text == "[") {
      node_ptr n = make(node::list);
      while (!take("]")) {
        n->children.push_back(parse_expression());
        if (!is_symbol("]")) expect(",");
      }
      return n;
    }
    if (t.kind == token::symbol && t.text == "{") {
      node_ptr n = make(node::mapping);
      while (!take("}")) {
        n->children.push_back(parse_expression());
        expect(":");
        n->children.push_back(parse_expression());
        if (!is_symbol("}")) expect(",");
      }
      return n;
    }
    --at_;
    report_.unsupported(last_line_, "expected a value " + near());
  }

  node_ptr parse_postfix(node_ptr value) {
    while (true) {
      if (take(".")) {
        value = make_of(node::attribute, take_name(), std::move(value));
      } else if (take("[")) {
        value = parse_subscript(std::move(value));
      } else if (is_symbol("(")) {
        node_ptr n = make_of(node::call, "", std::move(value));
        parse_arguments(*n);
        value = std::move(n);
      } else {
        return value;
      }
    }
  }

  node_ptr parse_subscript(node_ptr object) {
    std::array<node_ptr, 3> parts;
    std::size_t part = 0;
    bool is_slice = false;
    while (!is_symbol("]")) {
      if (take(":")) {
        is_slice = true;
        if (++part == 3) unsupported("a slice of four parts");
      } else {
        parts[part] = parse_expression();
        if (!is_symbol(":") && !is_symbol("]")) expect("]");
      }
    }
    expect("]");
    if (is_slice) {
      return make_of(node::slice, "", std::move(object), std::move(parts[0]), std::move(parts[1]),
                     std::move(parts[2]));
    }
    if (!parts[0]) unsupported("an empty subscript");
    return make_of(node::item, "", std::move(object), std::move(parts[0]));
  }

  /// (a, b, name=c), added to the children of a call, filter or test.
  void parse_arguments(node& n) {
    n.names.assign(n.children.size(), "");
    expect("(");
    while (!take(")")) {
      const bool named =
          peek().kind == token::name && peek(1).kind == token::symbol && peek(1).text == "=";
      n.names.push_back(named ? take_name() : "");
      if (named) expect("=");
      n.children.push_back(parse_expression());
      if (!is_symbol(")")) expect(",");
    }
  }

  node_ptr parse_filters(node_ptr value) {
    while (true) {
      if (take("|")) {
        node_ptr n = make_of(node::filter, take_name(), std::move(value));
        if (!known_filter(n->text_)) unsupported("the filter " + n->text_);
        if (is_symbol("(")) parse_arguments(*n);
        value = parse_postfix(std::move(n));
      } else if (take("is")) {
        const bool negated = take("not");
        node_ptr n = make_of(node::test, take_name(), std::move(value));
        if (!known_test(n->text_)) unsupported("the test " + n->text_);
        if (is_symbol("(")) {
          parse_arguments(*n);
        } else if (one_of(n->text_, {"equalto", "eq", "ne", "in"})) {
          n->children.push_back(parse_postfix(parse_primary()));
        }
        value = negated ? make_of(node::unary, "not", std::move(n)) : std::move(n);
      } else {
        return value;
      }
    }
  }

  std::vector<piece> pieces_;
  const reporter& report_;
  std::size_t next_ = 0;  // the piece being read
  std::string word_;      // the first of the last statement
  std::vector<token> tokens_;
  std::size_t at_ = 0;
  int last_line_ = 1;
  int depth_ = 0;
};

// ---- Values -------------------------------------------------------------------------------------

template <class T>
const T* get(const template_value& v) {
  return std::get_if<T>(static_cast<const template_value::variant*>(&v));
}
const marked_text* text_in(const template_value& v) { return get<marked_text>(v); }
const value_list* list_in(const template_value& v) {
  const auto* p = get<std::shared_ptr<value_list>>(v);
  return p == nullptr ? nullptr : p->get();
}
value_entries* mapping_in(const template_value& v) {
  const auto* p = get<mapping_value>(v);
  return p == nullptr ? nullptr : p->entries.get();
}
template_value make_list(value_list all) { return std::make_shared<value_list>(std::move(all)); }
template_value make_text(const std::string& s) { return marked_text::plain(s); }

bool truthy(const template_value& v) {
  if (const auto* b = get<bool>(v)) return *b;
  if (const auto* n = get<long long>(v)) return *n != 0;
  if (const auto* t = text_in(v)) return !t->text.empty();
  if (const auto* l = list_in(v)) return !l->empty();
  if (const auto* m = mapping_in(v)) return !m->empty();
  return false;
}

std::optional<long long> number_in(const template_value& v) {
  if (const auto* n = get<long long>(v)) return *n;
  if (const auto* b = get<bool>(v)) return *b ? 1 : 0;
  return std::nullopt;
}

bool equal(const template_value& a, const template_value& b) {
  if (const auto x = number_in(a), y = number_in(b); x && y) return *x == *y;
  if (a.index() != b.index()) return false;
  if (const auto* t = text_in(a)) return t->text == text_in(b)->text;
  if (const auto* l = list_in(a)) {
    return std::equal(l->begin(), l->end(), list_in(b)->begin(), list_in(b)->end(), equal);
  }
  if (const auto* m = mapping_in(a)) {
    const auto* o = mapping_in(b);
    return m->size() == o->size() && std::all_of(m->begin(), m->end(), [&](const auto& x) {
             return std::any_of(o->begin(), o->end(), [&](const auto& y) {
               return x.first == y.first && equal(x.second, y.second);
             });
           });
  }
  return true;  // none, undefined
}

const char* type_of(const template_value& v) {
  constexpr std::array<const char*, 7> names = {"undefined", "none",   "a boolean", "a number",
                                                "a string",  "a list", "a mapping"};
  return names[v.index()];
}

marked_text stripped(const marked_text& t, const std::string& what, bool left, bool right) {
  const auto gone = [&](char c) {
    return what.empty() ? is_white(c) : what.find(c) != std::string::npos;
  };
  std::size_t begin = 0;
  std::size_t end = t.size();
  while (left && begin < end && gone(t.text[begin])) ++begin;
  while (right && end > begin && gone(t.text[end - 1])) --end;
  return t.substr(begin, end - begin);
}

// ---- Execution ----------------------------------------------------------------------------------

class executor {
 public:
  executor(const reporter& report, value_entries globals) : report_(report) {
    scopes_.push_back(std::move(globals));
  }

  marked_text run(const node& root) {
    scopes_.emplace_back();
    if (execute(root) != flow::normal) report_.unsupported(root.line, "a break outside of a loop");
    return std::move(out_);
  }

 private:
  enum class flow { normal, leave, proceed };
  static constexpr std::size_t most_bytes = std::size_t{1} << 28U;
  static constexpr long long most_steps = 10000000;

  void count_steps(const node& n, std::size_t steps = 1) {
    steps_ += static_cast<long long>(steps);
    if (steps_ > most_steps) report_.unsupported(n.line, "it does not come to an end");
  }
  void check_size(const node& n, const marked_text& t) const {
    if (t.size() > most_bytes) report_.unsupported(n.line, "the text is too long");
  }
  void put(const node& n, const marked_text& t) {
    out_ += t;
    check_size(n, out_);
  }

  flow execute(const node& n) {
    count_steps(n);
    switch (n.kind) {
      case node::text:
        put(n, marked_text::plain(n.text_));
        break;
      case node::output:
        put(n, to_text(n, evaluate(n.child(0))));
        break;
      case node::block:
        for (const node_ptr& statement : n.children) {
          if (const flow f = execute(*statement); f != flow::normal) return f;
        }
        break;
      case node::condition:
        if (truthy(evaluate(n.child(0)))) return execute(n.child(1));
        if (n.has(2)) return execute(n.child(2));
        break;
      case node::loop:
        execute_loop(n);
        break;
      case node::assign:
        assign(n, evaluate(n.child(0)));
        break;
      case node::capture: {
        marked_text outside = std::exchange(out_, {});
        const flow f = execute(n.child(0));
        assign(n, std::exchange(out_, std::move(outside)));
        return f;
      }
      case node::leave:
        return flow::leave;
      case node::proceed:
        return flow::proceed;
      default:
        report_.unsupported(n.line, "an expression as statement");
    }
    return flow::normal;
  }

  void assign(const node& n, template_value v) {
    value_entries* into = &scopes_.back();
    if (n.names.size() == 2) {
      into = mapping_in(find(n.names[0]));
      if (into == nullptr) report_.unsupported(n.line, n.names[0] + " is no namespace");
    }
    check_nesting(n, v, into);
    put_entry(*into, n.names.back(), std::move(v));
  }

  /// Values are compared, printed and destroyed recursively: what is kept is neither deep nor part
  /// of itself.
  void check_nesting(const node& n, const template_value& v, const value_entries* into,
                     int depth = 0) {
    constexpr int most_depth = 64;
    count_steps(n);
    if (depth > most_depth || mapping_in(v) == into) {
      report_.unsupported(n.line, "a value of such deep nesting is not supported");
    }
    if (const auto* l = list_in(v)) {
      for (const template_value& x : *l) check_nesting(n, x, into, depth + 1);
    } else if (const auto* m = mapping_in(v)) {
      for (const auto& entry : *m) check_nesting(n, entry.second, into, depth + 1);
    }
  }

  static void put_entry(value_entries& into, const std::string& name, template_value v) {
    const auto found =
        std::find_if(into.begin(), into.end(), [&](const auto& e) { return e.first == name; });
    if (found != into.end()) {
      found->second = std::move(v);
    } else {
      into.emplace_back(name, std::move(v));
    }
  }

  template_value find(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      for (const auto& [key, v] : *scope) {
        if (key == name) return v;
      }
    }
    return undefined_value{name};
  }

  /// What a for loop runs over.
  value_list items_of(const node& n, const template_value& v) const {
    if (const auto* l = list_in(v)) return *l;
    value_list all;
    if (const auto* m = mapping_in(v)) {
      for (const auto& entry : *m) all.push_back(make_text(entry.first));
      return all;
    }
    if (get<undefined_value>(v) != nullptr) return all;
    report_.unsupported(n.line, std::string("a loop over ") + type_of(v) + " is not supported");
  }

  void bind(const node& n, const template_value& item) {
    value_entries& scope = scopes_.back();
    if (n.names.size() == 1) return put_entry(scope, n.names[0], item);
    const auto* parts = list_in(item);
    if (parts == nullptr || parts->size() != n.names.size()) {
      report_.unsupported(
          n.line, "a loop over items that are not " + std::to_string(n.names.size()) + " values");
    }
    for (std::size_t i = 0; i < parts->size(); ++i) put_entry(scope, n.names[i], (*parts)[i]);
  }

  void execute_loop(const node& n) {
    value_list items = items_of(n, evaluate(n.child(0)));
    scopes_.emplace_back();
    if (n.has(1)) {
      value_list kept;
      for (const template_value& item : items) {
        bind(n, item);
        if (truthy(evaluate(n.child(1)))) kept.push_back(item);
      }
      items = std::move(kept);
    }
    for (std::size_t i = 0; i < items.size(); ++i) {
      scopes_.back().clear();
      const auto index = static_cast<long long>(i);
      const auto length = static_cast<long long>(items.size());
      const auto neighbour = [&](std::size_t at) {
        return at < items.size() ? items[at] : template_value(undefined_value{"item"});
      };
      auto loop = std::make_shared<value_entries>();
      *loop = {{"index", index + 1},
               {"index0", index},
               {"first", i == 0},
               {"last", i + 1 == items.size()},
               {"length", length},
               {"revindex", length - index},
               {"revindex0", length - index - 1},
               {"previtem", neighbour(i - 1)},
               {"nextitem", neighbour(i + 1)}};
      put_entry(scopes_.back(), "loop", mapping_value{loop});
      bind(n, items[i]);
      if (execute(n.child(2)) == flow::leave) break;
    }
    scopes_.pop_back();
    if (items.empty() && n.has(3)) execute(n.child(3));
  }

  marked_text to_text(const node& n, const template_value& v) const {
    if (const auto* t = text_in(v)) return *t;
    if (get<undefined_value>(v) != nullptr) return {};
    if (get<none_value>(v) != nullptr) return marked_text::plain("None");
    if (const auto* b = get<bool>(v)) return marked_text::plain(*b ? "True" : "False");
    if (const auto* i = get<long long>(v)) return marked_text::plain(std::to_string(*i));
    report_.unsupported(n.line, std::string(type_of(v)) + " as text is not supported");
  }

  const marked_text& text_of(const node& n, const template_value& v, const char* what) const {
    if (const auto* t = text_in(v)) return *t;
    const auto* u = get<undefined_value>(v);
    report_.refuse(n.line, std::string(what) + " is " + type_of(v) +
                               (u != nullptr ? " (" + u->name + ")" : "") +
                               ", but must be a string");
  }
  long long number_of(const node& n, const template_value& v) const {
    const auto i = number_in(v);
    if (!i) report_.refuse(n.line, std::string(type_of(v)) + " where a number is needed");
    return *i;
  }

  /// What values take counts too, so that a short template cannot fill the memory.
  template_value evaluate(const node& n) {
    count_steps(n);
    template_value v = value_of(n);
    const bool shared = n.kind == node::name || n.kind == node::attribute || n.kind == node::item;
    if (const auto* t = text_in(v)) count_steps(n, t->size() / 64);
    if (const auto* l = list_in(v); l != nullptr && !shared) count_steps(n, l->size());
    return v;
  }

  template_value value_of(const node& n) {
    switch (n.kind) {
      case node::literal:
        return n.value;
      case node::name:
        return find(n.text_);
      case node::attribute:
        return attribute(n, evaluate(n.child(0)), n.text_);
      case node::item:
        return item(n, evaluate(n.child(0)), evaluate(n.child(1)));
      case node::slice:
        return slice(n);
      case node::call:
        return call(n);
      case node::filter:
        return filter(n);
      case node::test:
        return test(n);
      case node::unary: {
        const template_value v = evaluate(n.child(0));
        if (n.text_ == "not") return !truthy(v);
        return -number_of(n, v);
      }
      case node::binary:
        return binary(n);
      case node::choice:
        if (truthy(evaluate(n.child(0)))) return evaluate(n.child(1));
        return n.has(2) ? evaluate(n.child(2)) : template_value(undefined_value{"else"});
      case node::list: {
        value_list all;
        for (const node_ptr& c : n.children) all.push_back(evaluate(*c));
        return make_list(std::move(all));
      }
      case node::mapping: {
        auto all = std::make_shared<value_entries>();
        for (std::size_t i = 0; i < n.children.size(); i += 2) {
          const template_value key = evaluate(n.child(i));
          put_entry(*all, text_of(n, key, "a key").text, evaluate(n.child(i + 1)));
        }
        return mapping_value{all};
      }
      default:
        report_.unsupported(n.line, "a statement as expression");
    }
  }

  template_value attribute(const node& n, const template_value& object, const std::string& name) {
    if (const auto* u = get<undefined_value>(object)) {
      report_.refuse(n.line, "'" + u->name + "' is undefined, but ." + name + " of it is used");
    }
    if (const auto* m = mapping_in(object)) {
      for (const auto& [key, v] : *m) {
        if (key == name) return v;
      }
    }
    return undefined_value{name};
  }

  template_value item(const node& n, const template_value& object, const template_value& index) {
    if (const auto* key = text_in(index)) return attribute(n, object, key->text);
    const long long i = number_of(n, index);
    const auto at = [&](std::size_t size) {
      const long long from_start = i < 0 ? i + static_cast<long long>(size) : i;
      return from_start < 0 ? size : std::min(size, static_cast<std::size_t>(from_start));
    };
    if (const auto* l = list_in(object)) {
      const std::size_t place = at(l->size());
      return place < l->size() ? (*l)[place] : template_value(undefined_value{"an item"});
    }
    if (const auto* t = text_in(object)) {
      require_ascii(n, *t);
      const std::size_t place = at(t->size());
      return place < t->size() ? template_value(t->substr(place, 1))
                               : template_value(undefined_value{"a character"});
    }
    if (get<undefined_value>(object) != nullptr) return attribute(n, object, std::to_string(i));
    return undefined_value{"an item"};
  }

  /// Positions in a string count characters, not bytes.
  void require_ascii(const node& n, const marked_text& t) const {
    if (std::any_of(t.text.begin(), t.text.end(), [](char c) { return (c & 0x80) != 0; })) {
      report_.unsupported(n.line, "positions in a string that is not ASCII are not supported");
    }
  }

  template_value slice(const node& n) {
    const template_value object = evaluate(n.child(0));
    std::array<std::optional<long long>, 3> part;
    for (std::size_t i = 0; i < 3; ++i) {
      if (!n.has(i + 1)) continue;
      const template_value v = evaluate(n.child(i + 1));
      if (get<none_value>(v) == nullptr) part[i] = number_of(n, v);
    }
    const auto* l = list_in(object);
    const auto* t = text_in(object);
    if (l == nullptr && t == nullptr) {
      report_.refuse(n.line, std::string("a slice of ") + type_of(object));
    }
    if (t != nullptr) require_ascii(n, *t);
    const long long step = part[2].value_or(1);
    if (step != 1 && !(step == -1 && l != nullptr && !part[0] && !part[1])) {
      report_.unsupported(n.line, "a slice with a step is not supported");
    }
    if (step == -1) return make_list({l->rbegin(), l->rend()});
    const auto size = static_cast<long long>(l != nullptr ? l->size() : t->size());
    const auto place = [&](long long i) { return std::clamp(i < 0 ? i + size : i, 0LL, size); };
    const long long first = place(part[0].value_or(0));
    const long long last = std::max(first, place(part[1].value_or(size)));
    if (l != nullptr) return make_list({l->begin() + first, l->begin() + last});
    return t->substr(static_cast<std::size_t>(first), static_cast<std::size_t>(last - first));
  }

  template_value binary(const node& n) {
    const std::string& o = n.text_;
    template_value left = evaluate(n.child(0));
    if (o == "and") return truthy(left) ? evaluate(n.child(1)) : left;
    if (o == "or") return truthy(left) ? left : evaluate(n.child(1));
    const template_value right = evaluate(n.child(1));
    if (o == "==") return equal(left, right);
    if (o == "!=") return !equal(left, right);
    if (o == "in") return contains(n, right, left);
    if (o == "not in") return !contains(n, right, left);
    const marked_text* a = text_in(left);
    const marked_text* b = text_in(right);
    if (o == "~") {
      marked_text joined = to_text(n, left);
      joined += to_text(n, right);
      return joined;
    }
    if (o == "+" && a != nullptr && b != nullptr) {
      marked_text joined = *a;
      joined += *b;
      return joined;
    }
    if (o == "+" && list_in(left) != nullptr && list_in(right) != nullptr) {
      value_list joined = *list_in(left);
      joined.insert(joined.end(), list_in(right)->begin(), list_in(right)->end());
      return make_list(std::move(joined));
    }
    if (o == "+" && (a != nullptr || b != nullptr)) {
      text_of(n, a != nullptr ? right : left, "one side of +");
    }
    if (one_of(o, {"<", ">", "<=", ">="}) && a != nullptr && b != nullptr) {
      return compare(o, a->text.compare(b->text), 0);
    }
    return arithmetic(n, number_of(n, left), number_of(n, right));
  }

  static template_value compare(const std::string& o, long long x, long long y) {
    return o == "<" ? x < y : o == ">" ? x > y : o == "<=" ? x <= y : x >= y;
  }

  template_value arithmetic(const node& n, long long x, long long y) const {
    const std::string& o = n.text_;
    if (one_of(o, {"<", ">", "<=", ">="})) return compare(o, x, y);
    constexpr long long limit = 1LL << 31;
    if (x > limit || x < -limit || y > limit || y < -limit) {
      report_.unsupported(n.line, "numbers as large are not supported");
    }
    if (o == "+") return x + y;
    if (o == "-") return x - y;
    if (o == "*") return x * y;
    if (o == "/") report_.unsupported(n.line, "the operator / is not supported");
    if (y == 0) report_.refuse(n.line, "a division by zero");
    const long long remainder = ((x % y) + y) % y;  // has the sign of y, as in Python
    return o == "%" ? remainder : (x - remainder) / y;
  }

  bool contains(const node& n, const template_value& in, const template_value& what) {
    if (const auto* t = text_in(in)) {
      return t->text.find(text_of(n, what, "what is looked for").text) != std::string::npos;
    }
    if (const auto* l = list_in(in)) {
      return std::any_of(l->begin(), l->end(), [&](const auto& v) { return equal(v, what); });
    }
    if (const auto* m = mapping_in(in)) {
      const auto* key = text_in(what);
      return key != nullptr &&
             std::any_of(m->begin(), m->end(), [&](const auto& e) { return e.first == key->text; });
    }
    report_.refuse(n.line, std::string("'in' needs a string, list or mapping, not ") + type_of(in));
  }
  // Arguments of calls, filters and tests: children behind the first.

  std::optional<template_value> argument(const node& n, std::size_t place, const char* name) {
    std::size_t seen = 0;
    for (std::size_t i = 1; i < n.children.size(); ++i) {
      const bool positional = i >= n.names.size() || n.names[i].empty();
      if (positional ? seen++ == place : n.names[i] == name) return evaluate(n.child(i));
    }
    return std::nullopt;
  }
  marked_text text_argument(const node& n, std::size_t place, const char* name) {
    const auto v = argument(n, place, name);
    if (!v) report_.unsupported(n.line, std::string("the argument ") + name + " is missing");
    return text_of(n, *v, name);
  }

  template_value call(const node& n) {
    const node& function = n.child(0);
    if (function.kind == node::attribute) {
      const template_value object = evaluate(function.child(0));
      if (const auto* t = text_in(object)) return method(n, *t, function.text_);
      if (mapping_in(object) != nullptr) return method(n, object, function.text_);
      report_.refuse(n.line, "the method ." + function.text_ + "() of " + type_of(object));
    }
    if (function.kind != node::name) report_.unsupported(n.line, "a call of an expression");
    const std::string& name = function.text_;
    if (name == "raise_exception") {
      fail_by_template(text_argument(n, 0, "message").text);
    }
    if (name == "namespace" || name == "dict") {
      auto all = std::make_shared<value_entries>();
      for (std::size_t i = 1; i < n.children.size(); ++i) {
        if (n.names[i].empty()) report_.unsupported(n.line, name + "() of another mapping");
        put_entry(*all, n.names[i], evaluate(n.child(i)));
      }
      return mapping_value{all};
    }
    if (name == "range") return range(n);
    if (name == "strftime_now") return now(text_argument(n, 0, "format").text);
    report_.unsupported(n.line, "the function " + name + "() is not supported");
  }

  [[noreturn]] void fail_by_template(const std::string& message) const {
    fail(errc::invalid_argument, "the chat template refuses these messages: " + message);
  }

  template_value range(const node& n) {
    long long first = 0;
    long long last = 0;
    const auto a = argument(n, 0, "first");
    const auto b = argument(n, 1, "last");
    if (!a || argument(n, 2, "step")) report_.unsupported(n.line, "this form of range()");
    (b ? first : last) = number_of(n, *a);
    if (b) last = number_of(n, *b);
    if (last - first > 100000) report_.unsupported(n.line, "a range as long is not supported");
    value_list all;
    for (long long i = first; i < last; ++i) all.emplace_back(i);
    return make_list(std::move(all));
  }

  static template_value now(const std::string& format) {
    const std::time_t seconds = std::time(nullptr);
    const std::tm* local = std::localtime(&seconds);
    std::array<char, 256> text{};
    const std::size_t size = std::strftime(text.data(), text.size(), format.c_str(), local);
    return make_text(std::string(text.data(), size));
  }

  template_value method(const node& n, const marked_text& t, const std::string& name) {
    if (one_of(name, {"strip", "lstrip", "rstrip"})) {
      const auto what = argument(n, 0, "chars");
      return stripped(t, what ? text_of(n, *what, "chars").text : "", name != "rstrip",
                      name != "lstrip");
    }
    if (name == "startswith" || name == "endswith") {
      const std::string part = text_argument(n, 0, "prefix").text;
      return part.size() <= t.size() &&
             t.text.compare(name == "startswith" ? 0 : t.size() - part.size(), part.size(), part) ==
                 0;
    }
    if (one_of(name, {"upper", "lower", "title", "capitalize"})) return cased(n, t, name);
    if (name == "replace") {
      return replaced_text(n, t, text_argument(n, 0, "old"), text_argument(n, 1, "new"),
                           replacements(n));
    }
    if (name == "split") return split(n, t);
    report_.unsupported(n.line, "the method ." + name + "() of a string is not supported");
  }

  template_value split(const node& n, const marked_text& t) {
    const auto separator = argument(n, 0, "sep");
    if (!separator || argument(n, 1, "maxsplit")) {
      report_.unsupported(n.line, "split() without, or with more than, a separator");
    }
    const std::string by = text_of(n, *separator, "sep").text;
    if (by.empty()) report_.refuse(n.line, "split() by nothing");
    value_list parts;
    std::size_t done = 0;
    for (std::size_t at; (at = t.text.find(by, done)) != std::string::npos; done = at + by.size()) {
      parts.emplace_back(t.substr(done, at - done));
    }
    parts.emplace_back(t.substr(done));
    return make_list(std::move(parts));
  }

  /// The count of replace(), or -1 for all.
  long long replacements(const node& n) {
    const auto count = argument(n, 2, "count");
    return count ? number_of(n, *count) : -1;
  }
  template_value replaced_text(const node& n, const marked_text& t, const marked_text& from,
                               const marked_text& to, long long most) const {
    if (from.text.empty()) report_.unsupported(n.line, "replace() of nothing is not supported");
    marked_text out;
    std::size_t done = 0;
    for (std::size_t at; most != 0 && (at = t.text.find(from.text, done)) != std::string::npos;
         done = at + from.size(), --most) {
      out += t.substr(done, at - done);
      out += to;
      check_size(n, out);
    }
    out += t.substr(done);
    return out;
  }

  template_value cased(const node& n, marked_text t, const std::string& how) const {
    require_ascii(n, t);
    bool starts_word = true;
    for (std::size_t i = 0; i < t.size(); ++i) {
      const auto c = static_cast<unsigned char>(t.text[i]);
      const bool up =
          how == "upper" || (how == "title" && starts_word) || (how == "capitalize" && i == 0);
      t.text[i] = static_cast<char>(up ? std::toupper(c) : std::tolower(c));
      starts_word = std::isalpha(c) == 0;
    }
    return t;
  }

  template_value method(const node& n, const template_value& object, const std::string& name) {
    const value_entries& m = *mapping_in(object);
    if (name == "get") {
      const std::string key = text_argument(n, 0, "key").text;
      for (const auto& [k, v] : m) {
        if (k == key) return v;
      }
      return argument(n, 1, "default").value_or(none_value{});
    }
    if (name == "items") return items(m);
    if (name == "keys" || name == "values") {
      value_list all;
      for (const auto& [k, v] : m) all.push_back(name == "keys" ? make_text(k) : v);
      return make_list(std::move(all));
    }
    report_.unsupported(n.line, "the method ." + name + "() of a mapping is not supported");
  }

  static template_value items(const value_entries& m) {
    value_list all;
    for (const auto& [k, v] : m) all.push_back(make_list({make_text(k), v}));
    return make_list(std::move(all));
  }

  template_value filter(const node& n) {
    const std::string& name = n.text_;
    const template_value v = evaluate(n.child(0));
    if (name == "default" || name == "d") {
      const auto otherwise = argument(n, 0, "default_value");
      const auto falsy = argument(n, 1, "boolean");
      const bool missing =
          get<undefined_value>(v) != nullptr || (falsy && truthy(*falsy) && !truthy(v));
      return missing ? otherwise.value_or(make_text("")) : v;
    }
    if (name == "tojson") return tojson(n, v);
    if (name == "string" || name == "safe") return to_text(n, v);
    if (name == "items") {
      if (const auto* m = mapping_in(v)) return items(*m);
      report_.refuse(n.line, std::string("items of ") + type_of(v));
    }
    if (one_of(name, {"trim", "upper", "lower", "title", "capitalize", "replace"})) {
      const marked_text t = to_text(n, v);
      if (name == "trim") {
        const auto what = argument(n, 0, "chars");
        return stripped(t, what ? text_of(n, *what, "chars").text : "", true, true);
      }
      if (name != "replace") return cased(n, t, name);
      return replaced_text(n, t, text_argument(n, 0, "old"), text_argument(n, 1, "new"),
                           replacements(n));
    }
    return list_filter(n, v);
  }

  template_value list_filter(const node& n, const template_value& v) {
    const std::string& name = n.text_;
    if (name == "length" || name == "count") {
      if (const auto* t = text_in(v)) {
        return static_cast<long long>(std::count_if(t->text.begin(), t->text.end(), [](char c) {
          return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U;
        }));
      }
      return static_cast<long long>(items_of(n, v).size());
    }
    value_list all = items_of(n, v);
    if (name == "list") return make_list(std::move(all));
    if (name == "first" || name == "last") {
      if (all.empty()) return undefined_value{name};
      return name == "first" ? all.front() : all.back();
    }
    if (name == "join") {
      const auto by = argument(n, 0, "d");
      marked_text joined;
      for (std::size_t i = 0; i < all.size(); ++i) {
        if (i > 0 && by) joined += to_text(n, *by);
        joined += to_text(n, all[i]);
        check_size(n, joined);
      }
      return joined;
    }
    // selectattr, rejectattr: by truth, or by equality
    const std::string key = text_argument(n, 0, "attribute").text;
    const auto how = argument(n, 1, "test");
    const auto with = argument(n, 2, "value");
    if (how && !one_of(text_of(n, *how, "test").text, {"equalto", "eq", "=="})) {
      report_.unsupported(n.line, "the test " + text_in(*how)->text + " in " + name);
    }
    value_list kept;
    for (const template_value& x : all) {
      const template_value field = attribute(n, x, key);
      const bool good = how ? with && equal(field, *with) : truthy(field);
      if (good == (name == "selectattr")) kept.push_back(x);
    }
    return make_list(std::move(kept));
  }

  /// Python's json.dumps(ensure_ascii=False).
  template_value tojson(const node& n, const template_value& v) {
    if (n.children.size() > 1) report_.unsupported(n.line, "tojson with arguments");
    return json_text(n, v);
  }
  marked_text json_text(const node& n, const template_value& v) const {
    if (const auto* t = text_in(v)) {
      const std::string quoted =
          nlohmann::json(t->text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
      return t->has_message() ? marked_text::message(quoted) : marked_text::plain(quoted);
    }
    if (get<none_value>(v) != nullptr) return marked_text::plain("null");
    if (const auto* b = get<bool>(v)) return marked_text::plain(*b ? "true" : "false");
    if (get<undefined_value>(v) != nullptr) report_.refuse(n.line, "tojson of what is undefined");
    marked_text out;
    const char* separator = "";
    const auto next = [&] { out += marked_text::plain(std::exchange(separator, ", ")); };
    if (const auto* l = list_in(v)) {
      out = marked_text::plain("[");
      for (const template_value& x : *l) {
        next();
        out += json_text(n, x);
        check_size(n, out);
      }
      out += marked_text::plain("]");
      return out;
    }
    if (const auto* m = mapping_in(v)) {
      out = marked_text::plain("{");
      for (const auto& [key, x] : *m) {
        next();
        out += marked_text::plain(nlohmann::json(key).dump() + ": ");
        out += json_text(n, x);
        check_size(n, out);
      }
      out += marked_text::plain("}");
      return out;
    }
    return to_text(n, v);
  }

  template_value test(const node& n) {
    const std::string& name = n.text_;
    const template_value v = evaluate(n.child(0));
    const bool is_number = get<long long>(v) != nullptr;
    if (name == "defined") return get<undefined_value>(v) == nullptr;
    if (name == "undefined") return get<undefined_value>(v) != nullptr;
    if (name == "none") return get<none_value>(v) != nullptr;
    if (name == "string") return text_in(v) != nullptr;
    if (name == "mapping") return mapping_in(v) != nullptr;
    if (name == "iterable" || name == "sequence") {
      return text_in(v) != nullptr || list_in(v) != nullptr || mapping_in(v) != nullptr ||
             (name == "iterable" && get<undefined_value>(v) != nullptr);
    }
    if (name == "number" || name == "integer") {
      return is_number || (name == "number" && get<bool>(v) != nullptr);
    }
    if (name == "boolean") return get<bool>(v) != nullptr;
    if (name == "true" || name == "false") {
      return get<bool>(v) != nullptr && *get<bool>(v) == (name == "true");
    }
    if (name == "odd" || name == "even") {
      return (number_of(n, v) % 2 != 0) == (name == "odd");
    }
    const auto other = argument(n, 0, "other");
    if (!other) report_.unsupported(n.line, "the test " + name + " without an argument");
    if (name == "in") return contains(n, *other, v);
    return equal(v, *other) == (name != "ne");
  }

  const reporter& report_;
  std::vector<value_entries> scopes_;
  marked_text out_;
  long long steps_ = 0;
};

}  // namespace

chat_template::chat_template(const std::string& source, std::string where)
    : where_(std::move(where)) {
  const reporter report(where_);
  root_ = parser(cut(source, report), report).run();
}

marked_text chat_template::render(const std::vector<chat_message>& messages,
                                  const std::map<std::string, std::string>& tokens,
                                  bool answer) const {
  value_list turns;
  for (const chat_message& m : messages) {
    auto fields = std::make_shared<value_entries>();
    *fields = {{"role", marked_text::message(m.role)},
               {"content", marked_text::message(m.content)}};
    turns.emplace_back(mapping_value{fields});
  }
  value_entries globals = {{"messages", make_list(std::move(turns))},
                           {"add_generation_prompt", answer},
                           {"tools", none_value{}},
                           {"documents", none_value{}}};
  for (const auto& [name, text] : tokens) globals.emplace_back(name, make_text(text));
  const reporter report(where_);
  return executor(report, std::move(globals)).run(*root_);
}

// ---- Finding the template -----------------------------------------------------------------------

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string read_text(const fs::path& path) {
  const qeft::io::mapped_file file(path);
  return {reinterpret_cast<const char*>(file.bytes().data()),
          static_cast<std::size_t>(file.bytes().size())};
}

/// The templates of a directory by name, and where each is.
std::map<std::string, std::pair<std::string, std::string>> all_templates(const fs::path& directory,
                                                                         const json& config) {
  std::map<std::string, std::pair<std::string, std::string>> all;
  const std::string config_name = (directory / "tokenizer_config.json").string();
  const auto found = config.find("chat_template");
  if (found != config.end() && !found->is_null()) {
    if (found->is_string()) {
      all["default"] = {found->get<std::string>(), config_name + ": chat_template"};
    } else {
      const json list = found->is_array() ? *found : json::array({*found});
      for (const json& entry : list) {
        const bool good = entry.is_object() && entry.contains("name") &&
                          entry.contains("template") && entry["name"].is_string() &&
                          entry["template"].is_string();
        if (!good) {
          fail(errc::corrupt_file, config_name +
                                       ": chat_template must be a string or a list of "
                                       "{\"name\": ..., \"template\": ...}");
        }
        const auto name = entry["name"].get<std::string>();
        all[name] = {entry["template"].get<std::string>(), config_name + ": chat_template " + name};
      }
    }
  }
  const auto add_file = [&](const std::string& name, const fs::path& path) {
    all[name] = {read_text(path), path.string()};
  };
  const fs::path others = directory / "additional_chat_templates";
  if (fs::is_directory(others)) {
    for (const auto& entry : fs::directory_iterator(others)) {
      if (entry.path().extension() == ".jinja") {
        add_file(entry.path().stem().string(), entry.path());
      }
    }
  }
  const fs::path file = directory / "chat_template.jinja";
  if (fs::exists(file)) add_file("default", file);
  return all;
}

/// Adds tokens written as "text" or {"content": "text"}.
void add_tokens(const json& config, std::map<std::string, std::string>& tokens) {
  for (const char* name : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
                           "cls_token", "mask_token"}) {
    const auto found = config.find(name);
    if (found == config.end()) continue;
    const json& value =
        found->is_object() && found->contains("content") ? (*found)["content"] : *found;
    if (value.is_string()) tokens[name] = value.get<std::string>();
  }
}

}  // namespace

model_chat_template find_chat_template(const fs::path& directory, const std::string& name) {
  model_chat_template result;
  const auto load = [&](const char* file) {
    const fs::path path = directory / file;
    return fs::exists(path) ? qeft::io::load_json(path) : json::object();
  };
  const json config = load("tokenizer_config.json");
  add_tokens(load("special_tokens_map.json"), result.tokens);
  add_tokens(config, result.tokens);
  const auto all = all_templates(directory, config);
  const auto found = all.find(name.empty() ? "default" : name);
  if (found == all.end() && (!name.empty() || !all.empty())) {
    std::string names;
    for (const auto& [n, unused] : all) names += (names.empty() ? "" : ", ") + n;
    fail(errc::invalid_argument,
         directory.string() + " has no chat template named " + (name.empty() ? "default" : name) +
             (names.empty() ? std::string(", nor any other")
                            : "; choose one of its templates by name: " + names));
  }
  if (found != all.end()) std::tie(result.source, result.where) = found->second;
  return result;
}

std::vector<chat_message> read_messages(const std::string& file) {
  const json list = qeft::io::parse_json(read_text(file), file);
  if (!list.is_array() || list.empty()) {
    fail(errc::invalid_argument, file + ": must hold a list of messages, and at least one");
  }
  std::vector<chat_message> messages;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string where = file + ": message " + std::to_string(i);
    const qeft::io::json_fields fields(list[i], where);
    messages.push_back({fields.text("role"), fields.text("content")});
  }
  return messages;
}

}  // namespace qeft_llm
