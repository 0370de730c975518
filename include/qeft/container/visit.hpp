// SPDX-License-Identifier: Apache-2.0
// From run-time descriptions back to types.
#pragma once

#include "qeft/container/matrix_descriptor.hpp"

namespace qeft {

/// A list of formats that a build can turn run-time descriptors into.
template <class... Formats>
struct format_list {};

template <zero_kind... Zeros>
struct zero_list {};
template <class... Scalars>
struct scalar_list {};

inline namespace QEFT_TARGET {

namespace detail {

template <class... Lists>
struct joined {
  using type = format_list<>;
};
template <class... A>
struct joined<format_list<A...>> {
  using type = format_list<A...>;
};
template <class... A, class... B, class... Rest>
struct joined<format_list<A...>, format_list<B...>, Rest...> {
  using type = typename joined<format_list<A..., B...>, Rest...>::type;
};

template <int Bits, zero_kind Zero, class... Scalars>
using with_scalars = format_list<quant_format<Bits, dynamic, Zero, Scalars>...>;
template <int Bits, class Scalars, zero_kind... Zeros>
struct with_zeros;
template <int Bits, class... Scalars, zero_kind... Zeros>
struct with_zeros<Bits, scalar_list<Scalars...>, Zeros...> {
  using type = typename joined<with_scalars<Bits, Zeros, Scalars...>...>::type;
};

template <class Widths, class Zeros, class Scalars>
struct product;
template <int... Bits, zero_kind... Zeros, class Scalars>
struct product<width_list<Bits...>, zero_list<Zeros...>, Scalars> {
  using type = typename joined<typename with_zeros<Bits, Scalars, Zeros...>::type...>::type;
};

}  // namespace detail

}  // namespace QEFT_TARGET

/// Every combination of code width, kind of zero point and scalar type, the group size at run time.
template <class Widths, class Zeros, class Scalars>
using format_product = typename detail::product<Widths, Zeros, Scalars>::type;

/// What is built in for the host: everything. (A struct, not an alias, to keep symbols short.)
struct default_formats
    : format_product<supported_widths,
                     zero_list<zero_kind::symmetric, zero_kind::integer, zero_kind::scaled>,
                     scalar_list<half_bits, bf16_bits>> {};

/// What is built in for CUDA, where a format costs a set of kernels; others by request.
struct device_formats : format_product<width_list<4, 3>, zero_list<zero_kind::integer>,
                                       scalar_list<half_bits, bf16_bits>> {};

/// Whether a format can hold a layer so described.
template <class Format>
QEFT_HOST_DEVICE constexpr bool format_matches(const matrix_descriptor& d) noexcept {
  return Format::bits == d.bits && Format::zero == d.zero &&
         scalar_kind_of<typename Format::scalar_type>::value == d.scalar &&
         (Format::group_size == dynamic || Format::group_size == d.group_size);
}

inline namespace QEFT_TARGET {

namespace detail {

template <class Format>
std::string format_name() {
  const auto name = [](const auto& group) {
    return text(Format::bits, "-bit/", to_string(Format::zero), "/",
                to_string(scalar_kind_of<typename Format::scalar_type>::value), "/g=", group);
  };
  return Format::group_size == dynamic ? name("any") : name(Format::group_size);
}

template <class... Formats>
[[noreturn]] void fail_format(const matrix_descriptor& d, const format_list<Formats...>&) {
  std::string built_in;
  (append(built_in, text(" ", format_name<Formats>())), ...);
  fail(errc::unsupported,
       text("visit_format: ", d.bits, "-bit/", to_string(d.zero), "/", to_string(d.scalar),
            "/g=", d.group_size, " is not built in; built in are:", built_in));
}

template <class Visitor, class... Formats>
void visit_format_in(const matrix_descriptor& d, Visitor&& visitor,
                     const format_list<Formats...>& formats) {
  const auto attempt = [&](auto format) {
    if (!format_matches<decltype(format)>(d)) return false;
    visitor(format);
    return true;
  };
  if (!(attempt(Formats{}) || ...)) fail_format(d, formats);
}

template <class Visitor, int... Bits>
void visit_bits_in(int bits, Visitor&& visitor, width_list<Bits...>) {
  const auto attempt = [&](auto candidate) {
    if (bits != candidate) return false;
    visitor(candidate);
    return true;
  };
  if (!(attempt(std::integral_constant<int, Bits>{}) || ...)) {
    fail(errc::invalid_argument,
         text("visit_bits: bits is ", bits, ", but must be ", list_of(width_list<Bits...>{})));
  }
}

}  // namespace detail

/// Calls visitor(std::integral_constant<int, bits>{}); any width but the supported ones throws.
template <class Visitor>
void visit_bits(int bits, Visitor&& visitor) {
  detail::visit_bits_in(bits, visitor, supported_widths{});
}

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

}  // namespace QEFT_TARGET

}  // namespace qeft
