// SPDX-License-Identifier: Apache-2.0
// The owner of a quantised linear layer on the host. Its format is known at run time; views give it
// back its types.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "qeft/container/matrix_descriptor.hpp"
#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/core/host_buffer.hpp"
#include "qeft/core/memory.hpp"

namespace qeft {

/// Owns codes, group parameters, weak columns and (for `indexed`) their index; nothing twice. All
/// bytes start as zero and padding stays zero, so equal layers have equal bytes.
template <class Layout = layout::row_packed>
class quantized_matrix {
 public:
  using layout_type = Layout;

  quantized_matrix() = default;

  /// @param d          shape and format; throws qeft::error when validate(d) fails
  /// @param weak_index for weak_kind::indexed: the k weak input columns, ascending; else empty
  explicit quantized_matrix(const matrix_descriptor& d, std::vector<std::int32_t> weak_index = {})
      : descriptor_(d), weak_index_(std::move(weak_index)) {
    validate(d).throw_if_error();
    check_weak_index();
    const storage_bytes s = storage_of<Layout>(d);
    codes_.resize(static_cast<std::size_t>(s.codes));
    scales_.resize(static_cast<std::size_t>(s.scales));
    zeros_.resize(static_cast<std::size_t>(s.zeros));
    weak_.resize(static_cast<std::size_t>(s.weak));
  }

  const matrix_descriptor& descriptor() const noexcept { return descriptor_; }
  const std::vector<std::int32_t>& weak_index() const noexcept { return weak_index_; }

  /// Raw bytes, placed by Layout: 32-bit code words; 16-bit scales; zeros as packed_array<bits>
  /// words or 16-bit scalars; 16-bit weak columns.
  span<std::byte> codes() noexcept { return codes_; }
  span<std::byte> scales() noexcept { return scales_; }
  span<std::byte> zeros() noexcept { return zeros_; }
  span<std::byte> weak() noexcept { return weak_; }
  span<const std::byte> codes() const noexcept { return codes_; }
  span<const std::byte> scales() const noexcept { return scales_; }
  span<const std::byte> zeros() const noexcept { return zeros_; }
  span<const std::byte> weak() const noexcept { return weak_; }

  /// A typed view; throws when Format or Weak does not describe this matrix. Valid while the matrix
  /// lives and is not moved from.
  /// @param weak the policy with this matrix's k and heads; for weak_indexed, an index with the
  ///             contents of weak_index()
  template <class Format, class Weak>
  quantized_matrix_view<Format, Weak, Layout> view(Weak weak) const {
    check_format<Format>();
    check_weak(Weak::kind, weak.count());
    if constexpr (Weak::kind == weak_kind::per_head) check_heads(weak.heads);
    if constexpr (Weak::kind == weak_kind::indexed) check_index(weak.index);
    return {descriptor_.out_channels,
            descriptor_.in_channels,
            descriptor_.group_size,
            weak,
            reinterpret_cast<const std::uint32_t*>(codes_.data()),
            reinterpret_cast<const typename Format::scalar_type*>(scales_.data()),
            reinterpret_cast<const typename Format::zero_type*>(zeros_.data()),
            reinterpret_cast<const typename Format::scalar_type*>(weak_.data())};
  }

  /// Calls visitor(view) with the typed view of a format in `Formats`.
  template <class Formats = default_formats, class Visitor>
  void visit(Visitor&& visitor) const {
    visit_format<Formats>(descriptor_, [&](auto format) {
      visit_weak(descriptor_, weak_index_.data(),
                 [&](auto weak) { visitor(view<decltype(format)>(weak)); });
    });
  }

