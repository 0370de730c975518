// SPDX-License-Identifier: Apache-2.0
// The processes that share the work of a run, and what they tell each other.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <type_traits>

#include "qeft/core/config.hpp"
#include "qeft/core/memory.hpp"

namespace qeft_llm {

/// The processes of a run, called ranks. All of them call these functions, and those below, in the
/// same order.
class communicator {
 public:
  virtual ~communicator() = default;

  /// Of this process, in [0, size()).
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Rank 0 gets in its data what rank `from` has there. The others' stays.
  virtual void collect(int from, qeft::span<std::byte> data) = 0;
  /// All get what rank 0 has.
  virtual void broadcast(qeft::span<std::byte> data) = 0;

  /// Whether this is rank 0, which alone reads and writes what a run leaves behind.
  bool is_first() const { return rank() == 0; }
};

/// A run of this process alone.
communicator& one_process();

/// The memory of numbers.
template <class T>
qeft::span<std::byte> bytes_of(T* values, qeft::index_t count) {
  static_assert(std::is_trivially_copyable_v<T>);
  return {reinterpret_cast<std::byte*>(values), count * static_cast<qeft::index_t>(sizeof(T))};
}

/// All get rank 0's value.
template <class T>
void broadcast(communicator& ranks, T& value) {
  ranks.broadcast(bytes_of(&value, 1));
}
void broadcast(communicator& ranks, std::string& text);

/// All get all items, of which rank i % size has item i.
void share_in_turn(communicator& ranks, qeft::span<double> items);

/// action() on every rank. If it throws qeft::error on some, then all throw that of the first of
/// them. Other exceptions pass, and the other ranks wait for ever.
void together(communicator& ranks, const std::function<void()>& action);

}  // namespace qeft_llm
