// SPDX-License-Identifier: Apache-2.0
// What this process is writing and has mapped, so that a signal can end it cleanly
// (signal_cleanup.hpp).
#pragma once

#include <filesystem>
#include <list>
#include <mutex>
#include <system_error>
#include <vector>

#include "qeft/core/memory.hpp"
#include "qeft/io/platform.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {
namespace detail {

/// A file or directory under construction.
struct unfinished_output {
  std::filesystem::path path;
  std::vector<std::filesystem::path> parents{};  // directories created for it, outermost first
  bool keep = false;                             // stays when its writer gives up
};

struct mapped_range {
  const std::byte* begin;
  index_t size;
  std::filesystem::path path;
};

/// Removes an output whose writer gave up, and its parents where nothing else came into them.
inline void remove_unfinished(const unfinished_output& output) noexcept {
  if (output.keep) return;
  std::error_code ignored;
  for (int i = 0; i < 3; ++i) {  // other threads may be writing into it still
    if (std::filesystem::remove_all(output.path, ignored) == 0) break;
  }
  for (auto parent = output.parents.rbegin(); parent != output.parents.rend(); ++parent) {
    std::filesystem::remove(*parent, ignored);
  }
}

/// All of it; everything here is guarded by `mutex`. Renaming an output to its destination and
/// removing it from the list is one step under that mutex, so whoever holds it sees either.
struct process_files {
  std::mutex mutex;
  std::list<unfinished_output> outputs;
  std::list<mapped_range> mappings;

  static process_files& instance() {
    static auto* const all = new process_files;  // outlives every object of static duration
    return *all;
  }
};

/// An entry of process_files::outputs for as long as it lives.
class unfinished_entry {
 public:
  explicit unfinished_entry(unfinished_output output) {
    process_files& all = process_files::instance();
    const std::lock_guard<std::mutex> guard(all.mutex);
    entry_ = all.outputs.insert(all.outputs.end(), std::move(output));
  }
  unfinished_entry(const unfinished_entry&) = delete;
  unfinished_entry& operator=(const unfinished_entry&) = delete;
  ~unfinished_entry() {
    resolve([](const unfinished_output& output) {
      remove_unfinished(output);
      return true;
    });
  }

  const std::filesystem::path& path() const noexcept { return entry_->path; }

  void keep(bool on) {
    const std::lock_guard<std::mutex> guard(process_files::instance().mutex);
    entry_->keep = on;
  }

  /// Calls action(output) unless the entry is gone; where it returns true, the entry goes.
  template <class Action>
  void resolve(Action&& action) {
    if (done_) return;
    process_files& all = process_files::instance();
    const std::lock_guard<std::mutex> guard(all.mutex);
    done_ = action(*entry_);
    if (done_) all.outputs.erase(entry_);
  }

 private:
  std::list<unfinished_output>::iterator entry_;
  bool done_ = false;
};

}  // namespace detail
}  // namespace QEFT_TARGET
}  // namespace qeft::io
