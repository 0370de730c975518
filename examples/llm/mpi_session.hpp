// SPDX-License-Identifier: Apache-2.0
// The processes that mpirun started this program as.
#pragma once

#include <memory>
#include <string>

#include "communicator.hpp"

namespace qeft_llm {

/// One per program. The ranks are those of mpirun; without it there is one. The others than the
/// first write nothing: their standard output and error go nowhere.
class mpi_session {
 public:
  /// MPI takes over some signals: to be created before a signal_cleanup.
  mpi_session();
  mpi_session(const mpi_session&) = delete;
  mpi_session& operator=(const mpi_session&) = delete;
  ~mpi_session();

  /// @throws qeft::error errc::unsupported where mpirun started several processes, and the program
  ///         was built without MPI
  communicator& ranks() const;

  /// Says on stderr why this process ends: the first rank only, if all ranks come here within some
  /// seconds. Otherwise the others cannot go on, and are ended.
  void report_failure(const std::string& message) const;

 private:
  class mpi_ranks;
  std::unique_ptr<mpi_ranks> mpi_;  // null where MPI is not running
};

}  // namespace qeft_llm
