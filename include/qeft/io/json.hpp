// SPDX-License-Identifier: Apache-2.0
// JSON input: errors say which file, a key given twice is an error, and what Python's json module
// writes beyond the standard is understood.
#pragma once

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "qeft/io/errors.hpp"
#include "qeft/io/mapped_file.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

namespace detail {

// Noncharacters of Unicode, which no text holds: what Python writes and JSON does not have is
// passed through the parser behind them.
inline constexpr std::string_view surrogate_mark = "\xEF\xB7\x90";  // U+FDD0, then 4 hex digits
inline constexpr std::string_view literal_mark = "\xEF\xB7\x91";    // U+FDD1, then the literal

struct python_literal {
  std::string_view text;
  double value;
};
inline constexpr python_literal python_literals[] = {
    {"NaN", std::numeric_limits<double>::quiet_NaN()},
    {"Infinity", std::numeric_limits<double>::infinity()},
    {"-Infinity", -std::numeric_limits<double>::infinity()}};

/// The value of "\uXXXX" at the start of `text`, or -1.
inline int escaped_unit(std::string_view text) noexcept {
  if (text.size() < 6 || text[0] != '\\' || text[1] != 'u') return -1;
  int value = 0;
  for (const char c : text.substr(2, 4)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
    if (digit < 0) return -1;
    value = 16 * value + digit;
  }
  return value;
}

/// Copies a text piece by piece, once the first piece changes.
class rewritten_text {
 public:
  explicit rewritten_text(std::string_view text) : text_(text) {}
  /// `size` bytes at `at` become `with`.
  void replace(std::size_t at, std::size_t size, std::string_view with) {
    copy_.append(text_.substr(done_, at - done_)).append(with);
    done_ = at + size;
  }
  std::string_view finish() {
    if (done_ == 0) return text_;
    copy_.append(text_.substr(done_));
    return copy_;
  }

