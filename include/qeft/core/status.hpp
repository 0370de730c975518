// SPDX-License-Identifier: Apache-2.0
// Errors, in one model.
//
// What returns: launchers (gemv, gemm, supports_gemm and validate) return a status and throw
// nothing of the library's; memory that runs out is errc::out_of_memory, a failed launch or
// transfer errc::device_error. What throws: everything else that can fail (owners, repack,
// reorder/, solver/, io/, on_host) throws qeft::error; where host memory runs out, std::bad_alloc
// passes through. Exceptions of a body, epilogue or callback of the user's reach the caller as they
// are. Both carry a code and the same text, which names the parameter, its value and the rule.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "qeft/core/config.hpp"
#include "qeft/core/text.hpp"

#if !QEFT_HAS_EXCEPTIONS
#error \
    "qeft: this header throws; with -fno-exceptions include only views and kernels, such as \
qeft/container/quantized_matrix_view.hpp"
#endif

namespace qeft {

enum class errc {
  ok,
  invalid_argument,       // a parameter breaks a documented rule
  unsupported,            // valid, but not built in or not supported by this executor
  not_finite,             // NaN or infinity where a number is required
  not_positive_definite,  // a Hessian that no damping could repair
  corrupt_file,           // truncated, hostile or inconsistent input file
  io_error,               // the operating system refused to read or write
  device_error,           // the device or its driver reported a failure
  out_of_memory,          // host or device memory for a launch could not be had
};

/// What owners, solvers and readers throw.
class error : public std::runtime_error {
 public:
  QEFT_ALWAYS_INLINE error(errc code, const std::string& message)
      : std::runtime_error(message), code_(code) {}
  QEFT_ALWAYS_INLINE error(const error&) = default;
  QEFT_ALWAYS_INLINE error& operator=(const error&) = default;

  QEFT_ALWAYS_INLINE errc code() const noexcept { return code_; }

 private:
  errc code_;
};

inline namespace QEFT_TARGET {

/// Throws qeft::error.
[[noreturn]] QEFT_COLD inline void fail(errc code, const std::string& message) {
  throw error(code, message);
}

}  // namespace QEFT_TARGET

/// Result of a launch. Success costs nothing.
class [[nodiscard]] status {
 public:
  QEFT_ALWAYS_INLINE status() = default;
  QEFT_ALWAYS_INLINE status(errc code, std::string message)
      : code_(code), message_(std::move(message)) {}
  QEFT_ALWAYS_INLINE status(const status&) = default;
  QEFT_ALWAYS_INLINE status(status&&) noexcept = default;
  QEFT_ALWAYS_INLINE status& operator=(const status&) = default;
  QEFT_ALWAYS_INLINE status& operator=(status&&) noexcept = default;
  QEFT_ALWAYS_INLINE ~status() = default;

  QEFT_ALWAYS_INLINE bool ok() const noexcept { return code_ == errc::ok; }
  QEFT_ALWAYS_INLINE errc code() const noexcept { return code_; }
  QEFT_ALWAYS_INLINE const std::string& message() const noexcept { return message_; }

  /// Throws qeft::error when this is a failure.
  QEFT_ALWAYS_INLINE void throw_if_error() const {
    if (!ok()) fail(code_, message_);
  }

 private:
  errc code_ = errc::ok;
  std::string message_;
};

}  // namespace qeft
