// SPDX-License-Identifier: Apache-2.0
// The host executor: coverage, errors, sharing and shutdown.
#include "qeft/core/on_host.hpp"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#if QEFT_HAS_FORK
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "support/catch.hpp"
#include "support/sweep.hpp"
#include "support/throws.hpp"

using qeft::index_t;
using qeft::on_host;

TEST_CASE("parallel_for covers every index once, in multiples of the grain") {
  qeft_test::sweep counted("threads, counts and grains");
  for (const int threads : {1, 2, 3, 8}) {
    const on_host exec(threads);
    CHECK(exec.threads() == threads);
    for (const index_t count : {0, 1, 2, 31, 32, 33, 100, 1000, 4096}) {
      for (const index_t grain : {1, 2, 32, 33, 5000}) {
        std::vector<std::atomic<int>> hits(static_cast<std::size_t>(count));
        std::atomic<int> ragged{0};
        exec.parallel_for(count, grain, [&](index_t begin, index_t end) {
          if (begin % grain != 0 || end <= begin || (end % grain != 0 && end != count)) ++ragged;
          for (index_t i = begin; i < end; ++i) ++hits[static_cast<std::size_t>(i)];
        });
        bool once = true;
        for (const auto& h : hits) once = once && h.load() == 1;
        CHECK(once);
        CHECK(ragged.load() == 0);
        counted.ran();
      }
    }
  }
}

TEST_CASE("parallel_for uses more than one thread") {
  const on_host exec(2);
  std::atomic<int> inside{0};
  std::set<std::thread::id> ids;
  std::mutex mutex;
  exec.parallel_for(8, 1, [&](index_t, index_t) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ids.insert(std::this_thread::get_id());
    }
    ++inside;
    // Hold the first range until a second thread has arrived; it must, or the test times out.
    while (inside.load() < 2) std::this_thread::yield();
  });
  CHECK(ids.size() == 2);
}

TEST_CASE("an exception in the body reaches the caller and leaves the executor usable") {
  for (const int threads : {1, 4}) {
    const on_host exec(threads);
    for (int round = 0; round < 20; ++round) {
      CHECK(qeft_test::throws_with(qeft::errc::not_finite, {"range with 37"}, [&] {
        exec.parallel_for(100, 1, [](index_t begin, index_t end) {
          if (begin <= 37 && 37 < end) qeft::fail(qeft::errc::not_finite, "range with 37");
        });
      }));
      std::atomic<index_t> sum{0};
      exec.parallel_for(100, 1, [&](index_t begin, index_t end) { sum += end - begin; });
      CHECK(sum.load() == 100);
    }
  }
}

TEST_CASE("an exception in every range is reported once") {
  const on_host exec(4);
  CHECK_THROWS_AS(exec.parallel_for(1000, 1, [](index_t, index_t) { throw std::bad_alloc(); }),
                  std::bad_alloc);
}