 private:
  std::string_view text_;
  std::string copy_;
  std::size_t done_ = 0;
};

/// Replaces lone surrogates in strings and Python's literals outside of them by marked text.
inline void mark_python(std::string_view text, rewritten_text& out) {
  bool in_string = false;
  for (std::size_t at = 0; at < text.size();) {
    const std::string_view rest = text.substr(at);
    std::size_t size = 1;
    if (rest[0] == '"') {
      in_string = !in_string;
    } else if (in_string && rest[0] == '\\') {
      const int unit = escaped_unit(rest);
      size = unit < 0 ? 2 : 6;
      if (unit >= 0xd800 && unit < 0xe000) {
        const int next = unit < 0xdc00 ? escaped_unit(rest.substr(6)) : -1;
        if (next >= 0xdc00 && next < 0xe000) {
          size = 12;
        } else {
          out.replace(at, 6, std::string(surrogate_mark).append(rest.substr(2, 4)));
        }
      }
    } else if (!in_string && (rest[0] == 'N' || rest[0] == 'I' || rest[0] == '-')) {
      for (const python_literal& literal : python_literals) {
        if (rest.substr(0, literal.text.size()) != literal.text) continue;
        size = literal.text.size();
        out.replace(at, size, "\"" + std::string(literal_mark).append(literal.text) + "\"");
      }
    }
    at += size;
  }
}

/// Builds a value from the parser's events. (nlohmann's own builder with a callback takes time
/// proportional to the square of the number of an object's members.)
class json_builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit json_builder(const std::string& where) : where_(where) {}
  nlohmann::json& result() noexcept { return root_; }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t&) override { return add(value); }
  bool string(string_t& value) override {
    if (value.compare(0, literal_mark.size(), literal_mark) == 0) {
      for (const python_literal& literal : python_literals) {
        if (value.compare(literal_mark.size(), std::string::npos, literal.text) == 0) {
          return add(literal.value);
        }
      }
    }
    return add(std::move(value));
  }
  bool binary(binary_t& value) override { return add(std::move(value)); }
  bool start_object(std::size_t) override { return open(nlohmann::json::object()); }
  bool start_array(std::size_t) override { return open(nlohmann::json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (name.compare(0, literal_mark.size(), literal_mark) == 0) {
      fail_corrupt(where_, "not valid JSON: a key must be a string, not " +
                               name.substr(literal_mark.size()));
    }
    const auto [member, is_new] =
        open_.back()->get_ref<nlohmann::json::object_t&>().emplace(std::move(name), nullptr);
    if (!is_new) fail_corrupt(where_, "the key '" + member->first + "' appears twice");
    member_ = &member->second;
    return true;
  }
  bool parse_error(std::size_t, const std::string&,
                   const nlohmann::json::exception& problem) override {
    fail_corrupt(where_, std::string("not valid JSON: ") + problem.what());
  }

 private:
  template <class Value>
  bool add(Value&& value) {
    place(nlohmann::json(std::forward<Value>(value)));
    return true;
  }
  nlohmann::json* place(nlohmann::json&& value) {
    nlohmann::json* const parent = open_.empty() ? nullptr : open_.back();
    nlohmann::json* at = member_;
    if (parent == nullptr) {
      at = &root_;
    } else if (parent->is_array()) {
      parent->push_back(nullptr);
      at = &parent->back();
    }
    *at = std::move(value);
    return at;
  }
  bool open(nlohmann::json&& container) {
    constexpr std::size_t most_depth = 64;
    if (open_.size() == most_depth) {
      fail_corrupt(where_, "nested deeper than " + std::to_string(most_depth));
    }
    open_.push_back(place(std::move(container)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& where_;
  nlohmann::json root_;
  std::vector<nlohmann::json*> open_;
  nlohmann::json* member_ = nullptr;  // waits for its value
};

/// Numbers that JSON does not have become marked strings.
inline void mark_not_finite(nlohmann::json& value) {
  if (value.is_structured()) {
    for (nlohmann::json& inner : value) mark_not_finite(inner);
  } else if (value.is_number_float()) {
    const auto number = value.get<double>();
    if (std::isfinite(number)) return;
    const std::size_t literal = std::isnan(number) ? 0 : number > 0 ? 1 : 2;
    value = std::string(literal_mark).append(python_literals[literal].text);
  }
}

}  // namespace detail

/// Parses UTF-8 text in time proportional to n log n; throws errc::corrupt_file, with `where` in
/// front, for anything but one JSON value in which no object names a key twice and nothing is
/// nested deeper than 64 (printing and destroying a value is recursive: a hostile file could
/// exhaust the stack). NaN, Infinity and -Infinity become such numbers; a lone surrogate in a
/// string becomes text that has_lone_surrogate() knows. Whoever needs the value has to refuse them,
/// as json_fields does.
inline nlohmann::json parse_json(std::string_view text, const std::string& where) {
  detail::rewritten_text rewritten(text);
  detail::mark_python(text, rewritten);
  const std::string_view json = rewritten.finish();
  detail::json_builder builder(where);
  nlohmann::json::sax_parse(json.begin(), json.end(), &builder);
  return std::move(builder.result());
}

/// Whether a string of parse_json holds what no UTF-8 text can.
inline bool has_lone_surrogate(std::string_view text) noexcept {
  return text.find(detail::surrogate_mark) != std::string_view::npos;
}

/// The counterpart of parse_json, as Python's json module would write it: also numbers that are not
/// finite and lone surrogates come back. Throws errc::invalid_argument for strings that are not
/// UTF-8.
/// @param indent spaces per level; -1 for one line
inline std::string dump_json(nlohmann::json value, int indent = -1) {
  detail::mark_not_finite(value);
  std::string text;
  try {
    text = value.dump(indent);
  } catch (const nlohmann::json::exception& e) {
    fail(errc::invalid_argument, std::string("a string is not UTF-8: ") + e.what());
  }
  detail::rewritten_text out(text);
  const std::string_view view = text;
  for (std::size_t at = 0; (at = view.find("\xEF\xB7", at)) != std::string_view::npos; at += 2) {
    if (view.substr(at, 3) == detail::surrogate_mark) out.replace(at, 3, "\\u");
    if (view.substr(at, 3) != detail::literal_mark || at == 0 || view[at - 1] != '"') continue;
    const std::size_t end = view.find('"', at);
    out.replace(at - 1, end - at + 2, view.substr(at + 3, end - at - 3));
  }
  return std::string(out.finish());
}

/// Reads a JSON file whose top level is an object.
inline nlohmann::json load_json(const std::filesystem::path& path) {
  const mapped_file file(path);
  nlohmann::json parsed = parse_json({reinterpret_cast<const char*>(file.bytes().data()),
                                      static_cast<std::size_t>(file.bytes().size())},
                                     path.string());
  if (!parsed.is_object()) fail_corrupt(path.string(), "must hold a JSON object");
  return parsed;
}

}  // namespace QEFT_TARGET
}  // namespace qeft::io
