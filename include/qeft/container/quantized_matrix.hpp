// SPDX-License-Identifier: Apache-2.0
// The owner of a quantised linear layer. Its format is known at run time; views give it back its
// types.
#pragma once

#include <cstddef>
#include <cstring>
#include <utility>

#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/container/storage.hpp"
#include "qeft/core/buffer.hpp"

namespace qeft {

/// Scale and zero point of a group as stored: bits of the scalar type, and the integer zero point
/// or the bits of the scaled one (0 for symmetric formats).
struct stored_params {
  std::uint16_t scale_bits;
  unsigned zero;
};

inline namespace QEFT_TARGET {

namespace detail {

/// Whether a view with this weak policy may be made of a matrix with descriptor d; else throws.
inline void check_weak(const matrix_descriptor& d, weak_kind kind, index_t k, index_t heads) {
  if (kind != d.weak || k != d.weak_columns) {
    fail(errc::invalid_argument,
         text("quantized_matrix::view: Weak is ", to_string(kind), " with k = ", k,
              ", but the matrix has ", to_string(d.weak), " with k = ", d.weak_columns));
  }
  if (heads != d.heads) {
    fail(errc::invalid_argument, text("quantized_matrix::view: Weak has heads = ", heads,
                                      ", but the matrix has heads = ", d.heads));
  }
}

inline void check_index(span<const std::int32_t> of_matrix, const std::int32_t* of_weak) {
  if (of_weak == of_matrix.data()) return;
  for (index_t j = 0; j < of_matrix.size(); ++j) {
    if (of_weak != nullptr && of_weak[j] == of_matrix[j]) continue;
    const std::string what = of_weak == nullptr ? "is null" : text("holds ", of_weak[j], " at ", j);
    fail(errc::invalid_argument, text("quantized_matrix::view: index of Weak ", what,
                                      ", but the matrix has column ", of_matrix[j], " there"));
  }
}

template <class Format>
void check_format(const matrix_descriptor& d) {
  if (format_matches<Format>(d)) return;
  fail(errc::invalid_argument, text("quantized_matrix::view: Format is ", format_name<Format>(),
                                    ", which is not the format of this matrix"));
}

/// @pre Format and Weak are those of d, and the pointers lead to storage_of<Layout>(d)
template <class Format, class Layout, class Space, class Weak>
quantized_matrix_view<Format, Weak, Layout, Space> make_view(
    const matrix_descriptor& d, Weak weak, const std::byte* codes, const std::byte* scales,
    const std::byte* zeros, const std::byte* weak_values) noexcept {
  using scalar = const typename Format::scalar_type;
  return {d.out_channels,
          d.in_channels,
          d.groups(),
          d.columns_per_group(),
          weak,
          reinterpret_cast<const std::uint32_t*>(codes),
          reinterpret_cast<scalar*>(scales),
          reinterpret_cast<const typename Format::zero_type*>(zeros),
          reinterpret_cast<scalar*>(weak_values)};
}

template <class Layout>
void write_code(const matrix_descriptor& d, std::uint32_t* words, index_t n, index_t i,
                unsigned code) {
  visit_bits(d.bits, [&](auto bits) {
    scatter_code<bits>(words, code, layout::code_place<Layout, bits>{d.extent(), n, i});
  });
}

/// scatter_code of an integer zero point, by bytes: its words may hold 16-bit scales as well.
template <int Bits, class Layout>
void scatter_zero(std::byte* zeros, unsigned zero, const layout::zero_place<Layout, Bits>& place) {
  for (int p = 0; p < bit_planes<Bits>::count; ++p) {
    const code_address at = place(p);
    std::uint32_t word;
    std::memcpy(&word, zeros + 4 * at.word, 4);
    const std::uint32_t mask = (1U << static_cast<unsigned>(bit_planes<Bits>::width(p))) - 1U;
    const std::uint32_t field = zero >> static_cast<unsigned>(bit_planes<Bits>::shift(p)) & mask;
    word = (word & ~(mask << at.shift)) | field << at.shift;
    std::memcpy(zeros + 4 * at.word, &word, 4);
  }
}

template <class Layout>
void write_zero(const matrix_descriptor& d, std::byte* zeros, index_t n, index_t g, unsigned zero) {
  const layout::extent e = d.extent();
  if (d.zero == zero_kind::scaled) {
    reinterpret_cast<std::uint16_t*>(zeros)[Layout::zero_index(e, n, g)] =
        static_cast<std::uint16_t>(zero);
  } else if (d.zero == zero_kind::integer) {
    visit_bits(d.bits, [&](auto bits) {
      scatter_zero<bits>(zeros, zero, layout::zero_place<Layout, bits>{e, n, g});
    });
  }
}

template <class Layout>
unsigned read_zero(const matrix_descriptor& d, const std::byte* zeros, index_t n, index_t g) {
  const layout::extent e = d.extent();
  unsigned zero = 0;
  if (d.zero == zero_kind::scaled) {
    zero = reinterpret_cast<const std::uint16_t*>(zeros)[Layout::zero_index(e, n, g)];
  } else if (d.zero == zero_kind::integer) {
    visit_bits(d.bits, [&](auto bits) {
      zero = gather_code<bits>(reinterpret_cast<const std::uint32_t*>(zeros),
                               layout::zero_place<Layout, bits>{e, n, g});
    });
  }
  return zero;
}

/// Calls visitor(view) for a matrix.
template <class Formats, class Matrix, class Visitor>
void visit_views(const Matrix& m, Visitor& visitor) {
  visit_format<Formats>(m.descriptor(), [&](auto format) {
    visit_weak(m.descriptor(), m.weak_index().data(), [&](auto weak) {
      visitor(make_view<decltype(format), typename Matrix::layout_type,
                        typename Matrix::memory_type::space>(m.descriptor(), weak, m.codes().data(),
                                                             m.scales().data(), m.zeros().data(),
                                                             m.weak().data()));
    });
  });
}

inline void check_new_matrix(const matrix_descriptor& d, span<const std::int32_t> weak_index) {
  validate(d).throw_if_error();
  const status s = validate_weak_index(
      weak_index, d.weak == weak_kind::indexed ? d.weak_columns : 0, d.in_channels);
  if (!s.ok()) fail(s.code(), text("quantized_matrix: ", s.message()));
}

}  // namespace detail

}  // namespace QEFT_TARGET

template <class Layout, class Memory>
class quantized_matrix;

/// The index of a matrix, for who replaces all that it holds.
struct weak_index_access {
  template <class Layout, class Memory>
  static QEFT_ALWAYS_INLINE span<std::int32_t> of(quantized_matrix<Layout, Memory>& m) noexcept {
    return m.weak_index_;
  }
};

/// Owns codes, group parameters, weak columns and (for `indexed`) their index; nothing twice. All
/// bytes start as zero and padding stays zero, so equal layers have equal bytes. What was moved
/// from is like a new one made without arguments: no channels, no bytes, and refused by every
/// product.
///
/// @tparam Layout where everything lies (layout/extent.hpp)
/// @tparam Memory a memory policy (core/buffer.hpp). Views carry its space, so that the host cannot
///                read a matrix of the device by mistake.
template <class Layout = layout::row_packed, class Memory = host_memory>
class quantized_matrix {
 public:
  using layout_type = Layout;
  using memory_type = Memory;
  static constexpr bool on_host_memory = is_host_accessible_v<Memory>;

