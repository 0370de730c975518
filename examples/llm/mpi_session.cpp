// SPDX-License-Identifier: Apache-2.0
#include "mpi_session.hpp"

#include <cstdio>
#include <cstdlib>

#include "qeft/core/status.hpp"

#if defined(QEFT_LLM_MPI)
#include <fcntl.h>
#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>
#endif

namespace qeft_llm {

#if defined(QEFT_LLM_MPI)

using qeft::index_t;

class mpi_session::mpi_ranks final : public communicator {
 public:
  mpi_ranks() {
    int provided = 0;  // only the main thread calls
    ::MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    ::MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    ::MPI_Comm_size(MPI_COMM_WORLD, &size_);
    ::MPI_Comm_dup(MPI_COMM_WORLD, &failed_);
    if (rank_ > 0) be_quiet();
  }
  mpi_ranks(const mpi_ranks&) = delete;
  mpi_ranks& operator=(const mpi_ranks&) = delete;
  ~mpi_ranks() override {
    ::MPI_Comm_free(&failed_);
    ::MPI_Finalize();
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  void collect(int from, qeft::span<std::byte> data) override {
    if (from == 0 || (rank_ != 0 && rank_ != from)) return;
    for_each_piece(data, [&](std::byte* piece, int bytes) {
      if (rank_ == from) {
        ::MPI_Send(piece, bytes, MPI_BYTE, 0, 0, MPI_COMM_WORLD);
      } else {
        ::MPI_Recv(piece, bytes, MPI_BYTE, from, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      }
    });
  }
  void broadcast(qeft::span<std::byte> data) override {
    for_each_piece(data, [](std::byte* piece, int bytes) {
      ::MPI_Bcast(piece, bytes, MPI_BYTE, 0, MPI_COMM_WORLD);
    });
  }

  void report_failure(const std::string& message) {
    if (all_fail()) {
      if (rank_ == 0) ::dprintf(stderr_, "qeft-llm: %s\n", message.c_str());
      return;
    }
    ::dprintf(stderr_, "qeft-llm: rank %d: %s\n", rank_, message.c_str());
    ::MPI_Abort(MPI_COMM_WORLD, 1);
  }

 private:
  /// body(data, bytes) of pieces whose size MPI can count.
  template <class Body>
  static void for_each_piece(qeft::span<std::byte> data, const Body& body) {
    constexpr index_t most = index_t{1} << 30;
    for (index_t at = 0; at < data.size(); at += most) {
      body(data.data() + at, static_cast<int>(std::min(most, data.size() - at)));
    }
  }

  void be_quiet() {
    stderr_ = ::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0);
    const int nowhere = ::open("/dev/null", O_WRONLY | O_CLOEXEC);
    ::dup2(nowhere, STDOUT_FILENO);
    ::dup2(nowhere, STDERR_FILENO);
    ::close(nowhere);
  }

  /// Whether all ranks call this within some seconds.
  bool all_fail() {
    ::MPI_Request all{};
    ::MPI_Ibarrier(failed_, &all);
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(3);
    int done = 0;
    while (done == 0 && std::chrono::steady_clock::now() < until) {
      ::MPI_Test(&all, &done, MPI_STATUS_IGNORE);
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return done != 0;
  }

  int rank_ = 0;
  int size_ = 1;
  ::MPI_Comm failed_{};  // apart from the work, in which the others may wait
  int stderr_ = STDERR_FILENO;
};

mpi_session::mpi_session() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (std::getenv(name) == nullptr) continue;
    mpi_ = std::make_unique<mpi_ranks>();
    return;
  }
}

communicator& mpi_session::ranks() const {
  if (mpi_) return *mpi_;
  return one_process();
}

void mpi_session::report_failure(const std::string& message) const {
  if (mpi_) return mpi_->report_failure(message);
  std::fprintf(stderr, "qeft-llm: %s\n", message.c_str());
}

#else

class mpi_session::mpi_ranks {};

mpi_session::mpi_session() = default;

communicator& mpi_session::ranks() const {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}) {
    const char* size = std::getenv(name);
    if (size == nullptr || std::atoi(size) <= 1) continue;
    qeft::fail(qeft::errc::unsupported,
               std::string("mpirun started ") + size +
                   " processes, but MPI is not built in: install libopenmpi-dev and configure with "
                   "-DQEFT_MPI=ON");
  }
  return one_process();
}

void mpi_session::report_failure(const std::string& message) const {
  std::fprintf(stderr, "qeft-llm: %s\n", message.c_str());
}

#endif

mpi_session::~mpi_session() = default;

}  // namespace qeft_llm
