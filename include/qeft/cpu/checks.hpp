// SPDX-License-Identifier: Apache-2.0
// What the functions of the host refuse, and how they say so.
#pragma once

#include <initializer_list>
#include <new>

#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/core/status.hpp"
#include "qeft/core/text.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

QEFT_COLD inline status refuse(const std::string& reason) {
  return {errc::invalid_argument, reason};
}

/// A view that quantized_matrix::view could have made.
template <class F, class W, class L>
status check_layer(const char* function, const quantized_matrix_view<F, W, L>& w) {
  if (w.out_channels < 1 || w.in_channels < 1 || w.dense_columns() < 0) {
    return refuse(
        text(function, ": w is ", w.out_channels, " x ", w.in_channels, " with ", w.weak_columns(),
             " weak columns, but must have at least one row and column and at most in_channels "
             "weak columns"));
  }
  if (w.columns_per_group < 1 || w.groups != ceil_div(w.dense_columns(), w.columns_per_group) ||
      (w.groups > 1 && w.columns_per_group % 32 != 0)) {
    return refuse(text(function, ": w has groups = ", w.groups, " and columns_per_group = ",
                       w.columns_per_group, ", but its ", w.dense_columns(),
                       " dense columns need groups of a multiple of 32, or one for all"));
  }
  const bool no_zeros = F::zero != zero_kind::symmetric && w.zeros == nullptr;
  const bool no_codes =
      w.dense_columns() > 0 && (w.codes == nullptr || w.scales == nullptr || no_zeros);
  const bool no_weak = w.weak_columns() > 0 && w.weak_values == nullptr;
  if (no_codes || no_weak) {
    return refuse(text(function, ": w has no ", no_codes ? "codes, scales or zeros" : "weak values",
                       "; make the view with quantized_matrix::view"));
  }
  return {};
}

/// An array as its function calls it.
struct named_array {
  const char* name;
  const void* data;
};

/// Whether a number of tokens is valid, and every array is there unless there are no tokens.
/// @param function its name in messages
inline status check_tokens(const char* function, index_t tokens,
                           std::initializer_list<named_array> arrays) {
  if (tokens < 0) {
    return refuse(text(function, ": tokens is ", tokens, ", but must not be negative"));
  }
  for (const named_array& array : arrays) {
    if (tokens > 0 && array.data == nullptr) {
      return refuse(
          text(function, ": ", array.name, " is null, but there are ", tokens, " tokens"));
    }
  }
  return {};
}

/// What body() returns; what it throws, as a status.
template <class Body>
status as_status(const char* no_memory, const Body& body) {
  try {
    body();
    return {};
  } catch (const error& e) {
    return {e.code(), e.what()};
  } catch (const std::bad_alloc&) {
    return {errc::out_of_memory, no_memory};
  }
}

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
