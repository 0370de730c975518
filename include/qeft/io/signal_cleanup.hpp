// SPDX-License-Identifier: Apache-2.0
// For programs, not for libraries: signals end the process without unfinished outputs.
#pragma once

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "qeft/io/errors.hpp"
#include "qeft/io/notice.hpp"
#include "qeft/io/platform.hpp"
#include "qeft/io/unfinished.hpp"

#if defined(QEFT_HAS_POSIX_FILES)
#include <fcntl.h>
#include <unistd.h>
#endif

namespace qeft::io {

#if defined(QEFT_HAS_POSIX_FILES)

/// Where the handlers write, for the whole program; -1 when there are none.
inline std::atomic<int> signal_pipe{-1};

inline namespace QEFT_TARGET {

namespace detail {

/// What a handler tells the thread that cleans up. 0 stands for "no more signals".
struct signal_message {
  int number;
  void* address;  // of a fault
};

/// Whether the thread that gets it cannot go on.
inline bool is_fault(int number) noexcept { return number == SIGBUS || number == SIGPIPE; }

inline void send_signal_message(signal_message message) noexcept {
  // Less than PIPE_BUF: whole or not at all.
  while (::write(signal_pipe.load(), &message, sizeof message) < 0 && errno == EINTR) {
  }
}

/// The handler: everything else happens in a thread of its own, where all functions may be called.
inline void tell_cleanup(int number, siginfo_t* info, void*) {
  const int saved = errno;
  send_signal_message({number, number == SIGBUS ? info->si_addr : nullptr});
  errno = saved;
  while (is_fault(number)) ::pause();
}

inline void set_disposition(int number, void (*handler)(int)) noexcept {
  struct sigaction action {};
  action.sa_handler = handler;
  ::sigaction(number, &action, nullptr);
}

/// Ends the process as the signal does where nobody handles it: a shell sees 128 + number.
[[noreturn]] inline void die_of(int number) noexcept {
  set_disposition(number, SIG_DFL);
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, number);
  ::pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  ::raise(number);
  ::_exit(128 + number);  // process 1 of a container does not die of signals
}

}  // namespace detail

/// While it lives, SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGXCPU, SIGPIPE and those with which batch
/// systems announce the end (SIGUSR1, SIGUSR2, SIGALRM) remove what atomic_file and
/// atomic_directory have not finished (but see atomic_directory::keep), with the parents created
/// for it, and then end the process as before: a shell sees 128 + the number. Those that were
/// ignored at the start, as under nohup, stay ignored. A second signal ends the process at once.
/// SIGXFSZ is ignored from then on, so that a file that becomes too large is an error of its
/// writer.
///
/// SIGBUS inside a mapped_file, because the file was shortened by somebody or its disk failed, ends
/// the process in the same way with a notice that names the file and exit status 1; elsewhere it
/// kills as ever. (Reading files of many gigabytes into memory instead would need that memory.)
///
/// To be created at the start of main, once. It sees the outputs and files of units compiled for
/// its own QEFT_TARGET.
class signal_cleanup {
 public:
  /// Throws errc::io_error when there is no pipe to be had.
  signal_cleanup() {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) != 0) fail_io("cannot create", "a pipe for signals");
    for (const int end : ends) ::fcntl(end, F_SETFD, FD_CLOEXEC);
    read_end_ = ends[0];
    signal_pipe.store(ends[1]);
    detail::process_files::instance();
    for (const int number :
         {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGXCPU, SIGPIPE, SIGBUS}) {
      struct sigaction old {};
      if (::sigaction(number, nullptr, &old) == 0 && old.sa_handler == SIG_DFL) {
        struct sigaction action {};
        action.sa_sigaction = detail::tell_cleanup;
        action.sa_flags = SA_SIGINFO | SA_RESTART;
        ::sigaction(number, &action, nullptr);
        handled_.push_back(number);
      }
    }
    detail::set_disposition(SIGXFSZ, SIG_IGN);
    thread_ = std::thread([this] { watch(); });
  }
  signal_cleanup(const signal_cleanup&) = delete;
  signal_cleanup& operator=(const signal_cleanup&) = delete;
  ~signal_cleanup() {
    for (const int number : handled_) detail::set_disposition(number, SIG_DFL);
    detail::send_signal_message({0, nullptr});
    thread_.join();
    ::close(signal_pipe.exchange(-1));
    ::close(read_end_);
  }

  /// Returns only if no signal is ending the process. To be called before an error is reported: its
  /// cause may be that a signal took an output away.
  void settle() const {
    const std::lock_guard<std::mutex> guard(detail::process_files::instance().mutex);
  }

 private:
  void watch() {
    detail::signal_message message{};
    while (::read(read_end_, &message, sizeof message) < 0 && errno == EINTR) {
    }
    if (message.number != 0) end_process(message);
  }

  [[noreturn]] void end_process(const detail::signal_message& message) {
    for (const int number : handled_) {
      if (!detail::is_fault(number)) detail::set_disposition(number, SIG_DFL);
    }
    // Notices may go to a pipe that broke, whatever the signal: Ctrl-C ends its reader too.
    detail::set_disposition(SIGPIPE, SIG_IGN);
    detail::process_files& all = detail::process_files::instance();
    all.mutex.lock();  // for good: nothing is created, finished or given up any more
    std::filesystem::path damaged;
    if (message.number == SIGBUS) {
      const auto* address = static_cast<const std::byte*>(message.address);
      for (const detail::mapped_range& range : all.mappings) {
        if (address >= range.begin && address < range.begin + range.size) damaged = range.path;
      }
      if (damaged.empty()) detail::die_of(SIGBUS);
    }
    for (const detail::unfinished_output& output : all.outputs) {
      detail::remove_unfinished(output);
      if (output.keep) notice("interrupted; unfinished work stays in " + output.path.string());
    }
    if (message.number == SIGBUS) {
      notice("cannot read " + damaged.string() +
             ": it was shortened while it was in use, or its disk failed");
      ::_exit(1);
    }
    detail::die_of(message.number);
  }

  int read_end_ = -1;
  std::vector<int> handled_;
  std::thread thread_;
};

}  // namespace QEFT_TARGET

#else

inline namespace QEFT_TARGET {
/// Does nothing on systems without these signals.
class signal_cleanup {
 public:
  signal_cleanup() {}
  void settle() const {}
};
}  // namespace QEFT_TARGET

#endif

}  // namespace qeft::io
