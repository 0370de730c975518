// SPDX-License-Identifier: Apache-2.0
// An exclusive lock on a file or directory that the system drops when the process dies.
#pragma once

#include <cerrno>
#include <filesystem>
#include <utility>

#include "qeft/io/platform.hpp"

#if defined(QEFT_HAS_POSIX_FILES)
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace qeft::io {
inline namespace QEFT_TARGET {

/// Tells an unfinished output whose writer lives from one whose writer was killed. Movable.
class path_lock {
 public:
  path_lock() = default;
  path_lock(path_lock&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  path_lock& operator=(path_lock&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~path_lock() { release(); }

#if defined(QEFT_HAS_POSIX_FILES)
  /// Does not wait, and does not follow a symbolic link: names of leftovers can be foreseen.
  /// @return 0 when held; EWOULDBLOCK when another holder lives, in this process or another; ENOENT
  ///         when nothing is at `path`, or no longer what was locked; else the errno of open or
  ///         flock, as on file systems without locks
  int try_acquire(const std::filesystem::path& path) {
    return hold(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK), path);
  }
  /// The same for a file that is open; it may be closed afterwards.
  int try_acquire(int open_file, const std::filesystem::path& path) {
    return hold(::fcntl(open_file, F_DUPFD_CLOEXEC, 0), path);
  }
  void release() noexcept {
    if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
  }

 private:
  int hold(int descriptor, const std::filesystem::path& path) {
    release();
    if (descriptor < 0) return errno;
    descriptor_ = descriptor;
    struct stat locked {};
    struct stat found {};
    int code = ::flock(descriptor, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
    // Its last holder may have renamed or removed it before it let go.
    if (code == 0 && (::fstat(descriptor, &locked) != 0 || ::lstat(path.c_str(), &found) != 0 ||
                      locked.st_dev != found.st_dev || locked.st_ino != found.st_ino)) {
      code = ENOENT;
    }
    if (code != 0) release();
    return code;
  }
#else
  int try_acquire(const std::filesystem::path&) { return 0; }
  void release() noexcept {}

 private:
#endif

  int descriptor_ = -1;
};

}  // namespace QEFT_TARGET
}  // namespace qeft::io
