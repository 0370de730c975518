// SPDX-License-Identifier: Apache-2.0
// What io/ has to tell a user that is no error: leftovers it removed, index entries it ignored.
#pragma once

#include <atomic>
#include <string>

#include "qeft/core/config.hpp"

namespace qeft::io {

/// Receives one line without its end. May be called from any thread, also while a signal ends the
/// process: then threads that were stopped may hold the locks of stdio, so it must write without it.
using notice_handler = void (*)(const std::string& text);

/// One for the whole program, whatever its units are compiled for.
inline std::atomic<notice_handler> current_notice_handler{nullptr};

inline namespace QEFT_TARGET {

/// Notices go nowhere until a program asks for them; null silences them again.
inline void set_notice_handler(notice_handler handler) noexcept {
  current_notice_handler.store(handler);
}

inline void notice(const std::string& text) {
  if (const notice_handler handler = current_notice_handler.load()) handler(text);
}

}  // namespace QEFT_TARGET

}  // namespace qeft::io