  QEFT_ALWAYS_INLINE quantized_matrix() = default;

  /// @param d          shape and format; throws qeft::error when validate(d) fails
  /// @param weak_index for weak_kind::indexed: the k weak input columns, ascending, in host memory;
  ///                   else empty
  /// @param memory     copied into the matrix
  QEFT_ALWAYS_INLINE explicit quantized_matrix(const matrix_descriptor& d,
                                               span<const std::int32_t> weak_index = {},
                                               const Memory& memory = Memory{})
      : codes_(memory), scales_(memory), zeros_(memory), weak_(memory), weak_index_(memory) {
    detail::check_new_matrix(d, weak_index);
    const storage_bytes s = storage_of<Layout>(d);
    descriptor_ = d;
    codes_ = buffer<std::byte, Memory>(s.codes, memory);
    scales_ = buffer<std::byte, Memory>(s.scales, memory);
    zeros_ = buffer<std::byte, Memory>(s.zeros, memory);
    weak_ = buffer<std::byte, Memory>(s.weak, memory);
    weak_index_ = buffer<std::int32_t, Memory>(weak_index.size(), memory);
    weak_index_.upload(weak_index.data());
  }
  /// A copy in another memory, for example of a matrix of the host on the device and back. Returns
  /// when it is done, or as the memory policy says.
  template <class Other>
  QEFT_ALWAYS_INLINE explicit quantized_matrix(const quantized_matrix<Layout, Other>& other,
                                               const Memory& memory = Memory{})
      : descriptor_(other.descriptor_),
        codes_(other.codes_, memory),
        scales_(other.scales_, memory),
        zeros_(other.zeros_, memory),
        weak_(other.weak_, memory),
        weak_index_(other.weak_index_, memory) {}
  QEFT_ALWAYS_INLINE quantized_matrix(const quantized_matrix&) = default;
  QEFT_ALWAYS_INLINE quantized_matrix(quantized_matrix&& other) noexcept
      : descriptor_(std::exchange(other.descriptor_, matrix_descriptor{})),
        codes_(std::move(other.codes_)),
        scales_(std::move(other.scales_)),
        zeros_(std::move(other.zeros_)),
        weak_(std::move(other.weak_)),
        weak_index_(std::move(other.weak_index_)) {}
  QEFT_ALWAYS_INLINE quantized_matrix& operator=(quantized_matrix other) noexcept {
    descriptor_ = other.descriptor_;
    codes_ = std::move(other.codes_);
    scales_ = std::move(other.scales_);
    zeros_ = std::move(other.zeros_);
    weak_ = std::move(other.weak_);
    weak_index_ = std::move(other.weak_index_);
    return *this;
  }
  QEFT_ALWAYS_INLINE ~quantized_matrix() = default;

