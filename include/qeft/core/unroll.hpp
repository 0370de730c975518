// SPDX-License-Identifier: Apache-2.0
// Loops whose indices are constants of the language.
#pragma once

#include <utility>

#include "qeft/core/config.hpp"

namespace qeft {

/// std::integral_constant that device code may convert.
template <int Value>
struct constant {
  QEFT_HOST_DEVICE constexpr operator int() const noexcept { return Value; }
};

inline namespace QEFT_TARGET {
namespace detail {

template <class Body, int... Index>
QEFT_HOST_DEVICE constexpr void unroll(const Body& body, std::integer_sequence<int, Index...>) {
  (body(constant<Index>{}), ...);
}

}  // namespace detail

/// body(constant<0>{}), ..., body(constant<Count - 1>{}).
template <int Count, class Body>
QEFT_HOST_DEVICE constexpr void unroll(const Body& body) {
  detail::unroll(body, std::make_integer_sequence<int, Count>{});
}

}  // namespace QEFT_TARGET
}  // namespace qeft
