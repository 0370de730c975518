// SPDX-License-Identifier: Apache-2.0
// The host executor: a small thread pool that the caller owns.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "qeft/core/config.hpp"
#include "qeft/core/math.hpp"
#include "qeft/core/status.hpp"

#if QEFT_HAS_FORK
#include <pthread.h>
#endif

namespace qeft {

/// The pool behind an on_host, as other units see it: its code is that of the unit which made it.
class host_pool {
 public:
  /// Does all of a job; called with the same context by several threads at a time.
  using job = void (*)(void* context);

  virtual int size() const noexcept = 0;
  /// Calls work(context) on every thread, the calling one included, waits for all of them, rethrows
  /// the first exception and returns true. Returns false at once, having done nothing, while
  /// another job runs, and in a child of the process that made the threads: to wait for a job could
  /// be to wait for one's own caller.
  virtual bool try_run(job work, void* context) = 0;
  virtual void retain() noexcept = 0;
  virtual void release() noexcept = 0;

 protected:
  ~host_pool() = default;
};

inline namespace QEFT_TARGET {
namespace detail {

/// Counts the forks between the first process and this one. Threads do not survive a fork.
inline std::atomic<unsigned> fork_count{0};

inline void watch_forks() {
#if QEFT_HAS_FORK
  static const int registered = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); });
  if (registered != 0) fail(errc::out_of_memory, "on_host: pthread_atfork has no memory left");
#endif
}

/// `threads - 1` workers plus the calling thread; one job at a time.
class thread_pool final : public host_pool {
 public:
  explicit thread_pool(int threads) {
    watch_forks();
    forks_ = fork_count.load();
    // Not a std::vector, whose functions all units would share.
    workers_ = new std::thread[static_cast<std::size_t>(threads - 1)];
    try {
      for (; started_ < threads - 1; ++started_) {
        workers_[started_] = std::thread([this] { serve(); });
      }
    } catch (const std::exception& e) {
      const int possible = size();
      stop();
      fail(errc::invalid_argument,
           text("on_host: threads is ", threads, ", but the system gives no more than ", possible,
                ": ", e.what()));
    }
  }

  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;

  ~thread_pool() { stop(); }

  int size() const noexcept override { return started_ + 1; }

