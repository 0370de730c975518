// SPDX-License-Identifier: Apache-2.0
// The host executor: coverage, errors, sharing and shutdown.
#include "qeft/core/on_host.hpp"

#include <atomic>
#include <memory>
#include <set>
#include <thread>
#include <vector>

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
}
