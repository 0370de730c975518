// SPDX-License-Identifier: Apache-2.0
// What a quantisation keeps on the disk while it runs: finished layers, so that they leave memory,
// and how far it has got, so that a run that was killed can be continued.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "linear.hpp"

namespace qeft_llm {

/// A quantised linear: rows as in the original model, weak columns indexed.
struct finished_linear {
  packed_matrix matrix;
  qeft::permutation order;  // of its columns: column i is for input channel order[i]
  nlohmann::json report;    // what is known about it, as in the provenance of the checkpoint
};

class work_directory {
 public:
  /// Goes on with what an earlier run left in `parent`, the directory under construction, if its
  /// `fingerprint` was the same; else removes all of it and says so on stderr.
  work_directory(const std::filesystem::path& parent, const nlohmann::json& fingerprint);

  const std::filesystem::path& path() const noexcept { return path_; }
  /// Whether an earlier run left something.
  bool resumed() const noexcept { return resumed_; }

  /// Facts that later runs need. Each is on the disk, whole, when store() returns.
  void store(const std::string& name, const nlohmann::json& value) const;
  std::optional<nlohmann::json> load(const std::string& name) const;

  void store_linear(const std::string& name, const finished_linear& linear) const;
  bool has_linear(const std::string& name) const;
  finished_linear load_linear(const std::string& name) const;

  /// read(), which takes what load() or load_linear() gave it apart: when that is damaged, the
  /// error also says what to remove.
  template <class Read>
  auto checked(const Read& read) const {
    try {
      return read();
    } catch (const qeft::error& e) {
      if (e.code() != qeft::errc::corrupt_file) throw;
      fail_damaged(e.what());
    } catch (const nlohmann::json::exception& e) {
      fail_damaged(path_.string() + ": " + e.what());
    }
  }

  /// Removes everything, once the results are in `parent`.
  void remove() const;

 private:
  std::filesystem::path file_of(const std::string& linear) const;
  [[noreturn]] void fail_damaged(const std::string& what) const;

  std::filesystem::path path_;
  bool resumed_ = false;
};

}  // namespace qeft_llm
