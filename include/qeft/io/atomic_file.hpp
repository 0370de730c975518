// SPDX-License-Identifier: Apache-2.0
// Files that appear complete or not at all: written beside their destination, then renamed.
#pragma once

#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "qeft/core/memory.hpp"
#include "qeft/io/errors.hpp"
#include "qeft/io/mapped_file.hpp"
#include "qeft/io/notice.hpp"
#include "qeft/io/path_lock.hpp"
#include "qeft/io/platform.hpp"
#include "qeft/io/unfinished.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

namespace detail {

/// What stands between the name of a destination and "-N.tmp" or ".partial".
inline constexpr const char* unfinished_mark = ".unfinished";

/// Whether `text` is one or more digits.
inline bool is_digits(std::string_view text) noexcept {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string_view::npos;
}

/// Removes what killed processes left of `path`; what a living one writes there stays.
inline void remove_stale_files(const std::filesystem::path& path) {
  std::error_code failure;  // then creating the file says why
  const std::string prefix = path.filename().string() + unfinished_mark + "-";
  const auto directory = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  for (std::filesystem::directory_iterator at(directory, failure), end; !failure && at != end;
       at.increment(failure)) {
    const std::string name = at->path().filename().string();
    if (name.rfind(prefix, 0) != 0 || at->path().extension() != ".tmp" ||
        !is_digits(std::string_view(name).substr(prefix.size(), name.size() - prefix.size() - 4))) {
      continue;
    }
    path_lock lock;
    std::error_code ignored;
    if (lock.try_acquire(at->path()) == 0 && std::filesystem::remove(at->path(), ignored)) {
      notice("removed " + at->path().string() + ", which an interrupted run left");
    }
  }
}

}  // namespace detail

/// A file under construction. Unless commit() succeeds, the destructor removes what was written and
/// an existing file at the destination stays as it was. Every failure throws errc::io_error with
/// the destination and the reason.
class atomic_file {
 public:
  /// Creates a temporary file in the directory of `path`, after removing those that killed
  /// processes left of the same destination.
  explicit atomic_file(std::filesystem::path path) : path_(std::move(path)) {
    // Renaming over a device or a directory is never what the caller means.
    std::error_code ignored;
    const auto found = std::filesystem::status(path_, ignored);
    if (std::filesystem::exists(found) && !std::filesystem::is_regular_file(found)) {
      fail(errc::io_error, "cannot write " + path_.string() + ": exists and is not a regular file");
    }
    detail::remove_stale_files(path_);
    constexpr int most_writers = 100;  // at the same time, of one destination
    for (int i = 0; i < most_writers && file_ == nullptr; ++i) {
      std::filesystem::path temporary = path_;
      temporary += detail::unfinished_mark + ("-" + std::to_string(i)) + ".tmp";
      if (!create(temporary) && errno != EEXIST) break;
    }
    if (file_ == nullptr) fail_io("cannot write", path_);
  }
  atomic_file(const atomic_file&) = delete;
  atomic_file& operator=(const atomic_file&) = delete;
  ~atomic_file() {
    if (file_ != nullptr) std::fclose(file_);
  }

  /// Appends.
  void write(span<const std::byte> bytes) {
    const auto size = static_cast<std::size_t>(bytes.size());
    if (size != 0 && std::fwrite(bytes.data(), 1, size, file_) != size) {
      fail_io("cannot write", path_);
    }
  }
  void write(std::string_view text) {
    write({reinterpret_cast<const std::byte*>(text.data()), static_cast<index_t>(text.size())});
  }

  /// Replaces bytes already written, `offset` bytes from the start; nothing may be appended after.
  void overwrite(long offset, std::string_view text) {
    if (std::fseek(file_, offset, SEEK_SET) != 0) fail_io("cannot write", path_);
    write(text);
  }

  /// Flushes to the disk and moves the file to its destination.
  void commit() {
    bool good = std::fflush(file_) == 0;
#if defined(QEFT_HAS_POSIX_FILES)
    good = good && ::fsync(::fileno(file_)) == 0;
#endif
    const int flush_error = errno;
    const bool closed = std::fclose(file_) == 0;  // may report what fflush could not know
    const int close_error = errno;
    file_ = nullptr;
    if (!good) fail_io("cannot write", path_, flush_error);
    if (!closed) fail_io("cannot write", path_, close_error);
    std::error_code code;
    entry_->resolve([&](const detail::unfinished_output& output) {
      std::filesystem::rename(output.path, path_, code);
      return !code;
    });
    if (code) fail(errc::io_error, "cannot write " + path_.string() + ": " + code.message());
  }

 private:
  /// Opens and locks a new file; false, with errno set, where that name is taken or cannot be.
  bool create(const std::filesystem::path& temporary) {
    file_ = std::fopen(temporary.string().c_str(), "wbx");
    if (file_ == nullptr) return false;
    entry_.emplace(detail::unfinished_output{temporary});
#if defined(QEFT_HAS_POSIX_FILES)
    // A process that looks for leftovers may have taken it for one before it was locked. Without
    // locks on this file system nobody can lock it to remove it either.
    const int code = lock_.try_acquire(::fileno(file_), temporary);
    if (code == ENOENT || code == EWOULDBLOCK) {
      std::fclose(file_);
      file_ = nullptr;
      entry_->resolve([](const detail::unfinished_output&) { return true; });  // it is not ours
      errno = EEXIST;
      return false;
    }
#endif
    return true;
  }

  std::filesystem::path path_;
  path_lock lock_;  // while it is held, nobody takes the temporary file for a leftover
  std::optional<detail::unfinished_entry> entry_;
  std::FILE* file_ = nullptr;
};

/// Writes a whole text or JSON file.
inline void write_text_file(const std::filesystem::path& path, std::string_view text) {
  atomic_file file(path);
  file.write(text);
  file.commit();
}

/// Copies a file (a tokenizer, for example) byte for byte.
inline void copy_file(const std::filesystem::path& from, const std::filesystem::path& to) {
  const mapped_file source(from);
  atomic_file file(to);
  file.write(source.bytes());
  file.commit();
}

}  // namespace QEFT_TARGET
}  // namespace qeft::io
