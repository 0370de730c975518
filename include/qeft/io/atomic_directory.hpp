// SPDX-License-Identifier: Apache-2.0
// Directories that appear complete or not at all: filled elsewhere, then moved to their
// destination.
#pragma once

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "qeft/io/atomic_file.hpp"
#include "qeft/io/errors.hpp"
#include "qeft/io/notice.hpp"
#include "qeft/io/path_lock.hpp"
#include "qeft/io/platform.hpp"
#include "qeft/io/unfinished.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// What becomes of the contents that a killed run left for the same destination.
enum class leftovers { remove, reuse };

namespace detail {

/// Writes a directory's entries to the disk, as far as the system can.
inline void sync_directory(const std::filesystem::path& path) noexcept {
#if defined(QEFT_HAS_POSIX_FILES)
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return;
  ::fsync(descriptor);  // not every file system offers it; the files themselves are safe
  ::close(descriptor);
#else
  static_cast<void>(path);
#endif
}

/// Names in a directory; throws errc::io_error naming it when it cannot be read.
inline std::vector<std::filesystem::path> names_in(const std::filesystem::path& directory) {
  std::vector<std::filesystem::path> names;
  std::error_code failure;
  for (std::filesystem::directory_iterator at(directory, failure), end; !failure && at != end;
       at.increment(failure)) {
    names.push_back(at->path().filename());
  }
  if (failure) fail_io("cannot read", directory, failure.value());
  return names;
}

}  // namespace detail

/// A directory under construction. Unless commit() succeeds or keep() was called, the destructor
/// removes what was written, and the parents created for it. Nothing that exists is overwritten.
///
/// It is filled in a partial directory, whose name follows from the destination: a new destination
/// OUT has OUT.unfinished.partial beside it, which is renamed. An OUT that exists and is empty may
/// be a mount point or a symbolic link, which nothing can be renamed to: it has unfinished.partial
/// inside it, whose entries are moved up, config.json last, so that no half of a model looks like
/// one. The partial directory is locked: it tells a run that lives from one that was killed.
class atomic_directory {
 public:
  /// Opens or creates the partial directory of `path`. Everything that commit() needs is checked
  /// here, before any work. Missing parents are created.
  /// @throws errc::io_error naming `path` when it exists and is not an empty directory, when
  ///         another atomic_directory of this destination lives, in this process or another, or
  ///         when the system refuses; then nothing is left
  explicit atomic_directory(const std::filesystem::path& path, leftovers left = leftovers::remove) {
    std::error_code failure;
    path_ = std::filesystem::absolute(path, failure).lexically_normal();  // fails for ""
    if (!path_.has_filename()) path_ = path_.parent_path();               // "name/"
    const bool is_new = !exists(std::filesystem::symlink_status(path_, failure));
    in_place_ = !is_new && std::filesystem::is_directory(path_, failure);
    if (path_.empty() || !(is_new || (in_place_ && foreign_entry().empty()))) {
      fail(errc::io_error,
           "cannot write directory '" + path.string() + "': it must not exist yet, or be empty");
    }
    std::filesystem::path beside = path_;
    beside += std::string(detail::unfinished_mark) + ".partial";
    if (in_place_) {
      adopt(beside);
    } else {
      open(beside, missing_parents());
    }
    name_old_leftovers();
    use_contents(left);
  }

  /// Where the contents go.
  const std::filesystem::path& partial() const noexcept { return entry_->path(); }

  /// Whether it was opened with leftovers::reuse and holds what a killed run left.
  bool resumed() const noexcept { return resumed_; }

  /// From now on the partial directory stays when this object is destroyed without commit(), or a
  /// signal ends the process; the next run finds it. keep(false) takes that back.
  void keep(bool on = true) { entry_->keep(on); }

