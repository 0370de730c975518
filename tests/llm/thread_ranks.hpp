// SPDX-License-Identifier: Apache-2.0
// Ranks that are threads of this process.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "communicator.hpp"

namespace qeft_test {

class thread_ranks {
 public:
  explicit thread_ranks(int size) : boxes_(static_cast<std::size_t>(size)) {}

  /// body(communicator) on a thread for each rank; rethrows what the first of them threw.
  void run(const std::function<void(qeft_llm::communicator&)>& body) {
    const std::size_t size = boxes_.size();
    std::vector<std::exception_ptr> errors(size);
    std::vector<std::thread> threads;
    for (std::size_t r = 0; r < size; ++r) {
      threads.emplace_back([&, r] {
        one mine(*this, static_cast<int>(r));
        try {
          body(mine);
        } catch (...) {
          errors[r] = std::current_exception();
        }
      });
    }
    for (std::thread& t : threads) t.join();
    for (const std::exception_ptr& e : errors) {
      if (e) std::rethrow_exception(e);
    }
  }

  /// What rank 0 was sent, and what it sent to each other rank.
  qeft::index_t collected = 0;
  qeft::index_t broadcast = 0;

 private:
  using message = std::vector<std::byte>;
  struct box {
    std::deque<message> to_first;
    std::deque<message> from_first;
  };

  class one final : public qeft_llm::communicator {
   public:
    one(thread_ranks& all, int rank) : all_(all), rank_(rank) {}
    int rank() const override { return rank_; }
    int size() const override { return static_cast<int>(all_.boxes_.size()); }
    void collect(int from, qeft::span<std::byte> data) override {
      if (from == 0) return;
      auto& messages = all_.boxes_[static_cast<std::size_t>(from)].to_first;
      if (rank_ == from) all_.put(messages, data);
      if (rank_ != 0) return;
      all_.take(messages, data);
      all_.collected += data.size();
    }
    void broadcast(qeft::span<std::byte> data) override {
      if (rank_ != 0)
        return all_.take(all_.boxes_[static_cast<std::size_t>(rank_)].from_first, data);
      for (int r = 1; r < size(); ++r) {
        all_.put(all_.boxes_[static_cast<std::size_t>(r)].from_first, data);
      }
      if (size() > 1) all_.broadcast += data.size();
    }

   private:
    thread_ranks& all_;
    int rank_;
  };

  void put(std::deque<message>& to, qeft::span<const std::byte> data) {
    const std::lock_guard<std::mutex> guard(mutex_);
    to.emplace_back(data.begin(), data.end());
    changed_.notify_all();
  }

  void take(std::deque<message>& from, qeft::span<std::byte> data) {
    std::unique_lock<std::mutex> guard(mutex_);
    const bool there =
        changed_.wait_for(guard, std::chrono::minutes(1), [&] { return !from.empty(); });
    if (!there || from.front().size() != static_cast<std::size_t>(data.size())) {
      std::fprintf(stderr, "the ranks do not call the same functions\n");
      std::abort();
    }
    std::copy(from.front().begin(), from.front().end(), data.begin());
    from.pop_front();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<box> boxes_;
};

}  // namespace qeft_test
