// SPDX-License-Identifier: Apache-2.0
// The run-time side of a format: a descriptor, its rules, its exact size, and the way back to
// types.
#pragma once

#include <string>
#include <type_traits>

#include "qeft/core/half.hpp"
#include "qeft/core/status.hpp"
#include "qeft/format/quant_format.hpp"
#include "qeft/format/weak_columns.hpp"
#include "qeft/layout/row_packed.hpp"

namespace qeft {

/// Everything about a quantised linear layer but its values.
struct matrix_descriptor {
  index_t out_channels = 0;  // OC >= 1
  index_t in_channels = 0;   // IC >= 1
  int bits = 4;              // 2, 3, 4 or 8
  index_t group_size = 128;  // multiple of 32, or per_channel
  zero_kind zero = zero_kind::integer;
  scalar_kind scalar = scalar_kind::half;  // of scales, scaled zeros and weak columns
  weak_kind weak = weak_kind::none;
  index_t weak_columns = 0;  // k, 0 <= k <= IC
  index_t heads = 1;         // per_head only: divides IC and k

  index_t dense_columns() const noexcept { return in_channels - weak_columns; }
  /// Dense columns that share a scale: per_channel stands for all of them (at least 1).
  index_t columns_per_group() const noexcept {
    if (group_size != per_channel) return group_size;
    return dense_columns() > 0 ? dense_columns() : 1;
  }
  /// Groups per row; the last one may be shorter.
  index_t groups() const noexcept { return ceil_div(dense_columns(), columns_per_group()); }
  layout::extent extent() const noexcept {
    return {out_channels, dense_columns(), groups(), weak_columns};
  }
  friend bool operator==(const matrix_descriptor& a, const matrix_descriptor& b) noexcept {
    return a.out_channels == b.out_channels && a.in_channels == b.in_channels && a.bits == b.bits &&
           a.group_size == b.group_size && a.zero == b.zero && a.scalar == b.scalar &&
           a.weak == b.weak && a.weak_columns == b.weak_columns && a.heads == b.heads;
  }
  friend bool operator!=(const matrix_descriptor& a, const matrix_descriptor& b) noexcept {
    return !(a == b);
  }
};

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

/// The rules of the format; an error names the field, its value and the rule it breaks.
inline status validate(const matrix_descriptor& d) {
  // Sizes stay far below overflow, so that no later product needs a check; weak indices are 32-bit.
  constexpr index_t max_channels = index_t{1} << 30;
  const auto broken = [](const char* field, auto value, const std::string& rule) {
    return status(errc::invalid_argument, std::string("matrix_descriptor: ") + field + " is " +
                                              std::to_string(value) + ", but must be " + rule);
  };
  if (d.out_channels < 1 || d.out_channels > max_channels) {
    return broken("out_channels", d.out_channels, "in [1, 2^30]");
  }
  if (d.in_channels < 1 || d.in_channels > max_channels) {
    return broken("in_channels", d.in_channels, "in [1, 2^30]");
  }
  if (!is_supported_bits(d.bits)) return broken("bits", d.bits, "2, 3, 4 or 8");
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
    return broken("weak_columns", d.weak_columns,
                  "between 0 and in_channels = " + std::to_string(d.in_channels));
  }
  if (d.weak == weak_kind::none && d.weak_columns != 0) {
    return broken("weak_columns", d.weak_columns, "0 when weak is none");
  }
  if (d.weak == weak_kind::per_head) {
    if (d.heads < 1 || d.in_channels % d.heads != 0 || d.weak_columns % d.heads != 0) {
      return broken("heads", d.heads,
                    "a divisor of in_channels = " + std::to_string(d.in_channels) +
                        " and of weak_columns = " + std::to_string(d.weak_columns));
    }
  } else if (d.heads != 1) {
    return broken("heads", d.heads, "1 unless weak is per_head");
  }
  return {};
}

/// Calls visitor(std::integral_constant<int, bits>{}). @pre is_supported_bits(bits)
template <class Visitor>
void visit_bits(int bits, Visitor&& visitor) {
  switch (bits) {
    case 2:
      return visitor(std::integral_constant<int, 2>{});
    case 3:
      return visitor(std::integral_constant<int, 3>{});
    case 4:
      return visitor(std::integral_constant<int, 4>{});
    default:
      return visitor(std::integral_constant<int, 8>{});
  }
}

/// Exact size of each part, in bytes.
struct storage_bytes {
  index_t codes = 0;
  index_t scales = 0;
  index_t zeros = 0;
  index_t weak = 0;        // weak columns
  index_t weak_index = 0;  // 32-bit positions; `indexed` only

  index_t total() const noexcept { return codes + scales + zeros + weak + weak_index; }
};

/// Storage of a layer in `Layout`, padding included. @pre validate(d).ok()
template <class Layout = layout::row_packed>
storage_bytes storage_of(const matrix_descriptor& d) {
  const layout::extent e = d.extent();
  const index_t rows = Layout::padded_rows(e.out_channels);
  const index_t params = rows * e.groups;
  storage_bytes s;
  visit_bits(d.bits, [&](auto bits) {
    s.codes = 4 * Layout::template code_words<bits>(e);
    if (d.zero == zero_kind::integer) s.zeros = 4 * packed_array<bits>::words(params);
  });
  s.scales = 2 * params;
  if (d.zero == zero_kind::scaled) s.zeros = 2 * params;
  s.weak = 2 * rows * e.weak;
  if (d.weak == weak_kind::indexed) s.weak_index = 4 * e.weak;
  return s;
}

