// SPDX-License-Identifier: Apache-2.0
// Files that appear complete or not at all: written beside their destination, then renamed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <string>
#include <string_view>

#include "qeft/core/memory.hpp"
#include "qeft/io/errors.hpp"
#include "qeft/io/mapped_file.hpp"
#include "qeft/io/platform.hpp"

namespace qeft::io {

namespace detail {

/// Differs from call to call, also between processes, almost surely.
inline std::string unique_suffix() {
  static std::atomic<unsigned> counter{0};
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  return std::to_string(now) + "-" + std::to_string(counter++);
}

}  // namespace detail

/// A file under construction. Unless commit() succeeds, the destructor removes what was written and
/// an existing file at the destination stays as it was. Every failure throws errc::io_error with
/// the destination and the reason.
class atomic_file {
 public:
  /// Creates a temporary file in the directory of `path`.
  explicit atomic_file(std::filesystem::path path) : path_(std::move(path)) {
    // Renaming over a device or a directory is never what the caller means.
    std::error_code ignored;
    const auto found = std::filesystem::status(path_, ignored);
    if (std::filesystem::exists(found) && !std::filesystem::is_regular_file(found)) {
      fail(errc::io_error, "cannot write " + path_.string() + ": exists and is not a regular file");
    }
    constexpr int attempts = 100;  // names left behind by killed processes
    for (int i = 0; i < attempts && file_ == nullptr; ++i) {
      temporary_ = path_;
      temporary_ += "." + detail::unique_suffix() + ".tmp";
      file_ = std::fopen(temporary_.string().c_str(), "wbx");
      if (file_ == nullptr && errno != EEXIST) break;
    }
    if (file_ == nullptr) fail_io("cannot write", path_);
  }
  atomic_file(const atomic_file&) = delete;
  atomic_file& operator=(const atomic_file&) = delete;
  ~atomic_file() {
    if (file_ != nullptr) std::fclose(file_);
    if (!committed_) {
      std::error_code ignored;
      std::filesystem::remove(temporary_, ignored);
    }
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
    std::filesystem::rename(temporary_, path_, code);
    if (code) fail(errc::io_error, "cannot write " + path_.string() + ": " + code.message());
    committed_ = true;
  }

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  std::FILE* file_ = nullptr;
  bool committed_ = false;
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

}  // namespace qeft::io
