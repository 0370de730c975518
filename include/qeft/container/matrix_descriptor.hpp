// SPDX-License-Identifier: Apache-2.0
// Everything about a quantised linear layer but its values, known at run time, and its rules.
#pragma once

#include "qeft/core/half.hpp"
#include "qeft/core/memory.hpp"
#include "qeft/core/status.hpp"
#include "qeft/core/text.hpp"
#include "qeft/format/quant_format.hpp"
#include "qeft/format/weak_columns.hpp"
#include "qeft/layout/extent.hpp"

namespace qeft {

struct matrix_descriptor {
  index_t out_channels = 0;  // OC >= 1
  index_t in_channels = 0;   // IC >= 1
  int bits = 4;              // one of supported_widths
  index_t group_size = 128;  // multiple of 32, or per_channel
  zero_kind zero = zero_kind::integer;
  scalar_kind scalar = scalar_kind::half;  // of scales, scaled zeros and weak columns
  weak_kind weak = weak_kind::none;
  index_t weak_columns = 0;  // k, 0 <= k <= IC
  index_t heads = 1;         // per_head only: divides IC and k

  QEFT_ALWAYS_INLINE index_t dense_columns() const noexcept { return in_channels - weak_columns; }
  /// Dense columns that share a scale: per_channel stands for all of them (at least 1).
  QEFT_ALWAYS_INLINE index_t columns_per_group() const noexcept {
    if (group_size != per_channel) return group_size;
    return dense_columns() > 0 ? dense_columns() : 1;
  }
  /// Groups per row; the last one may be shorter.
  QEFT_ALWAYS_INLINE index_t groups() const noexcept {
    return ceil_div(dense_columns(), columns_per_group());
  }
  QEFT_ALWAYS_INLINE layout::extent extent() const noexcept {
    return {out_channels, dense_columns(), groups(), weak_columns, zero};
  }
  QEFT_ALWAYS_INLINE friend bool operator==(const matrix_descriptor& a,
                                            const matrix_descriptor& b) noexcept {
    return a.out_channels == b.out_channels && a.in_channels == b.in_channels && a.bits == b.bits &&
           a.group_size == b.group_size && a.zero == b.zero && a.scalar == b.scalar &&
           a.weak == b.weak && a.weak_columns == b.weak_columns && a.heads == b.heads;
  }
  QEFT_ALWAYS_INLINE friend bool operator!=(const matrix_descriptor& a,
                                            const matrix_descriptor& b) noexcept {
    return !(a == b);
  }
};

inline namespace QEFT_TARGET {

inline const char* to_string(zero_kind z) noexcept {
  switch (z) {
    case zero_kind::symmetric:
      return "symmetric";
    case zero_kind::integer:
      return "integer";
    case zero_kind::scaled:
      return "scaled";
  }
  return "unknown";
}
inline const char* to_string(weak_kind w) noexcept {
  switch (w) {
    case weak_kind::none:
      return "none";
    case weak_kind::tail:
      return "tail";
    case weak_kind::indexed:
      return "indexed";
    case weak_kind::per_head:
      return "per_head";
  }
  return "unknown";
}
inline const char* to_string(scalar_kind s) noexcept {
  return s == scalar_kind::half ? "f16" : "bf16";
}

namespace detail {

template <int... Bits>
std::string list_of(width_list<Bits...>) {
  constexpr int widths[] = {Bits...};
  constexpr std::size_t count = sizeof...(Bits);
  std::string result;
  for (std::size_t i = 0; i < count; ++i) {
    append(result, i == 0 ? "" : i + 1 < count ? ", " : " or ");
    append(result, widths[i]);
  }
  return result;
}

}  // namespace detail

/// The rules of the format; an error names the field, its value and the rule it breaks.
inline status validate(const matrix_descriptor& d) {
  // Sizes stay far below overflow, so that no later product needs a check; weak indices are 32-bit.
  constexpr index_t max_channels = index_t{1} << 30;
  const auto broken = [](const char* field, auto value, const auto&... rule) {
    return status(errc::invalid_argument,
                  text("matrix_descriptor: ", field, " is ", value, ", but must be ", rule...));
  };
  if (d.out_channels < 1 || d.out_channels > max_channels) {
    return broken("out_channels", d.out_channels, "in [1, 2^30]");
  }
  if (d.in_channels < 1 || d.in_channels > max_channels) {
    return broken("in_channels", d.in_channels, "in [1, 2^30]");
  }
  if (!is_supported_bits(d.bits)) {
    return broken("bits", d.bits, detail::list_of(supported_widths{}));
  }
  if (!is_supported_group_size(d.group_size) || d.group_size > max_channels) {
    return broken("group_size", d.group_size,
                  "a positive multiple of 32, or -1 for one group per channel");
  }
  if (d.zero > zero_kind::scaled) {
    return broken("zero", static_cast<int>(d.zero), "symmetric (0), integer (1) or scaled (2)");
  }
  if (d.scalar > scalar_kind::bf16) {
    return broken("scalar", static_cast<int>(d.scalar), "half (0) or bf16 (1)");
  }
  if (d.weak > weak_kind::per_head) {
    return broken("weak", static_cast<int>(d.weak),
                  "none (0), tail (1), indexed (2) or per_head (3)");
  }
  if (d.weak_columns < 0 || d.weak_columns > d.in_channels) {
    return broken("weak_columns", d.weak_columns, "between 0 and in_channels = ", d.in_channels);
  }
  if (d.weak == weak_kind::none && d.weak_columns != 0) {
    return broken("weak_columns", d.weak_columns, "0 when weak is none");
  }
  if (d.weak == weak_kind::per_head) {
    if (d.heads < 1 || d.in_channels % d.heads != 0 || d.weak_columns % d.heads != 0) {
      return broken("heads", d.heads, "a divisor of in_channels = ", d.in_channels,
                    " and of weak_columns = ", d.weak_columns);
    }
  } else if (d.heads != 1) {
    return broken("heads", d.heads, "1 unless weak is per_head");
  }
  return {};
}

/// The rule of a list of weak input columns: `count` of them, ascending, in [0, in_channels).
inline status validate_weak_index(span<const std::int32_t> index, index_t count,
                                  index_t in_channels) {
  if (index.size() != count) {
    return {errc::invalid_argument,
            text("weak_index has ", index.size(), " entries, but must have ", count)};
  }
  index_t previous = -1;
  for (const std::int32_t column : index) {
    if (column <= previous || column >= in_channels) {
      return {errc::invalid_argument,
              text("weak_index holds ", column, " after ", previous,
                   ", but must ascend and stay below in_channels = ", in_channels)};
    }
    previous = column;
  }
  return {};
}

}  // namespace QEFT_TARGET

}  // namespace qeft