  /// Slow element-wise writers; the counterparts of read_code and friends. @pre indices in range.
  void write_code(index_t n, index_t i, unsigned code) {
    visit_bits(descriptor_.bits, [&](auto bits) {
      scatter_code<bits>(reinterpret_cast<std::uint32_t*>(codes_.data()), code,
                         layout::code_place<Layout, bits>{descriptor_.extent(), n, i});
    });
  }
  /// @param zero the integer zero point (zero_kind::integer) or the bits of the scaled zero;
  /// ignored
  ///             for symmetric formats
  void write_params(index_t n, index_t g, std::uint16_t scale_bits, unsigned zero) {
    const layout::extent e = descriptor_.extent();
    const index_t at = Layout::param_index(e, n, g);
    reinterpret_cast<std::uint16_t*>(scales_.data())[at] = scale_bits;
    if (descriptor_.zero == zero_kind::scaled) {
      reinterpret_cast<std::uint16_t*>(zeros_.data())[at] = static_cast<std::uint16_t>(zero);
    } else if (descriptor_.zero == zero_kind::integer) {
      const index_t count = Layout::padded_rows(e.out_channels) * e.groups;
      visit_bits(descriptor_.bits, [&](auto bits) {
        scatter_code<bits>(reinterpret_cast<std::uint32_t*>(zeros_.data()), zero,
                           typename packed_array<bits>::place{at, count});
      });
    }
  }
  /// What write_params stored: scale bits, and the integer zero point or the bits of the scaled
  /// zero.
  std::pair<std::uint16_t, unsigned> read_params_bits(index_t n, index_t g) const {
    const layout::extent e = descriptor_.extent();
    const index_t at = Layout::param_index(e, n, g);
    unsigned zero = 0;
    if (descriptor_.zero == zero_kind::scaled) {
      zero = reinterpret_cast<const std::uint16_t*>(zeros_.data())[at];
    } else if (descriptor_.zero == zero_kind::integer) {
      const index_t count = Layout::padded_rows(e.out_channels) * e.groups;
      visit_bits(descriptor_.bits, [&](auto bits) {
        zero = gather_code<bits>(reinterpret_cast<const std::uint32_t*>(zeros_.data()),
                                 typename packed_array<bits>::place{at, count});
      });
    }
    return {reinterpret_cast<const std::uint16_t*>(scales_.data())[at], zero};
  }
  /// @param value_bits of the scalar type
  void write_weak(index_t n, index_t j, std::uint16_t value_bits) {
    reinterpret_cast<std::uint16_t*>(weak_.data())[Layout::weak_index(descriptor_.extent(), n, j)] =
        value_bits;
  }

 private:
  // Not part of `view`: its error text would be compiled for every format.
  void check_weak(weak_kind kind, index_t k) const {
    if (kind == descriptor_.weak && k == descriptor_.weak_columns) return;
    fail(errc::invalid_argument, std::string("quantized_matrix::view: Weak is ") + to_string(kind) +
                                     " with k = " + std::to_string(k) + ", but the matrix has " +
                                     to_string(descriptor_.weak) +
                                     " with k = " + std::to_string(descriptor_.weak_columns));
  }
  void check_heads(index_t heads) const {
    if (heads == descriptor_.heads) return;
    fail(errc::invalid_argument,
         "quantized_matrix::view: Weak has heads = " + std::to_string(heads) +
             ", but the matrix has heads = " + std::to_string(descriptor_.heads));
  }
  void check_index(const std::int32_t* index) const {
    if (index == weak_index_.data()) return;
    for (std::size_t j = 0; j < weak_index_.size(); ++j) {
      if (index != nullptr && index[j] == weak_index_[j]) continue;
      fail(errc::invalid_argument,
           "quantized_matrix::view: index of Weak " +
               (index == nullptr
                    ? "is null"
                    : "holds " + std::to_string(index[j]) + " at " + std::to_string(j)) +
               ", but the matrix has column " + std::to_string(weak_index_[j]) + " there");
    }
  }
  template <class Format>
  void check_format() const {
    if (format_matches<Format>(descriptor_)) return;
    fail(errc::invalid_argument, "quantized_matrix::view: Format is " +
                                     detail::format_name<Format>() +
                                     ", which is not the format of this matrix");
  }

  void check_weak_index() const {
    const auto expected = descriptor_.weak == weak_kind::indexed ? descriptor_.weak_columns : 0;
    if (static_cast<index_t>(weak_index_.size()) != expected) {
      fail(errc::invalid_argument, "quantized_matrix: weak_index has " +
                                       std::to_string(weak_index_.size()) +
                                       " entries, but must have " + std::to_string(expected));
    }
    index_t previous = -1;
    for (const std::int32_t column : weak_index_) {
      if (column <= previous || column >= descriptor_.in_channels) {
        fail(errc::invalid_argument,
             "quantized_matrix: weak_index holds " + std::to_string(column) + " after " +
                 std::to_string(previous) + ", but must ascend and stay below in_channels = " +
                 std::to_string(descriptor_.in_channels));
      }
      previous = column;
    }
  }

  matrix_descriptor descriptor_;
  host_buffer<std::byte> codes_;
  host_buffer<std::byte> scales_;
  host_buffer<std::byte> zeros_;
  host_buffer<std::byte> weak_;
  std::vector<std::int32_t> weak_index_;
};

}  // namespace qeft