  /// Removes what the partial directory holds.
  void clear() {
    for (const auto& name : detail::names_in(partial())) {
      std::error_code failure;
      std::filesystem::remove_all(partial() / name, failure);
      if (failure) fail_io("cannot remove", partial() / name, failure.value());
    }
    resumed_ = false;
  }

  /// Moves the directory to its destination. When that fails, for instance because the destination
  /// is no longer empty, throws errc::io_error that says where the complete result is. It stays
  /// there, under a name that no later run takes for a leftover. To be called once.
  void commit() {
    detail::sync_directory(partial());
    std::string problem;
    entry_->resolve([&](detail::unfinished_output& output) {
      problem = in_place_ ? move_up(output.path) : rename_to_destination(output.path);
      if (!problem.empty()) set_aside(output);
      return problem.empty();
    });
    if (!problem.empty()) {
      fail(errc::io_error, "cannot move the finished result to " + path_.string() + ": " + problem +
                               "; it is complete in " + partial().string());
    }
    detail::sync_directory(in_place_ ? path_ : path_.parent_path());
  }

 private:
  static constexpr const char* inside_name = "unfinished.partial";

  /// The first entry of the destination that is not ours, or nothing.
  std::filesystem::path foreign_entry() const {
    for (auto& name : detail::names_in(path_)) {
      // Every freshly formatted ext4 volume has a lost+found.
      if (name != inside_name && name != "lost+found") return name;
    }
    return {};
  }

  /// Parents of the destination that do not exist, outermost first.
  std::vector<std::filesystem::path> missing_parents() const {
    std::vector<std::filesystem::path> missing;
    std::error_code unknown;  // then creating them says why
    for (auto p = path_.parent_path();
         p.has_relative_path() && !std::filesystem::exists(p, unknown); p = p.parent_path()) {
      missing.insert(missing.begin(), p);
    }
    return missing;
  }

  /// Creates the partial directory where there is none, locks it and registers it.
  void open(const std::filesystem::path& partial, std::vector<std::filesystem::path> parents) {
    std::vector<std::filesystem::path> created;
    std::error_code failure;
    const auto give_up = [&](const std::string& message) {
      for (auto p = created.rbegin(); p != created.rend(); ++p)
        std::filesystem::remove(*p, failure);
      fail(errc::io_error, message);
    };
    for (const auto& p : parents) {
      if (std::filesystem::create_directory(p, failure)) created.push_back(p);
      if (failure) give_up("cannot create " + p.string() + ": " + failure.message());
    }
    int code = ENOENT;
    bool fresh = false;
    // A run that ends at this moment takes the directory away.
    for (int tries = 0; code == ENOENT && tries < 100; ++tries) {
      fresh = std::filesystem::create_directory(partial, failure) || fresh;
      if (failure) give_up("cannot create " + partial.string() + ": " + failure.message());
      code = lock_.try_acquire(partial);
    }
    if (code == ENOENT) {
      if (fresh) std::filesystem::remove(partial, failure);
      give_up("cannot lock " + partial.string() + ": it keeps being removed");
    }
    if (code == EWOULDBLOCK) {
      give_up("cannot write directory '" + path_.string() +
              "': another run is writing it (it holds the lock of " + partial.string() + ")");
    }
    if (code != 0 && !fresh) {  // a file system without locks: whose it is cannot be told
      give_up("cannot write directory '" + path_.string() + "': " + partial.string() +
              " exists and cannot be locked (" + std::generic_category().message(code) +
              "); remove it if no other run is writing it");
    }
    entry_.emplace(detail::unfinished_output{partial, std::move(created)});
  }

  /// Opens the partial directory inside the destination. One that a run left beside it, when the
  /// destination did not exist, moves inside.
  void adopt(const std::filesystem::path& beside) {
    std::error_code failure;
    const std::filesystem::path inside = path_ / inside_name;
    if (std::filesystem::is_directory(std::filesystem::symlink_status(beside, failure))) {
      path_lock other;
      if (other.try_acquire(beside) == EWOULDBLOCK) {
        fail(errc::io_error, "cannot write directory '" + path_.string() +
                                 "': another run is writing it (it holds the lock of " +
                                 beside.string() + ")");
      }
      std::filesystem::rename(beside, inside, failure);
      if (failure) {  // another file system, or a directory of its own inside
        notice(beside.string() + " is left of an interrupted run; remove it");
      }
    }
    open(inside, {});
  }

