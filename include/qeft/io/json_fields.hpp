// SPDX-License-Identifier: Apache-2.0
// Typed access to the fields of a JSON object; errors name file, key, value and rule.
#pragma once

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "qeft/io/errors.hpp"
#include "qeft/io/json.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// A borrowed JSON object. A key whose value is null counts as absent.
class json_fields {
 public:
  /// @param where names the object in errors: a file, and the path to the object inside it
  json_fields(const nlohmann::json& object, std::string where)
      : object_(object), where_(std::move(where)) {
    if (!object.is_object()) fail_corrupt(where_, "must be an object, not " + dump_json(object));
  }

  const std::string& where() const noexcept { return where_; }
  const nlohmann::json& object() const noexcept { return object_; }

  /// The value of `key`, or null.
  const nlohmann::json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  bool has(const char* key) const { return find(key) != nullptr; }

  /// Throws errc::corrupt_file "<where>: <key> is <value>, but must be <rule>".
  [[noreturn]] void refuse(const char* key, const std::string& rule) const {
    const nlohmann::json* value = find(key);
    fail_corrupt(where_, std::string(key) + " is " + (value ? dump_json(*value) : "missing") +
                             ", but must be " + rule);
  }

  /// An integer in [low, high].
  index_t integer(const char* key, index_t low, index_t high) const {
    const nlohmann::json* value = find(key);
    const bool good = value != nullptr && value->is_number_integer() &&
                      (!value->is_number_unsigned() ||
                       value->get<std::uint64_t>() <=
                           static_cast<std::uint64_t>(std::numeric_limits<index_t>::max()));
    if (!good || value->get<index_t>() < low || value->get<index_t>() > high) {
      refuse(key, "an integer from " + std::to_string(low) + " to " + std::to_string(high));
    }
    return value->get<index_t>();
  }
  index_t integer_or(const char* key, index_t absent, index_t low, index_t high) const {
    return has(key) ? integer(key, low, high) : absent;
  }

  /// A finite number above 0.
  double positive(const char* key) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr || !value->is_number() || !(value->get<double>() > 0) ||
        !std::isfinite(value->get<double>())) {
      refuse(key, "a number above 0");
    }
    return value->get<double>();
  }
  double positive_or(const char* key, double absent) const {
    return has(key) ? positive(key) : absent;
  }

  bool boolean_or(const char* key, bool absent) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) refuse(key, "true or false");
    return value->get<bool>();
  }

  std::string text(const char* key) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr || !value->is_string()) refuse(key, "a string");
    if (has_lone_surrogate(value->get_ref<const std::string&>())) {
      refuse(key, "text, without half of a surrogate pair");
    }
    return value->get<std::string>();
  }
  std::string text_or(const char* key, const std::string& absent) const {
    return has(key) ? text(key) : absent;
  }

 private:
  const nlohmann::json& object_;
  std::string where_;
};

}  // namespace QEFT_TARGET
}  // namespace qeft::io