TEST_CASE("callers from several threads take turns") {
  const on_host exec(3);
  std::atomic<index_t> total{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([copy = exec, &total] {
      for (int round = 0; round < 200; ++round) {
        copy.parallel_for(64, 1, [&](index_t begin, index_t end) { total += end - begin; });
      }
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(total.load() == 4 * 200 * 64);
}

TEST_CASE("many short jobs, and pauses long enough for workers to sleep") {
  const on_host exec(4);
  index_t total = 0;
  for (int round = 0; round < 2000; ++round) {
    std::atomic<index_t> sum{0};
    exec.parallel_for(16, 1, [&](index_t begin, index_t end) { sum += end - begin; });
    total += sum.load();
    if (round % 200 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  CHECK(total == 2000 * 16);
}

TEST_CASE("executors can be destroyed at once, after work, and while copies live") {
  for (int round = 0; round < 100; ++round) {
    const on_host unused(8);
    auto first = std::make_unique<on_host>(2);
    const on_host copy = *first;
    first->parallel_for(4, 1, [](index_t, index_t) {});
    first.reset();
    std::atomic<index_t> sum{0};
    copy.parallel_for(4, 1, [&](index_t begin, index_t end) { sum += end - begin; });
    CHECK(sum.load() == 4);
  }
}

TEST_CASE("the number of threads") {
  CHECK(on_host().threads() == 1);
  CHECK(on_host(0).threads() >= 1);
  CHECK(qeft_test::throws_with(qeft::errc::invalid_argument, {"threads is -2"},
                               [] { on_host exec(-2); }));
  CHECK(qeft_test::throws_with(qeft::errc::invalid_argument, {"threads is 2147483647"},
                               [] { on_host exec(std::numeric_limits<int>::max()); }));
}

namespace {

/// The sum of the lengths of all ranges.
index_t covered(const on_host& exec, index_t count) {
  std::atomic<index_t> sum{0};
  exec.parallel_for(count, 1, [&](index_t begin, index_t end) { sum += end - begin; });
  return sum.load();
}

#if QEFT_HAS_FORK

/// The exit status of a child process that runs `body`, or -1 for one that hung or crashed.
template <class Body>
int in_child(const Body& body) {
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);
    body();
    _exit(1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#endif

}  // namespace

TEST_CASE("parallel_for inside parallel_for, of the same and of other executors") {
  const on_host a(3);
  const on_host b(2);
  std::atomic<index_t> sum{0};
  const auto nested = [&](const on_host& outer, const on_host& middle, const on_host& inner) {
    sum = 0;
    outer.parallel_for(6, 1, [&](index_t first, index_t last) {
      for (index_t i = first; i < last; ++i) {
        middle.parallel_for(5, 1, [&](index_t begin, index_t end) {
          for (index_t j = begin; j < end; ++j) sum += covered(inner, 100);
        });
      }
    });
    return sum.load();
  };
  for (int round = 0; round < 20; ++round) {
    CHECK(nested(a, a, a) == 3000);
    CHECK(nested(a, b, a) == 3000);
    CHECK(nested(b, a, b) == 3000);
  }
}

TEST_CASE("parallel_for on a thread that a body waits for") {
  const on_host exec(2);
  std::atomic<index_t> sum{0};
  exec.parallel_for(4, 1, [&](index_t begin, index_t end) {
    std::thread other([&] { sum += covered(exec, 10 * (end - begin)); });
    other.join();
  });
  CHECK(sum.load() == 40);
}

TEST_CASE("an exception from an inner parallel_for reaches the outer caller") {
  const on_host exec(3);
  CHECK(qeft_test::throws_with(qeft::errc::unsupported, {"inner"}, [&] {
    exec.parallel_for(8, 1, [&](index_t, index_t) {
      exec.parallel_for(8, 1,
                        [](index_t, index_t) { qeft::fail(qeft::errc::unsupported, "inner"); });
    });
  }));
  CHECK(covered(exec, 100) == 100);
}

TEST_CASE("an executor destroyed inside its own job") {
  for (int round = 0; round < 50; ++round) {
    auto exec = std::make_unique<on_host>(3);
    std::atomic<bool> destroyed{false};
    std::atomic<index_t> sum{0};
    exec->parallel_for(50, 1, [&](index_t begin, index_t end) {
      if (!destroyed.exchange(true)) exec.reset();
      sum += end - begin;
    });
    CHECK(sum.load() == 50);
  }
}

TEST_CASE("an executor that was moved from or assigned can be used") {
  on_host a(3);
  on_host b = std::move(a);
  CHECK(a.threads() == 3);  // NOLINT(bugprone-use-after-move): that is the point
  CHECK(covered(a, 100) == 100);
  CHECK(covered(b, 100) == 100);
  on_host c(2);
  c = std::move(b);
  CHECK(b.threads() == 3);
  CHECK(c.threads() == 3);
  const on_host& self = c;
  c = self;
  CHECK(covered(c, 100) == 100);
  const on_host copy = b;
  CHECK(covered(copy, 100) == 100);
}

TEST_CASE("a grain below 1 is refused") {
  const on_host exec(2);
  for (const index_t grain : {0, -1}) {
    CHECK(qeft_test::throws_with(qeft::errc::invalid_argument, {"grain is"},
                                 [&] { exec.parallel_for(4, grain, [](index_t, index_t) {}); }));
  }
}

#if QEFT_HAS_FORK && !defined(__SANITIZE_THREAD__)  // which forbids threads in a child

TEST_CASE("a forked child computes alone, makes executors of its own, and exits") {
  static const on_host exec(4);
  CHECK(covered(exec, 100) == 100);
  CHECK(in_child([] { _exit(covered(exec, 100) == 100 ? 0 : 1); }) == 0);
  CHECK(in_child([] { std::exit(0); }) == 0);  // destroys static executors
  CHECK(in_child([] {
          const on_host copy = exec;
          const on_host own(3);
          _exit(covered(copy, 100) == 100 && covered(own, 100) == 100 ? 0 : 1);
        }) == 0);
  CHECK(in_child([] {  // a child's child
          const on_host own(3);
          _exit(in_child([&] { _exit(covered(own, 100) + covered(exec, 100) == 200 ? 0 : 1); }));
        }) == 0);
  CHECK(covered(exec, 100) == 100);
}

TEST_CASE("a fork inside a job") {
  const on_host exec(4);
  std::atomic<int> failures{0};
  exec.parallel_for(8, 1, [&](index_t, index_t) {
    if (in_child([&] { _exit(covered(exec, 100) == 100 ? 0 : 1); }) != 0) ++failures;
  });
  CHECK(failures.load() == 0);
  // A child that goes on in the job gets an error instead of waiting for the parent's threads.
  const std::thread::id caller = std::this_thread::get_id();
  const pid_t parent = getpid();
  pid_t child = 0;
  std::atomic<bool> worker_is_inside{false};
  std::atomic<bool> forked{false};
  std::fflush(nullptr);
  try {
    exec.parallel_for(4, 1, [&](index_t, index_t) {
      if (std::this_thread::get_id() != caller) {
        worker_is_inside = true;
        while (!forked.load()) std::this_thread::yield();
        return;
      }
      while (!worker_is_inside.load()) std::this_thread::yield();
      if (forked.load()) return;
      child = fork();
      if (child == 0) alarm(20);
      forked = true;
    });
  } catch (const qeft::error& e) {
    if (getpid() != parent) _exit(e.code() == qeft::errc::unsupported ? 42 : 1);
    throw;
  }
  if (getpid() != parent) _exit(1);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 42));
}

#endif
