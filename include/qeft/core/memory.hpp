// SPDX-License-Identifier: Apache-2.0
// Memory-space tags and a minimal span.
#pragma once

#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>

#include "qeft/core/config.hpp"

namespace qeft {

/// Where a view's pointers may be dereferenced, and where an owner gets its memory (see
/// buffer.hpp). A wrong space is a compile error.
struct host_memory {
  using space = host_memory;
  static constexpr std::size_t alignment = 64;  // cache lines: SIMD tiles never straddle them

  static QEFT_ALWAYS_INLINE void* allocate(std::size_t bytes) {
    return ::operator new (bytes, std::align_val_t{alignment});
  }
  static QEFT_ALWAYS_INLINE void deallocate(void* p, std::size_t) noexcept {
    ::operator delete (p, std::align_val_t{alignment});
  }
};
struct device_memory {
  using space = device_memory;
};

/// A pointer and a length; trivially copyable (std::span is C++20).
template <class T>
class span {
 public:
  constexpr span() = default;
  QEFT_HOST_DEVICE constexpr span(T* data, index_t size) noexcept : data_(data), size_(size) {}
  /// From a container; from a temporary only to read it during the call.
  template <class Container,
            class = std::enable_if_t<
                !std::is_same_v<std::decay_t<Container>, span> &&
                std::is_convertible_v<decltype(std::declval<Container&>().data()), T*> &&
                (std::is_lvalue_reference_v<Container> || std::is_const_v<T>)>>
  QEFT_ALWAYS_INLINE constexpr span(Container&& c) noexcept
      : data_(c.data()), size_(static_cast<index_t>(c.size())) {}

  QEFT_HOST_DEVICE constexpr T* data() const noexcept { return data_; }
  QEFT_HOST_DEVICE constexpr index_t size() const noexcept { return size_; }
  QEFT_HOST_DEVICE constexpr bool empty() const noexcept { return size_ == 0; }
  QEFT_HOST_DEVICE constexpr T& operator[](index_t i) const noexcept { return data_[i]; }
  QEFT_HOST_DEVICE constexpr T* begin() const noexcept { return data_; }
  QEFT_HOST_DEVICE constexpr T* end() const noexcept { return data_ + size_; }

  /// Whether the elements are equal.
  QEFT_HOST_DEVICE friend constexpr bool operator==(span a, span b) noexcept {
    if (a.size_ != b.size_) return false;
    for (index_t i = 0; i < a.size_; ++i) {
      if (!(a.data_[i] == b.data_[i])) return false;
    }
    return true;
  }
  QEFT_HOST_DEVICE friend constexpr bool operator!=(span a, span b) noexcept { return !(a == b); }

 private:
  T* data_ = nullptr;
  index_t size_ = 0;
};

}  // namespace qeft
