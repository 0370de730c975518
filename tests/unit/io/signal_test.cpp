// SPDX-License-Identifier: Apache-2.0
// What signals leave of a process that is writing. Each case runs in a child process.
#include "qeft/io/signal_cleanup.hpp"

#include "qeft/io/atomic_directory.hpp"
#include "qeft/io/mapped_file.hpp"
#include "support/catch.hpp"
#include "unit/io/temporary_directory.hpp"

#if defined(QEFT_HAS_POSIX_FILES)
#include <sys/resource.h>
#include <sys/wait.h>

using namespace qeft;
using namespace qeft::io;
using namespace qeft_test;
namespace fs = std::filesystem;

namespace {

using names = std::vector<std::string>;

struct ending {
  bool signalled = false;
  int number = 0;    // of the signal, or the exit status
  std::string text;  // notices
};

/// Runs `action` in a child that has a signal_cleanup, with `number` at `disposition` before; an
/// action that returns makes exit status 0.
template <class Action>
ending run_child(Action&& action, int number = SIGTERM, void (*disposition)(int) = SIG_DFL) {
  std::array<int, 2> ends{};
  REQUIRE(::pipe(ends.data()) == 0);
  static int output = -1;
  output = ends[1];
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(30);
    std::signal(number, disposition);
    set_notice_handler([](const std::string& text) { ::dprintf(output, "%s\n", text.c_str()); });
    {
      const signal_cleanup signals;
      action(signals);
    }
    ::_exit(0);
  }
  ::close(ends[1]);
  ending result;
  char buffer[1000];
  for (ssize_t n = 0; (n = ::read(ends[0], buffer, sizeof buffer)) > 0;) {
    result.text.append(buffer, static_cast<std::size_t>(n));
  }
  ::close(ends[0]);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  result.signalled = WIFSIGNALED(status);
  result.number = result.signalled ? WTERMSIG(status) : WEXITSTATUS(status);
  return result;
}

void wait_for_the_end() {
  for (;;) ::pause();
}

}  // namespace

TEST_CASE("signals remove what is unfinished, and the process dies of them", "[io]") {
  const temporary_directory dir;
  write_all(dir / "old", "old");
  for (const int number :
       {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU, SIGPIPE}) {
    INFO(number);
    const ending end = run_child(
        [&](const signal_cleanup&) {
          atomic_directory finished(dir / ("finished" + std::to_string(number)));
          finished.commit();
          atomic_directory out(dir / "a/b/out");
          write_text_file(out.partial() / "file", "x");
          fs::create_directories(out.partial() / "deep/er");
          atomic_file old(dir / "old");
          old.write("new");
          ::kill(::getpid(), number);
          wait_for_the_end();
        },
        number);
    CHECK(end.signalled);
    CHECK(end.number == number);
    CHECK(end.text.empty());
    CHECK(dir.files() == names{"finished" + std::to_string(number), "old"});
    fs::remove(dir / ("finished" + std::to_string(number)));
  }
  CHECK(read_all(dir / "old") == "old");
}

TEST_CASE("a thread whose output a signal took away reports nothing", "[io]") {
  const temporary_directory dir;
  const ending end = run_child([&](const signal_cleanup& signals) {
    try {
      atomic_directory out(dir / "out");
      ::kill(::getpid(), SIGTERM);
      for (int i = 0;; ++i) write_text_file(out.partial() / std::to_string(i), "x");
    } catch (const error&) {
      signals.settle();
      ::_exit(1);
    }
  });
  CHECK(end.signalled);
  CHECK(end.number == SIGTERM);
  CHECK(dir.files().empty());
}

TEST_CASE("a signal that is ignored at the start stays ignored", "[io]") {
  const temporary_directory dir;
  const ending end = run_child(
      [&](const signal_cleanup&) {
        atomic_directory out(dir / "out");
        ::kill(::getpid(), SIGHUP);
        out.commit();
      },
      SIGHUP, SIG_IGN);
  CHECK_FALSE(end.signalled);
  CHECK(end.number == 0);
  CHECK(dir.files() == names{"out"});
}

TEST_CASE("a notice that nobody reads any more holds nothing up", "[io]") {
  const temporary_directory dir;
  static int broken = -1;
  const ending end = run_child([&](const signal_cleanup&) {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) != 0) ::_exit(3);
    ::close(ends[0]);
    broken = ends[1];
    set_notice_handler([](const std::string& text) { ::dprintf(broken, "%s\n", text.c_str()); });
    atomic_directory out(dir / "out");
    write_text_file(out.partial() / "file", "x");
    out.keep();
    ::kill(::getpid(), SIGTERM);
    wait_for_the_end();
  });
  CHECK(end.signalled);
  CHECK(end.number == SIGTERM);
}

TEST_CASE("what is to be kept stays, with a notice", "[io]") {
  const temporary_directory dir;
  const ending end = run_child([&](const signal_cleanup&) {
    atomic_directory out(dir / "out");
    write_text_file(out.partial() / "file", "x");
    out.keep();
    ::kill(::getpid(), SIGTERM);
    wait_for_the_end();
  });
  CHECK(end.number == SIGTERM);
  CHECK_THAT(end.text, contains("unfinished work stays in " + dir.path().string()));
  CHECK(dir.files() == names{"out.unfinished.partial"});
}

TEST_CASE("a mapped file that is shortened is named, and nothing is left", "[io]") {
  const temporary_directory dir;
  write_all(dir / "a", std::string(100000, 'a'));
  write_all(dir / "b", std::string(100000, 'b'));
  const auto read_last = [&](const mapped_file& file) {
    volatile std::byte last = file.bytes()[99999];
    static_cast<void>(last);
  };
  const ending end = run_child([&](const signal_cleanup&) {
    const atomic_directory out(dir / "parent/out");
    const mapped_file a(dir / "a");
    mapped_file closed(dir / "b");
    const mapped_file b(std::move(closed));
    fs::resize_file(dir / "b", 100);
    read_last(a);
    read_last(b);
  });
  CHECK_FALSE(end.signalled);
  CHECK(end.number == 1);
  CHECK_THAT(end.text, contains("cannot read " + (dir / "b").string() + ": it was shortened"));
  CHECK(dir.files() == names{"a", "b"});

  const ending other =
      run_child([&](const signal_cleanup&) { ::raise(SIGBUS); }, SIGBUS);  // of no file
  CHECK(other.signalled);
  CHECK(other.number == SIGBUS);
  CHECK(other.text.empty());
}

TEST_CASE("a file that becomes too large is an error of its writer", "[io]") {
  const temporary_directory dir;
  const ending end = run_child([&](const signal_cleanup&) {
    rlimit limit{1000, RLIM_INFINITY};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const caught e = catch_error([&] { write_text_file(dir / "file", std::string(100000, 'x')); });
    ::_exit(e.code == errc::io_error ? 5 : 6);
  });
  CHECK_FALSE(end.signalled);
  CHECK(end.number == 5);
}
#endif
