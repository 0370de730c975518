// SPDX-License-Identifier: Apache-2.0
// Progress of long work on stderr: a bar on a terminal, plain lines otherwise, with the time left.
#pragma once

#include <chrono>
#include <string>

#include "qeft/core/config.hpp"

namespace qeft_llm {

class progress {
 public:
  /// @param total number of equal steps
  progress(std::string label, qeft::index_t total);
  /// Ends the line.
  ~progress();
  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;

  /// `steps` more are done; shows at most ten updates a second on a terminal, one line in five
  /// seconds elsewhere. @param note stands behind the time left
  void advance(qeft::index_t steps = 1, const std::string& note = {});

 private:
  using clock = std::chrono::steady_clock;
  void show(const std::string& note = {});

  std::string label_;
  qeft::index_t total_;
  qeft::index_t done_ = 0;
  bool terminal_;
  clock::time_point start_;
  clock::time_point shown_;
};

/// "1:05"
std::string minutes(double seconds);

}  // namespace qeft_llm