  QEFT_ALWAYS_INLINE const matrix_descriptor& descriptor() const noexcept { return descriptor_; }
  QEFT_ALWAYS_INLINE const Memory& memory() const noexcept { return codes_.memory(); }
  /// The weak input columns of `indexed`, in the memory of the matrix.
  QEFT_ALWAYS_INLINE span<const std::int32_t> weak_index() const noexcept { return weak_index_; }

  /// Raw bytes in the memory of the matrix, placed by Layout: 32-bit code words; 16-bit scales;
  /// zero points as 32-bit words or 16-bit scalars; 16-bit weak columns.
  QEFT_ALWAYS_INLINE span<std::byte> codes() noexcept { return codes_; }
  QEFT_ALWAYS_INLINE span<std::byte> scales() noexcept { return scales_; }
  QEFT_ALWAYS_INLINE span<std::byte> zeros() noexcept {
    if constexpr (Layout::zeros_in_scales) return scales_;
    return zeros_;
  }
  QEFT_ALWAYS_INLINE span<std::byte> weak() noexcept { return weak_; }
  QEFT_ALWAYS_INLINE span<const std::byte> codes() const noexcept { return codes_; }
  QEFT_ALWAYS_INLINE span<const std::byte> scales() const noexcept { return scales_; }
  QEFT_ALWAYS_INLINE span<const std::byte> zeros() const noexcept {
    if constexpr (Layout::zeros_in_scales) return scales_;
    return zeros_;
  }
  QEFT_ALWAYS_INLINE span<const std::byte> weak() const noexcept { return weak_; }

  /// A typed view; throws when Format or Weak does not describe this matrix. Valid while the matrix
  /// lives and is not moved from.
  /// @param weak the policy with this matrix's k and heads; for weak_indexed, an index with the
  ///             contents of weak_index() (for a matrix of the device: weak_index().data() itself)
  template <class Format, class Weak>
  QEFT_ALWAYS_INLINE quantized_matrix_view<Format, Weak, Layout, typename Memory::space> view(
      Weak weak) const {
    detail::check_format<Format>(descriptor_);
    if constexpr (Weak::kind == weak_kind::per_head) {
      detail::check_weak(descriptor_, Weak::kind, weak.count(), weak.heads);
    } else {
      detail::check_weak(descriptor_, Weak::kind, weak.count(), 1);
    }
    if constexpr (Weak::kind == weak_kind::indexed) check_index(weak.index);
    return detail::make_view<Format, Layout, typename Memory::space>(
        descriptor_, weak, codes_.data(), scales_.data(), zeros().data(), weak_.data());
  }

