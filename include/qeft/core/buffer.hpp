// SPDX-License-Identifier: Apache-2.0
// An owned array in any memory space, and how an owner gets memory.
//
// A memory policy is host_memory, device_memory (include core/device_memory.cuh) or a type of the
// user's, for example one that refers to an arena or a stream-ordered pool:
//   using space = ...                      host_memory or device_memory: who may dereference
//   void* allocate(std::size_t bytes)      64-byte aligned or better; throws when there is none
//   void deallocate(void*, std::size_t bytes) noexcept
//   void clear(void* p, std::size_t bytes)                    sets bytes to zero
//   void copy(void* to, const void* from, std::size_t bytes)  both in the space
//   void upload(void* to, const void* from, std::size_t bytes)      from the host
//   void download(void* to, const void* from, std::size_t bytes)    to the host
// It is copied into every buffer and must be cheap to copy; a copy must be able to release what the
// original allocated. All calls return when they are done, or take effect in the order of a stream
// that all users of the memory follow (core/stream_memory.cuh); downloads are always done. A policy
// for host memory needs only the first three.
#pragma once

#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "qeft/core/config.hpp"
#include "qeft/core/memory.hpp"

namespace qeft {

/// Whether the host may dereference what a memory policy allocates.
template <class Memory>
inline constexpr bool is_host_accessible_v = std::is_same_v<typename Memory::space, host_memory>;

/// The operations of a memory policy: its members. Specialised for device_memory.
template <class Memory>
struct memory_operations {
  static_assert(!std::is_same_v<Memory, device_memory>,
                "qeft: device_memory is allocated by qeft/core/device_memory.cuh; include it");

  static QEFT_ALWAYS_INLINE void* allocate(Memory& m, std::size_t bytes) {
    return m.allocate(bytes);
  }
  static QEFT_ALWAYS_INLINE void deallocate(Memory& m, void* p, std::size_t bytes) noexcept {
    m.deallocate(p, bytes);
  }
  static QEFT_ALWAYS_INLINE void clear(Memory& m, void* p, std::size_t bytes) {
    if constexpr (is_host_accessible_v<Memory>) {
      std::memset(p, 0, bytes);
    } else {
      m.clear(p, bytes);
    }
  }
  static QEFT_ALWAYS_INLINE void copy(Memory& m, void* to, const void* from, std::size_t bytes) {
    if constexpr (is_host_accessible_v<Memory>) {
      std::memcpy(to, from, bytes);
    } else {
      m.copy(to, from, bytes);
    }
  }
  static QEFT_ALWAYS_INLINE void upload(Memory& m, void* to, const void* from, std::size_t bytes) {
    if constexpr (is_host_accessible_v<Memory>) {
      std::memcpy(to, from, bytes);
    } else {
      m.upload(to, from, bytes);
    }
  }
  static QEFT_ALWAYS_INLINE void download(Memory& m, void* to, const void* from,
                                          std::size_t bytes) {
    if constexpr (is_host_accessible_v<Memory>) {
      std::memcpy(to, from, bytes);
    } else {
      m.download(to, from, bytes);
    }
  }
};

/// `size` objects of a trivial type, zero at first. Copies copy; what was moved from is empty.
template <class T, class Memory = host_memory>
class buffer {
  static_assert(std::is_trivially_copyable_v<T>, "qeft::buffer: T must be trivially copyable");
  using operations = memory_operations<Memory>;

 public:
  QEFT_ALWAYS_INLINE explicit buffer(const Memory& memory = Memory{}) noexcept : memory_(memory) {}
  /// @param size >= 0. Throws std::bad_alloc, or what the memory policy throws.
  QEFT_ALWAYS_INLINE explicit buffer(index_t size, const Memory& memory = Memory{})
      : buffer(memory) {  // from here on the destructor frees what a policy's error leaves
    allocate(size);
    if (size_ > 0) operations::clear(memory_, data_, bytes());
  }
  QEFT_ALWAYS_INLINE buffer(const buffer& other) : buffer(other.memory_) {
    allocate(other.size_);
    if (size_ > 0) operations::copy(memory_, data_, other.data_, bytes());
  }
  /// From another space; one of the two must be the host's.
  template <class Other>
  QEFT_ALWAYS_INLINE explicit buffer(const buffer<T, Other>& other, const Memory& memory)
      : buffer(memory) {
    static_assert(is_host_accessible_v<Memory> || is_host_accessible_v<Other>,
                  "qeft::buffer: a copy needs the host on one side");
    allocate(other.size());
    if constexpr (is_host_accessible_v<Other>) {
      upload(other.data());
    } else {
      other.download(data_);
    }
  }
  QEFT_ALWAYS_INLINE buffer(buffer&& other) noexcept
      : memory_(other.memory_),
        data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)) {}
  QEFT_ALWAYS_INLINE buffer& operator=(buffer other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  QEFT_ALWAYS_INLINE ~buffer() {
    if (data_ != nullptr) operations::deallocate(memory_, data_, bytes());
  }

  QEFT_ALWAYS_INLINE T* data() noexcept { return data_; }
  QEFT_ALWAYS_INLINE const T* data() const noexcept { return data_; }
  QEFT_ALWAYS_INLINE index_t size() const noexcept { return size_; }
  QEFT_ALWAYS_INLINE const Memory& memory() const noexcept { return memory_; }

  /// Replaces the contents. @param from (size()) in host memory
  QEFT_ALWAYS_INLINE void upload(const T* from) {
    if (size_ > 0 && from != nullptr) operations::upload(memory_, data_, from, bytes());
  }
  /// @param to (size()) in host memory
  QEFT_ALWAYS_INLINE void download(T* to) const {
    Memory memory = memory_;
    if (size_ > 0) operations::download(memory, to, data_, bytes());
  }

 private:
  QEFT_ALWAYS_INLINE std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(size_) * sizeof(T);
  }
  QEFT_ALWAYS_INLINE void allocate(index_t size) {
    if (size <= 0) return;
    if (static_cast<std::uint64_t>(size) > static_cast<std::size_t>(-1) / sizeof(T)) {
      throw std::bad_alloc();
    }
    data_ =
        static_cast<T*>(operations::allocate(memory_, static_cast<std::size_t>(size) * sizeof(T)));
    size_ = size;
  }

  Memory memory_;
  T* data_ = nullptr;
  index_t size_ = 0;
};

}  // namespace qeft
