// SPDX-License-Identifier: Apache-2.0
// Error texts of the operating system.
#pragma once

#include <cerrno>
#include <filesystem>
#include <string>
#include <system_error>

#include "qeft/core/status.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// Throws errc::io_error "<action> <path>: <text of `code`>"; `code` is an errno value.
[[noreturn]] inline void fail_io(const std::string& action, const std::filesystem::path& path,
                                 int code = errno) {
  fail(errc::io_error, action + " " + path.string() + ": " + std::generic_category().message(code));
}

/// Throws errc::corrupt_file "<path>: <rule>".
[[noreturn]] inline void fail_corrupt(const std::string& where, const std::string& rule) {
  fail(errc::corrupt_file, where + ": " + rule);
}

}  // namespace QEFT_TARGET
}  // namespace qeft::io
