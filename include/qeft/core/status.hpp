// SPDX-License-Identifier: Apache-2.0
// Errors: launchers return a status, owners and solvers throw qeft::error. Both carry the same
// text.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "qeft/core/config.hpp"

namespace qeft {

enum class errc {
  ok,
  invalid_argument,       // a parameter breaks a documented rule
  unsupported,            // valid, but not built in or not supported by this executor
  not_finite,             // NaN or infinity where a number is required
  not_positive_definite,  // a Hessian that no damping could repair
  corrupt_file,           // truncated, hostile or inconsistent input file
  io_error,               // the operating system refused to read or write
};

/// Result of a launch. Success costs nothing; a failure names the parameter, its value and the
/// rule.
class [[nodiscard]] status {
 public:
  status() = default;
  status(errc code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const noexcept { return code_ == errc::ok; }
  errc code() const noexcept { return code_; }
  const std::string& message() const noexcept { return message_; }

  /// Throws qeft::error when this is a failure.
  void throw_if_error() const;

 private:
  errc code_ = errc::ok;
  std::string message_;
};

/// What owners, solvers and readers throw.
class error : public std::runtime_error {
 public:
  error(errc code, const std::string& message) : std::runtime_error(message), code_(code) {}
  errc code() const noexcept { return code_; }

 private:
  errc code_;
};

[[noreturn]] inline void fail(errc code, const std::string& message) { throw error(code, message); }

inline void status::throw_if_error() const {
  if (!ok()) throw error(code_, message_);
}

}  // namespace qeft
