// SPDX-License-Identifier: Apache-2.0
// Memory-space tags, a minimal span, and an aligned host buffer.
#pragma once

#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "qeft/core/config.hpp"

namespace qeft {

/// Where a view's pointers may be dereferenced. A wrong space is a compile error.
struct host_memory {};
struct device_memory {};

/// A pointer and a length; trivially copyable (std::span is C++20).
template <class T>
class span {
 public:
  constexpr span() = default;
  QEFT_HOST_DEVICE constexpr span(T* data, index_t size) noexcept : data_(data), size_(size) {}
  /// From a container; from a temporary only to read it during the call.
  template <class Container,
            class = std::enable_if_t<
                std::is_convertible_v<decltype(std::declval<Container&>().data()), T*> &&
                (std::is_lvalue_reference_v<Container> || std::is_const_v<T>)>>
  constexpr span(Container&& c) noexcept : data_(c.data()), size_(static_cast<index_t>(c.size())) {}

  QEFT_HOST_DEVICE constexpr T* data() const noexcept { return data_; }
  QEFT_HOST_DEVICE constexpr index_t size() const noexcept { return size_; }
  QEFT_HOST_DEVICE constexpr bool empty() const noexcept { return size_ == 0; }
  QEFT_HOST_DEVICE constexpr T& operator[](index_t i) const noexcept { return data_[i]; }
  QEFT_HOST_DEVICE constexpr T* begin() const noexcept { return data_; }
  QEFT_HOST_DEVICE constexpr T* end() const noexcept { return data_ + size_; }

 private:
  T* data_ = nullptr;
  index_t size_ = 0;
};

/// Allocates on cache-line boundaries, so that SIMD tiles never straddle lines.
template <class T>
struct aligned_allocator {
  using value_type = T;
  static constexpr std::size_t alignment = 64;

  aligned_allocator() = default;
  template <class U>
  aligned_allocator(const aligned_allocator<U>&) noexcept {}

  T* allocate(std::size_t n) {
    if (n > static_cast<std::size_t>(-1) / sizeof(T)) throw std::bad_alloc();
    return static_cast<T*>(::operator new (n * sizeof(T), std::align_val_t{alignment}));
  }
  void deallocate(T* p, std::size_t) noexcept {
    ::operator delete (p, std::align_val_t{alignment});
  }
  friend bool operator==(const aligned_allocator&, const aligned_allocator&) { return true; }
  friend bool operator!=(const aligned_allocator&, const aligned_allocator&) { return false; }
};

/// Owned host memory, zero-initialised, 64-byte aligned.
template <class T>
using host_buffer = std::vector<T, aligned_allocator<T>>;

}  // namespace qeft