  /// Earlier versions did not lock their partial directories, so that only a person can tell
  /// whether they are in use.
  void name_old_leftovers() const {
    const std::string prefix = path_.filename().string() + ".";
    const std::string suffix = ".partial";
    std::error_code failure;
    for (std::filesystem::directory_iterator at(path_.parent_path(), failure), end;
         !failure && at != end; at.increment(failure)) {
      const std::string name = at->path().filename().string();
      if (name.size() <= prefix.size() + suffix.size() || name.rfind(prefix, 0) != 0 ||
          name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0) {
        continue;
      }
      const std::string_view number =
          std::string_view(name).substr(prefix.size(), name.size() - prefix.size() - suffix.size());
      const std::size_t dash = number.find('-');
      if (dash != std::string_view::npos && detail::is_digits(number.substr(0, dash)) &&
          detail::is_digits(number.substr(dash + 1))) {
        notice(at->path().string() +
               " was left by a run of an earlier version; remove it if that " + "run is over");
      }
    }
  }

  void use_contents(leftovers left) {
    const auto names = detail::names_in(partial());
    resumed_ = !names.empty();
    if (!resumed_) return;
    if (left == leftovers::remove) {
      clear();
      notice("removed what an interrupted run left in " + partial().string());
      return;
    }
    for (const auto& name : names) {  // nobody else writes here: these have no writer any more
      std::error_code ignored;
      if (name.extension() == ".tmp") std::filesystem::remove_all(partial() / name, ignored);
    }
  }

  /// Each returns what went wrong, or nothing.
  std::string rename_to_destination(const std::filesystem::path& partial) const {
    std::error_code failure;
    std::filesystem::rename(partial, path_, failure);
    return failure ? failure.message() : std::string();
  }

  std::string move_up(const std::filesystem::path& partial) const {
    std::vector<std::filesystem::path> names;
    try {
      const std::filesystem::path foreign = foreign_entry();
      if (!foreign.empty()) return "it holds " + foreign.string() + " now";
      names = detail::names_in(partial);
    } catch (const error& e) {
      return e.what();
    }
    std::stable_partition(names.begin(), names.end(),
                          [](const auto& name) { return name != "config.json"; });
    std::error_code failure;
    for (std::size_t i = 0; i < names.size(); ++i) {
      std::filesystem::rename(partial / names[i], path_ / names[i], failure);
      if (!failure) continue;
      std::error_code ignored;
      while (i-- > 0) std::filesystem::rename(path_ / names[i], partial / names[i], ignored);
      return failure.message();
    }
    std::filesystem::remove(partial, failure);
    return {};
  }

  /// Of a finished result: neither this object nor a later run removes it.
  void set_aside(detail::unfinished_output& output) const {
    output.keep = true;
    std::filesystem::path aside;
    std::error_code failure;
    int i = 0;
    do {
      const std::string name = "finished-" + std::to_string(i++) + ".partial";
      aside = in_place_ ? path_ / name : path_;
      if (!in_place_) aside += "." + name;
    } while (std::filesystem::exists(std::filesystem::symlink_status(aside, failure)));
    std::filesystem::rename(output.path, aside, failure);
    if (!failure) output.path = aside;
  }

  std::filesystem::path path_;
  bool in_place_ = false;
  bool resumed_ = false;
  path_lock lock_;  // released after entry_ removed the directory
  std::optional<detail::unfinished_entry> entry_;
};

}  // namespace QEFT_TARGET
}  // namespace qeft::io