/// Stored bits per weight of the layer, everything included.
template <class Layout = layout::row_packed>
double bits_per_weight(const matrix_descriptor& d) {
  return 8.0 * static_cast<double>(storage_of<Layout>(d).total()) /
         (static_cast<double>(d.out_channels) * static_cast<double>(d.in_channels));
}

/// A list of formats that a build can turn run-time descriptors into.
template <class... Formats>
struct format_list {};

/// What is built in by default: every bit width and zero kind with FP16 and BF16 scalars, and the
/// group size at run time. (A struct, not an alias, to keep symbols and diagnostics short.)
struct default_formats
    : format_list<
          quant_format<2, dynamic, zero_kind::symmetric>,
          quant_format<2, dynamic, zero_kind::integer>, quant_format<2, dynamic, zero_kind::scaled>,
          quant_format<3, dynamic, zero_kind::symmetric>,
          quant_format<3, dynamic, zero_kind::integer>, quant_format<3, dynamic, zero_kind::scaled>,
          quant_format<4, dynamic, zero_kind::symmetric>,
          quant_format<4, dynamic, zero_kind::integer>, quant_format<4, dynamic, zero_kind::scaled>,
          quant_format<8, dynamic, zero_kind::symmetric>,
          quant_format<8, dynamic, zero_kind::integer>, quant_format<8, dynamic, zero_kind::scaled>,
          quant_format<2, dynamic, zero_kind::symmetric, bf16_bits>,
          quant_format<2, dynamic, zero_kind::integer, bf16_bits>,
          quant_format<2, dynamic, zero_kind::scaled, bf16_bits>,
          quant_format<3, dynamic, zero_kind::symmetric, bf16_bits>,
          quant_format<3, dynamic, zero_kind::integer, bf16_bits>,
          quant_format<3, dynamic, zero_kind::scaled, bf16_bits>,
          quant_format<4, dynamic, zero_kind::symmetric, bf16_bits>,
          quant_format<4, dynamic, zero_kind::integer, bf16_bits>,
          quant_format<4, dynamic, zero_kind::scaled, bf16_bits>,
          quant_format<8, dynamic, zero_kind::symmetric, bf16_bits>,
          quant_format<8, dynamic, zero_kind::integer, bf16_bits>,
          quant_format<8, dynamic, zero_kind::scaled, bf16_bits>> {};

/// Whether a format can hold a layer so described.
template <class Format>
constexpr bool format_matches(const matrix_descriptor& d) noexcept {
  return Format::bits == d.bits && Format::zero == d.zero &&
         scalar_kind_of<typename Format::scalar_type>::value == d.scalar &&
         (Format::group_size == dynamic || Format::group_size == d.group_size);
}

inline namespace QEFT_TARGET {
namespace detail {

template <class Format>
std::string format_name() {
  const auto group =
      Format::group_size == dynamic ? std::string("any") : std::to_string(Format::group_size);
  return std::to_string(Format::bits) + "-bit/" + to_string(Format::zero) + "/" +
         to_string(scalar_kind_of<typename Format::scalar_type>::value) + "/g=" + group;
}

template <class Visitor, class... Formats>
void visit_format_in(const matrix_descriptor& d, Visitor&& visitor,
                     const format_list<Formats...>&) {
  bool found = false;
  const auto attempt = [&](auto format) {
    if (!found && format_matches<decltype(format)>(d)) {
      found = true;
      visitor(format);
    }
  };
  (attempt(Formats{}), ...);
  if (!found) {
    std::string built_in;
    ((built_in += " " + format_name<Formats>()), ...);
    fail(errc::unsupported, "visit_format: " + std::to_string(d.bits) + "-bit/" +
                                to_string(d.zero) + "/" + to_string(d.scalar) +
                                "/g=" + std::to_string(d.group_size) +
                                " is not built in; built in are:" + built_in);
  }
}

}  // namespace detail
}  // namespace QEFT_TARGET

/// Calls visitor(Format{}) for the first format of `Formats` that fits the descriptor; an error
/// lists what is built in.
template <class Formats = default_formats, class Visitor>
void visit_format(const matrix_descriptor& d, Visitor&& visitor) {
  detail::visit_format_in(d, visitor, Formats{});
}

/// Calls visitor(Weak) with the run-time weak policy of the descriptor. `index` (k, ascending) is
/// used by `indexed` only.
template <class Visitor>
void visit_weak(const matrix_descriptor& d, const std::int32_t* index, Visitor&& visitor) {
  switch (d.weak) {
    case weak_kind::none:
      return visitor(weak_none{});
    case weak_kind::tail:
      return visitor(weak_tail<>{{d.weak_columns}});
    case weak_kind::indexed:
      return visitor(weak_indexed<>{{d.weak_columns}, index});
    case weak_kind::per_head:
      return visitor(weak_per_head<>{{d.weak_columns}, d.heads});
  }
}

}  // namespace qeft
