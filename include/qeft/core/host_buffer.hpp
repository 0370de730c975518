// SPDX-License-Identifier: Apache-2.0
// Aligned vectors.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

#include "qeft/core/config.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

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

/// Owned host memory, zero-initialised, 64-byte aligned; for use within one unit.
template <class T>
using host_buffer = std::vector<T, aligned_allocator<T>>;

}  // namespace QEFT_TARGET
}  // namespace qeft
