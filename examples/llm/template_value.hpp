// SPDX-License-Identifier: Apache-2.0
// The values that a chat template computes with.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace qeft_llm {

/// Text of which every byte is known to come from a message or from the template: what a message
/// says must not be taken for a special token.
struct marked_text {
  std::string text;
  std::string marks;  // as long as text; 1 for a byte of a message, else 0

  static marked_text plain(std::string_view s) {
    return {std::string(s), std::string(s.size(), '\0')};
  }
  static marked_text message(std::string_view s) {
    return {std::string(s), std::string(s.size(), '\1')};
  }

  std::size_t size() const noexcept { return text.size(); }
  bool has_message() const noexcept { return marks.find('\1') != std::string::npos; }
  marked_text substr(std::size_t from, std::size_t count = std::string::npos) const {
    return {text.substr(from, count), marks.substr(from, count)};
  }
  marked_text& operator+=(const marked_text& other) {
    text += other.text;
    marks += other.marks;
    return *this;
  }
};

struct template_value;
using value_list = std::vector<template_value>;
using value_entries = std::vector<std::pair<std::string, template_value>>;  // in order

struct undefined_value {
  std::string name;
};
struct none_value {};
struct mapping_value {
  std::shared_ptr<value_entries> entries;
};

/// Lists and mappings are shared, as in Python.
struct template_value : std::variant<undefined_value, none_value, bool, long long, marked_text,
                                     std::shared_ptr<value_list>, mapping_value> {
  using variant::variant;
};

}  // namespace qeft_llm
