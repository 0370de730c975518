// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <unistd.h>

#include <cstdio>
#include <utility>

namespace qeft_llm {

std::string minutes(double seconds) {
  char text[32];
  const auto whole = static_cast<long>(seconds + 0.5);
  std::snprintf(text, sizeof text, "%ld:%02ld", whole / 60, whole % 60);
  return text;
}

progress::progress(std::string label, qeft::index_t total)
    : label_(std::move(label)),
      total_(total),
      terminal_(::isatty(STDERR_FILENO) == 1),
      start_(clock::now()),
      shown_(start_) {
  if (terminal_) show();
}

progress::~progress() {
  const double seconds = std::chrono::duration<double>(clock::now() - start_).count();
  std::fprintf(stderr, "%s%s: %s in %s\n", terminal_ ? "\r\033[K" : "", label_.c_str(),
               done_ == total_ ? "done" : "stopped", minutes(seconds).c_str());
}

void progress::advance(qeft::index_t steps, const std::string& note) {
  done_ += steps;
  const auto now = clock::now();
  if (now - shown_ < (terminal_ ? std::chrono::milliseconds(100) : std::chrono::seconds(5))) return;
  shown_ = now;
  show(note);
}

void progress::show(const std::string& note) {
  const double seconds = std::chrono::duration<double>(clock::now() - start_).count();
  const double part = total_ == 0 ? 1.0 : static_cast<double>(done_) / static_cast<double>(total_);
  const std::string left = done_ == 0 ? "" : ", " + minutes(seconds / part * (1 - part)) + " left";
  const std::string behind = left + (note.empty() ? "" : ", ") + note;
  const int percent = static_cast<int>(100 * part);
  if (terminal_) {
    constexpr int width = 30;
    const int filled = static_cast<int>(width * part);
    std::fprintf(stderr, "\r\033[K%s [%s%s] %3d%%%s", label_.c_str(),
                 std::string(static_cast<std::size_t>(filled), '#').c_str(),
                 std::string(static_cast<std::size_t>(width - filled), '.').c_str(), percent,
                 behind.c_str());
    std::fflush(stderr);
  } else {
    std::fprintf(stderr, "%s: %d%%%s\n", label_.c_str(), percent, behind.c_str());
  }
}

}  // namespace qeft_llm