  /// Calls visitor(view) with the typed view of a format in `Formats`.
  template <class Formats = default_formats, class Visitor>
  QEFT_ALWAYS_INLINE void visit(Visitor&& visitor) const {
    detail::visit_views<Formats>(*this, visitor);
  }

  // Slow element-wise access, on the host only. @pre indices in range

  /// The counterpart of qeft::read_code.
  QEFT_ALWAYS_INLINE void write_code(index_t n, index_t i, unsigned code) {
    require_host();
    detail::write_code<Layout>(descriptor_, code_words(), n, i, code);
  }
  /// @param zero the integer zero point (zero_kind::integer) or the bits of the scaled zero;
  ///             ignored for symmetric formats
  QEFT_ALWAYS_INLINE void write_params(index_t n, index_t g, std::uint16_t scale_bits,
                                       unsigned zero) {
    require_host();
    scale_scalars()[Layout::scale_index(descriptor_.extent(), n, g)] = scale_bits;
    detail::write_zero<Layout>(descriptor_, zeros().data(), n, g, zero);
  }
  /// What write_params stored.
  QEFT_ALWAYS_INLINE stored_params read_params(index_t n, index_t g) const {
    require_host();
    return {scale_scalars()[Layout::scale_index(descriptor_.extent(), n, g)],
            detail::read_zero<Layout>(descriptor_, zeros().data(), n, g)};
  }
  /// @param value_bits of the scalar type
  QEFT_ALWAYS_INLINE void write_weak(index_t n, index_t j, std::uint16_t value_bits) {
    require_host();
    weak_scalars()[Layout::weak_index(descriptor_.extent(), n, j)] = value_bits;
  }
  QEFT_ALWAYS_INLINE std::uint16_t read_weak(index_t n, index_t j) const {
    require_host();
    return weak_scalars()[Layout::weak_index(descriptor_.extent(), n, j)];
  }

  // Typed pointers to the bytes above, for code that knows the layout.
  QEFT_ALWAYS_INLINE std::uint32_t* code_words() noexcept {
    return reinterpret_cast<std::uint32_t*>(codes_.data());
  }
  QEFT_ALWAYS_INLINE const std::uint32_t* code_words() const noexcept {
    return reinterpret_cast<const std::uint32_t*>(codes_.data());
  }
  QEFT_ALWAYS_INLINE std::uint16_t* scale_scalars() noexcept {
    return reinterpret_cast<std::uint16_t*>(scales_.data());
  }
  QEFT_ALWAYS_INLINE const std::uint16_t* scale_scalars() const noexcept {
    return reinterpret_cast<const std::uint16_t*>(scales_.data());
  }
  QEFT_ALWAYS_INLINE std::uint16_t* weak_scalars() noexcept {
    return reinterpret_cast<std::uint16_t*>(weak_.data());
  }
  QEFT_ALWAYS_INLINE const std::uint16_t* weak_scalars() const noexcept {
    return reinterpret_cast<const std::uint16_t*>(weak_.data());
  }

 private:
  template <class, class>
  friend class quantized_matrix;
  friend weak_index_access;
  using bytes = buffer<std::byte, Memory>;

  static QEFT_ALWAYS_INLINE void require_host() noexcept {
    static_assert(on_host_memory,
                  "qeft::quantized_matrix: elements can be read and written on the host only; copy "
                  "the matrix");
  }
  QEFT_ALWAYS_INLINE void check_index(const std::int32_t* index) const {
    if constexpr (on_host_memory) {
      detail::check_index(weak_index_, index);
    } else if (index != weak_index_.data()) {
      fail(errc::invalid_argument,
           "quantized_matrix::view: index of Weak must be weak_index().data() of the matrix");
    }
  }
  matrix_descriptor descriptor_;
  bytes codes_;
  bytes scales_;
  bytes zeros_;
  bytes weak_;
  buffer<std::int32_t, Memory> weak_index_;
};

}  // namespace qeft
