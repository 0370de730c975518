// SPDX-License-Identifier: Apache-2.0
// Strict JSON input: errors say which file, and a key given twice is an error.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "qeft/io/errors.hpp"
#include "qeft/io/mapped_file.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// Parses UTF-8 text; throws errc::corrupt_file, with `where` in front, for anything but one JSON
/// value in which no object names a key twice and nothing is nested deeper than 64 (printing and
/// destroying a value is recursive: a hostile file could exhaust the stack).
inline nlohmann::json parse_json(std::string_view text, const std::string& where) {
  using event = nlohmann::json::parse_event_t;
  std::vector<std::unordered_set<std::string>> keys;  // of the objects being parsed
  constexpr int most_depth = 64;
  const auto check = [&](int depth, event e, nlohmann::json& parsed) {
    if (depth > most_depth) {
      fail_corrupt(where, "nested deeper than " + std::to_string(most_depth));
    }
    if (e == event::object_start) keys.emplace_back();
    if (e == event::object_end) keys.pop_back();
    if (e == event::key && !keys.back().insert(parsed.get<std::string>()).second) {
      fail_corrupt(where, "the key '" + parsed.get<std::string>() + "' appears twice");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::exception& e) {
    fail_corrupt(where, std::string("not valid JSON: ") + e.what());
  }
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