  bool try_run(job work, void* context) override {
    if (forked() || busy_.exchange(true, std::memory_order_acquire)) return false;
    work_ = work;
    context_ = context;
    pending_.store(started_, std::memory_order_relaxed);
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) {
      // The empty critical section keeps a worker from missing the call between its check and its
      // wait.
      { const std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    call();
    while (pending_.load(std::memory_order_acquire) != 0) {
      if (forked()) {
        fail(errc::unsupported,
             "on_host: this process was forked inside parallel_for; the other threads' ranges are "
             "done in the parent only");
      }
      std::this_thread::yield();
    }
    const std::exception_ptr failure = std::exchange(failure_, nullptr);
    busy_.store(false, std::memory_order_release);
    if (failure) std::rethrow_exception(failure);
    return true;
  }

  void retain() noexcept override { owners_.fetch_add(1, std::memory_order_relaxed); }

  void release() noexcept override {
    if (owners_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    // In a child there is nothing to join, and mutex and condition are left as the parent's threads
    // held them: the memory is all there is, and it stays.
    if (!forked()) delete this;
  }

 private:
  // A decode step is a burst of short jobs: looking for the next one for some ten microseconds
  // before sleeping saves two system calls per layer.
  static constexpr int looks_before_sleep = 20000;

  bool forked() const noexcept { return fork_count.load(std::memory_order_relaxed) != forks_; }

  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (int i = 0; i < started_; ++i) workers_[i].join();
    delete[] workers_;
  }

  void call() {
    try {
      work_(context_);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void serve() {
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
      call();
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::thread* workers_ = nullptr;
  int started_ = 0;
  unsigned forks_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> owners_{1};
  std::atomic<bool> busy_{false};
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  job work_ = nullptr;
  void* context_ = nullptr;
  std::exception_ptr failure_;
};

inline constexpr int max_threads = 65536;  // far beyond any machine: a size given by mistake

/// @param threads as on_host
inline host_pool* make_pool(int threads) {
  if (threads < 0 || threads > max_threads) {
    fail(errc::invalid_argument,
         text("on_host: threads is ", threads, ", but must be in [0, ", max_threads, "]"));
  }
  if (threads == 0) {
    const unsigned hardware = std::thread::hardware_concurrency();
    threads = hardware == 0 ? 1 : static_cast<int>(hardware);
  }
  return new thread_pool(threads);
}

/// Keeps the pool while a job runs, which may destroy the executor that started it.
class pool_owner {
 public:
  explicit pool_owner(host_pool* pool) noexcept : pool_(pool) { pool_->retain(); }
  pool_owner(const pool_owner&) = delete;
  pool_owner& operator=(const pool_owner&) = delete;
  ~pool_owner() { pool_->release(); }

 private:
  host_pool* pool_;
};

template <class Body>
void parallel_for(host_pool* pool, index_t count, index_t grain, const Body& body) {
  if (count <= 0) return;
  if (grain < 1) {
    fail(errc::invalid_argument,
         text("parallel_for: grain is ", grain, ", but must be at least 1"));
  }
  const index_t pieces = ceil_div(count, grain);
  const index_t workers = pieces < pool->size() ? pieces : static_cast<index_t>(pool->size());
  if (workers <= 1) {
    body(index_t{0}, count);
    return;
  }
  struct state {
    const Body& body;
    const index_t count;
    // Four ranges per thread even out unequal speeds at little cost.
    const index_t step;
    std::atomic<index_t> next;

    bool one_range() {
      const index_t begin = next.fetch_add(step, std::memory_order_relaxed);
      if (begin >= count) return false;
      body(begin, count - begin > step ? begin + step : count);
      return true;
    }
  } s{body, count, ceil_div(pieces, workers * 4) * grain, {0}};
  const pool_owner keep(pool);
  const auto all_ranges = [](void* context) {
    while (static_cast<state*>(context)->one_range()) {
    }
  };
  // Until the pool is free, this thread works alone.
  while (!pool->try_run(all_ranges, &s)) {
    if (!s.one_range()) return;
  }
}

}  // namespace detail
}  // namespace QEFT_TARGET

/// Executor for host code. Copies share one pool, and moving copies: what was moved from can be
/// used and destroyed like any other. Results of library functions never depend on `threads`.
///
/// May be used from any thread and anywhere: several callers at a time, inside parallel_for of the
/// same or another executor, and in a child process after fork. Whoever finds the pool busy, or the
/// threads left behind in the parent, works alone on the calling thread until it is free.
class on_host {
 public:
  /// @param threads number of threads including the caller; 0 means one per hardware thread.
  ///                Outside [0, 65536], or more than the system gives, throws qeft::error.
  QEFT_ALWAYS_INLINE explicit on_host(int threads = 1) : pool_(detail::make_pool(threads)) {}
  QEFT_ALWAYS_INLINE on_host(const on_host& other) noexcept : pool_(other.pool_) {
    pool_->retain();
  }
  QEFT_ALWAYS_INLINE on_host& operator=(const on_host& other) noexcept {
    other.pool_->retain();
    pool_->release();
    pool_ = other.pool_;
    return *this;
  }
  QEFT_ALWAYS_INLINE ~on_host() { pool_->release(); }

  QEFT_ALWAYS_INLINE int threads() const noexcept { return pool_->size(); }

  /// Calls body(begin, end) on disjoint ranges that cover [0, count), each a multiple of `grain`
  /// but the last. Throws qeft::error when grain < 1. Blocks until done; the first exception is
  /// rethrown. Ranges are handed out as threads become free, so `body` must give the same result
  /// for any partition.
  template <class Body>
  QEFT_ALWAYS_INLINE void parallel_for(index_t count, index_t grain, const Body& body) const {
    detail::parallel_for(pool_, count, grain, body);
  }

 private:
  host_pool* pool_;
};

}  // namespace qeft
