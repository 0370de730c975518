// SPDX-License-Identifier: Apache-2.0
// Helpers of the file tests: a directory that disappears, hand-made safetensors files, error
// capture.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "qeft/core/status.hpp"

namespace qeft_test {

class temporary_directory {
 public:
  temporary_directory() {
    static std::atomic<unsigned> counter{0};
    const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
    path_ = std::filesystem::temp_directory_path() /
            ("qeft-test-" + std::to_string(now) + "-" + std::to_string(counter++));
    std::filesystem::create_directory(path_);
  }
  temporary_directory(const temporary_directory&) = delete;
  temporary_directory& operator=(const temporary_directory&) = delete;
  ~temporary_directory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

  /// Names of the files in it, ascending.
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& e : std::filesystem::directory_iterator(path_)) {
      names.push_back(e.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  }

 private:
  std::filesystem::path path_;
};

inline std::string read_all(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_all(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// A safetensors file with this header text, as it is, and these data.
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string prefix(8, '\0');
  std::memcpy(prefix.data(), &length, 8);
  return prefix + header + data;
}

/// Code and message of the qeft::error that `action` throws; errc::ok when it throws nothing. Any
/// other exception escapes and fails the test.
struct caught {
  qeft::errc code = qeft::errc::ok;
  std::string message;
};
template <class Action>
caught catch_error(Action&& action) {
  try {
    action();
  } catch (const qeft::error& e) {
    return {e.code(), e.what()};
  }
  return {};
}

}  // namespace qeft_test
