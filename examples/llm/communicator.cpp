// SPDX-License-Identifier: Apache-2.0
#include "communicator.hpp"

#include "qeft/core/status.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::index_t;

namespace {

class only_process final : public communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void collect(int, qeft::span<std::byte>) override {}
  void broadcast(qeft::span<std::byte>) override {}
};

/// The first rank on which something failed; -1 if there is none.
int first_failure(communicator& ranks, bool failed_here) {
  int first = -1;
  for (int r = 0; r < ranks.size(); ++r) {
    char failed = failed_here ? 1 : 0;
    ranks.collect(r, bytes_of(&failed, 1));
    if (first < 0 && failed != 0) first = r;
  }
  broadcast(ranks, first);
  return first;
}

/// All get what rank `from` has.
void spread(communicator& ranks, int from, std::string& text) {
  auto size = static_cast<index_t>(text.size());
  ranks.collect(from, bytes_of(&size, 1));
  broadcast(ranks, size);
  text.resize(static_cast<std::size_t>(size));
  ranks.collect(from, bytes_of(text.data(), size));
  ranks.broadcast(bytes_of(text.data(), size));
}

}  // namespace

communicator& one_process() {
  static only_process one;
  return one;
}

void broadcast(communicator& ranks, std::string& text) { spread(ranks, 0, text); }

void share_in_turn(communicator& ranks, qeft::span<double> items) {
  for (index_t i = 0; i < items.size(); ++i) {
    ranks.collect(static_cast<int>(i % ranks.size()), bytes_of(&items[i], 1));
  }
  ranks.broadcast(bytes_of(items.data(), items.size()));
}

void together(communicator& ranks, const std::function<void()>& action) {
  if (ranks.size() == 1) return action();
  errc code = errc::ok;
  std::string message;
  try {
    action();
  } catch (const qeft::error& e) {
    code = e.code();
    message = e.what();
  }
  const int failed = first_failure(ranks, code != errc::ok);
  if (failed < 0) return;
  ranks.collect(failed, bytes_of(&code, 1));
  broadcast(ranks, code);
  spread(ranks, failed, message);
  qeft::fail(code, message);
}

}  // namespace qeft_llm
