// SPDX-License-Identifier: Apache-2.0
// A read-only file as one span of bytes: mapped where the system can, read into memory elsewhere.
#pragma once

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <limits>
#include <utility>
#include <vector>

#include "qeft/core/memory.hpp"
#include "qeft/io/errors.hpp"
#include "qeft/io/platform.hpp"
#include "qeft/io/unfinished.hpp"

#if defined(QEFT_HAS_POSIX_FILES)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace qeft::io {
inline namespace QEFT_TARGET {

/// Owns the mapping; movable, and moving keeps the bytes where they are. A file that is replaced by
/// rename (see atomic_file) stays readable here; one that is shortened in place does not: reading
/// what is gone raises SIGBUS, of which signal_cleanup makes a message.
class mapped_file {
 public:
  /// Throws errc::io_error when `path` is not a regular file or cannot be read.
  explicit mapped_file(const std::filesystem::path& path) {
    std::error_code code;
    const std::filesystem::file_status found = std::filesystem::status(path, code);
    if (!std::filesystem::exists(found)) {
      fail_io("cannot open", path, code ? code.value() : ENOENT);
    }
    if (!std::filesystem::is_regular_file(found)) {  // opening a pipe would block
      fail(errc::io_error, "cannot open " + path.string() + ": not a regular file");
    }
    open(path);
  }
  mapped_file(mapped_file&& other) noexcept
      : bytes_(std::exchange(other.bytes_, {})), buffer_(std::move(other.buffer_)) {}
  mapped_file& operator=(mapped_file&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(buffer_, other.buffer_);
    return *this;
  }
  ~mapped_file() { close(); }

  span<const std::byte> bytes() const noexcept { return bytes_; }

 private:
#if defined(QEFT_HAS_POSIX_FILES)
  void open(const std::filesystem::path& path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail_io("cannot open", path);
    struct stat info {};
    void* address = nullptr;
    int code = ::fstat(descriptor, &info) == 0 ? 0 : errno;
    if (code == 0 && static_cast<std::uint64_t>(info.st_size) >
                         static_cast<std::uint64_t>(std::numeric_limits<std::size_t>::max() / 2)) {
      code = EFBIG;  // of a 32-bit machine
    }
    if (code == 0 && info.st_size > 0) {
      address = ::mmap(nullptr, static_cast<std::size_t>(info.st_size), PROT_READ, MAP_PRIVATE,
                       descriptor, 0);
      if (address == MAP_FAILED) code = errno;
    }
    ::close(descriptor);
    if (code != 0) fail_io("cannot map", path, code);
    bytes_ = {static_cast<const std::byte*>(address), static_cast<index_t>(info.st_size)};
    if (bytes_.empty()) return;
    detail::process_files& all = detail::process_files::instance();
    const std::lock_guard<std::mutex> guard(all.mutex);
    all.mappings.push_back({bytes_.data(), bytes_.size(), path});
  }
  void close() noexcept {
    if (!bytes_.empty()) {
      detail::process_files& all = detail::process_files::instance();
      const std::lock_guard<std::mutex> guard(all.mutex);
      all.mappings.remove_if([&](const auto& range) { return range.begin == bytes_.data(); });
      ::munmap(const_cast<std::byte*>(bytes_.data()), static_cast<std::size_t>(bytes_.size()));
    }
  }
#else
  void open(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    buffer_.resize(file ? static_cast<std::size_t>(file.tellg()) : 0);
    file.seekg(0);
    file.read(reinterpret_cast<char*>(buffer_.data()),
              static_cast<std::streamsize>(buffer_.size()));
    if (!file) fail_io("cannot read", path);
    bytes_ = {buffer_.data(), static_cast<index_t>(buffer_.size())};
  }
  void close() noexcept {}
#endif

  span<const std::byte> bytes_;
  std::vector<std::byte> buffer_;  // of the fallback
};

/// The whole pages of `part`, bytes of a mapped_file, leave this process until they are read again:
/// so its resident set does not grow by all that it ever read. Nothing happens to other bytes.
inline void forget_pages([[maybe_unused]] span<const std::byte> part) noexcept {
#if defined(QEFT_HAS_POSIX_FILES)
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(part.data());
  const std::uintptr_t first = (begin + page - 1) / page * page;
  const std::uintptr_t last = (begin + static_cast<std::uintptr_t>(part.size())) / page * page;
  if (first >= last) return;
  detail::process_files& all = detail::process_files::instance();
  const std::lock_guard<std::mutex> guard(all.mutex);
  for (const detail::mapped_range& range : all.mappings) {
    if (part.data() < range.begin || part.data() >= range.begin + range.size) continue;
    ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }
#endif
}

}  // namespace QEFT_TARGET
}  // namespace qeft::io
