// SPDX-License-Identifier: Apache-2.0
// The host executor: a small thread pool that the caller owns.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "qeft/core/config.hpp"
#include "qeft/core/math.hpp"

namespace qeft {

namespace detail {

/// `threads - 1` workers plus the calling thread; one job at a time.
class thread_pool {
 public:
  explicit thread_pool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) {
        workers_.emplace_back([this, i] { work(i); });
      }
    } catch (const std::exception& e) {
      const std::size_t started = workers_.size() + 1;
      stop();
      fail(errc::invalid_argument, "on_host: threads is " + std::to_string(threads) +
                                       ", but the system gives no more than " +
                                       std::to_string(started) + ": " + e.what());
    }
  }

  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  ~thread_pool() { stop(); }

  int size() const noexcept { return static_cast<int>(workers_.size()) + 1; }

  /// Runs job(0) .. job(size() - 1), job(0) on the calling thread, and waits for all of them. The
  /// first exception is rethrown.
  void run(const std::function<void(int)>& job) {
    const std::lock_guard<std::mutex> one_job(run_mutex_);
    job_ = &job;
    failure_ = nullptr;
    pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) {
      // The empty critical section keeps a worker from missing the call between its check and its
      // wait.
      { const std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    call(0);
    while (pending_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  // A decode step is a burst of short jobs: looking for the next one for some ten microseconds
  // before sleeping saves two system calls per layer.
  static constexpr int looks_before_sleep = 20000;

  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void call(int index) {
    try {
      (*job_)(index);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void work(int index) {
    std::uint64_t seen = 0;
    const auto called = [&] { return stop_.load() || generation_.load() != seen; };
    for (;;) {
      for (int i = 0; i < looks_before_sleep && !called(); ++i) {
      }
      if (!called()) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, called);
        sleepers_.fetch_sub(1);
      }
      if (stop_.load()) return;
      seen = generation_.load();
      call(index);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex run_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(int)>* job_ = nullptr;
  std::exception_ptr failure_;
};

}  // namespace detail

/// Executor for host code. Copies share one pool; calls from several threads take turns. Results of
/// library functions never depend on `threads`.
class on_host {
 public:
  /// @param threads number of threads including the caller; 0 means one per hardware thread. More
  ///                than the system gives is an error.
  explicit on_host(int threads = 1)
      : pool_(std::make_shared<detail::thread_pool>(resolve(threads))) {}

  int threads() const noexcept { return pool_->size(); }

  /// Calls body(begin, end) on disjoint ranges that cover [0, count), each a multiple of `grain`
  /// but the last. @pre grain >= 1. Blocks until done; the first exception is rethrown. Ranges are
  /// handed out as threads become free, so `body` must give the same result for any partition. Not
  /// reentrant: `body` must not call parallel_for of the same executor.
  template <class Body>
  void parallel_for(index_t count, index_t grain, const Body& body) const {
    if (count <= 0) return;
    const index_t pieces = ceil_div(count, grain);
    const index_t workers = pieces < threads() ? pieces : static_cast<index_t>(threads());
    if (workers <= 1) {
      body(index_t{0}, count);
      return;
    }
    // Four ranges per thread even out unequal speeds at little cost.
    const index_t step = ceil_div(pieces, workers * 4) * grain;
    std::atomic<index_t> next{0};
    pool_->run([&](int) {
      for (;;) {
        const index_t begin = next.fetch_add(step, std::memory_order_relaxed);
        if (begin >= count) return;
        body(begin, begin + step < count ? begin + step : count);
      }
    });
  }

 private:
  static int resolve(int threads) {
    if (threads < 0) {
      fail(errc::invalid_argument,
           "on_host: threads is " + std::to_string(threads) + ", but must not be negative");
    }
    if (threads > 0) return threads;
    const unsigned hardware = std::thread::hardware_concurrency();
    return hardware == 0 ? 1 : static_cast<int>(hardware);
  }

  std::shared_ptr<detail::thread_pool> pool_;
};

}  // namespace qeft
