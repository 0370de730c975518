// SPDX-License-Identifier: Apache-2.0
// Working memory of one call.
#pragma once

#include <new>

#include "qeft/core/config.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

/// `count` values on a cache-line boundary, not initialised. May throw std::bad_alloc.
template <class T>
class scratch {
 public:
  scratch() = default;
  explicit scratch(index_t count) { resize(count); }
  scratch(scratch&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  scratch& operator=(scratch&&) = delete;
  ~scratch() { ::operator delete(data_, alignment); }

  /// Loses the contents.
  void resize(index_t count) {
    ::operator delete(data_, alignment);
    data_ = nullptr;
    data_ = static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), alignment));
  }
  T* data() const noexcept { return data_; }

 private:
  static constexpr std::align_val_t alignment{64};
  T* data_ = nullptr;
};

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
