// SPDX-License-Identifier: Apache-2.0
// Directories that appear complete or not at all: filled beside their destination, then renamed.
#pragma once

#include <filesystem>
#include <string>
#include <utility>

#include "qeft/io/atomic_file.hpp"

namespace qeft::io {

/// A directory under construction. Unless commit() succeeds, the destructor removes what was
/// written. Nothing that exists is ever overwritten.
class atomic_directory {
 public:
  /// Creates a directory of a new name beside `path`, which must not exist or be an empty
  /// directory; else throws errc::io_error naming it. Missing parents are created.
  explicit atomic_directory(const std::filesystem::path& path) {
    std::error_code failure;
    path_ = std::filesystem::absolute(path, failure).lexically_normal();  // fails for ""
    if (!path_.has_filename()) path_ = path_.parent_path();               // "name/"
    const bool is_new = !exists(std::filesystem::symlink_status(path_, failure));
    const bool is_empty = !std::filesystem::is_symlink(path_, failure) &&
                          std::filesystem::is_directory(path_, failure) &&
                          std::filesystem::is_empty(path_, failure);
    if (path_.empty() || !(is_new || is_empty)) {
      fail(errc::io_error,
           "cannot write directory '" + path.string() + "': it must not exist yet, or be empty");
    }
    std::filesystem::create_directories(path_.parent_path(), failure);
    do {
      partial_ = path_;
      partial_ += "." + detail::unique_suffix() + ".partial";
    } while (!failure && !std::filesystem::create_directory(partial_, failure));
    if (failure) {
      fail(errc::io_error, "cannot create " + partial_.string() + ": " + failure.message());
    }
  }
  atomic_directory(const atomic_directory&) = delete;
  atomic_directory& operator=(const atomic_directory&) = delete;
  ~atomic_directory() {
    std::error_code ignored;
    if (!committed_) std::filesystem::remove_all(partial_, ignored);
  }

  /// Where the contents go.
  const std::filesystem::path& partial() const noexcept { return partial_; }

  /// Moves the directory to its destination.
  void commit() {
    std::error_code failure;
    std::filesystem::rename(partial_, path_, failure);
    if (failure) {
      fail(errc::io_error, "cannot rename " + partial_.string() + " to " + path_.string() + ": " +
                               failure.message());
    }
    committed_ = true;
  }

 private:
  std::filesystem::path path_;
  std::filesystem::path partial_;
  bool committed_ = false;
};

}  // namespace qeft::io
