// SPDX-License-Identifier: Apache-2.0
// Messages out of pieces.
#pragma once

#include <cstdio>
#include <string>
#include <string_view>
#include <type_traits>

#include "qeft/core/config.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

namespace detail {

QEFT_ALWAYS_INLINE void append(std::string& to, std::string_view piece) {
  to.append(piece.data(), piece.size());
}

QEFT_ALWAYS_INLINE void append(std::string& to, char piece) { to.append(&piece, 1); }

template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
QEFT_ALWAYS_INLINE void append(std::string& to, T number) {
  char digits[32];
  int length = 0;
  if constexpr (std::is_floating_point_v<T>) {
    length = std::snprintf(digits, sizeof digits, "%g", static_cast<double>(number));
  } else if constexpr (std::is_signed_v<T>) {
    length = std::snprintf(digits, sizeof digits, "%lld", static_cast<long long>(number));
  } else {
    length = std::snprintf(digits, sizeof digits, "%llu", static_cast<unsigned long long>(number));
  }
  to.append(digits, static_cast<std::size_t>(length));
}

}  // namespace detail

/// The pieces (strings, characters and numbers) one after another. Unlike std::to_string and
/// operator+ it leaves no inline code of the standard library behind that units with other -m flags
/// could pick up.
template <class... Pieces>
QEFT_COLD QEFT_FLATTEN std::string text(const Pieces&... pieces) {
  std::string result;
  (detail::append(result, pieces), ...);
  return result;
}

}  // namespace QEFT_TARGET
}  // namespace qeft
