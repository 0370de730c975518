// SPDX-License-Identifier: Apache-2.0
// Where the k weak (full-precision) columns sit among the IC input columns (METHOD section 1).
//
// Every policy is a bijection between input columns and two dense blocks: the IC - k robust
// columns, numbered i, and the k weak ones, numbered j, both in ascending order. Weak columns have
// no code.
#pragma once

#include "qeft/core/math.hpp"

namespace qeft {

enum class weak_kind : std::uint8_t { none, tail, indexed, per_head };

/// Where an input column lives.
struct column_location {
  bool is_weak;
  index_t index;  // i among the dense columns, or j among the weak ones
};

/// A number of weak columns that is known at compile time, or stored.
template <index_t K>
struct weak_count {
  static_assert(K >= 0, "qeft: the number of weak columns K must be >= 0 or qeft::dynamic");
  QEFT_HOST_DEVICE constexpr index_t count() const noexcept { return K; }
};
template <>
struct weak_count<dynamic> {
  index_t k = 0;
  QEFT_HOST_DEVICE constexpr index_t count() const noexcept { return k; }
};

/// No weak columns.
struct weak_none : weak_count<0> {
  static constexpr weak_kind kind = weak_kind::none;

  QEFT_HOST_DEVICE constexpr index_t dense_column(index_t i, index_t) const noexcept { return i; }
  /// Never called, as there is no j.
  QEFT_HOST_DEVICE constexpr index_t weak_column(index_t j, index_t) const noexcept { return j; }
  QEFT_HOST_DEVICE constexpr column_location locate(index_t column, index_t) const noexcept {
    return {false, column};
  }
};

/// The last k input columns: what Offline Global Reordering arranges. No index is stored.
template <index_t K = dynamic>
struct weak_tail : weak_count<K> {
  static constexpr weak_kind kind = weak_kind::tail;

  /// Input column of dense column i, 0 <= i < in_channels - k.
  QEFT_HOST_DEVICE constexpr index_t dense_column(index_t i, index_t) const noexcept { return i; }
  /// Input column of weak column j, 0 <= j < k.
  QEFT_HOST_DEVICE constexpr index_t weak_column(index_t j, index_t in_channels) const noexcept {
    return in_channels - this->count() + j;
  }
  QEFT_HOST_DEVICE constexpr column_location locate(index_t column,
                                                    index_t in_channels) const noexcept {
    const index_t dense = in_channels - this->count();
    return column < dense ? column_location{false, column} : column_location{true, column - dense};
  }
};

/// Anywhere: `index` lists the weak input columns in ascending order (OWQ's format; o_proj in the
/// paper). The maps cost a binary search.
template <index_t K = dynamic>
struct weak_indexed : weak_count<K> {
  static constexpr weak_kind kind = weak_kind::indexed;
  const std::int32_t* index = nullptr;  // (k), ascending, without duplicates

  QEFT_HOST_DEVICE constexpr index_t dense_column(index_t i, index_t) const noexcept {
    // index[j] - j dense columns lie before weak column j: count the weak columns with at most i.
    index_t low = 0;
    index_t high = this->count();
    while (low < high) {
      const index_t mid = (low + high) / 2;
      if (index[mid] - mid <= i) {
        low = mid + 1;
      } else {
        high = mid;
      }
    }
    return i + low;
  }
  QEFT_HOST_DEVICE constexpr index_t weak_column(index_t j, index_t) const noexcept {
    return index[j];
  }
  QEFT_HOST_DEVICE constexpr column_location locate(index_t column, index_t) const noexcept {
    index_t low = 0;
    index_t high = this->count();
    while (low < high) {
      const index_t mid = (low + high) / 2;
      if (index[mid] < column) {
        low = mid + 1;
      } else {
        high = mid;
      }
    }
    const bool found = low < this->count() && index[low] == column;
    return {found, found ? low : column - low};
  }
};

/// The last k / heads channels of each of `heads` equal heads: what reordering inside value heads
/// arranges for o_proj. Structured, no index.
template <index_t K = dynamic>
struct weak_per_head : weak_count<K> {
  static constexpr weak_kind kind = weak_kind::per_head;
  index_t heads = 1;  // divides k and in_channels

  QEFT_HOST_DEVICE constexpr index_t dense_column(index_t i, index_t in_channels) const noexcept {
    const index_t dense_per_head = quotient(in_channels - this->count(), heads);
    const index_t head = dense_per_head == 0 ? 0 : quotient(i, dense_per_head);
    return i + head * quotient(this->count(), heads);
  }
  QEFT_HOST_DEVICE constexpr index_t weak_column(index_t j, index_t in_channels) const noexcept {
    const index_t weak_per = quotient(this->count(), heads);
    const index_t head_dim = quotient(in_channels, heads);
    const index_t head = quotient(j, weak_per);
    return (head + 1) * head_dim - weak_per + (j - head * weak_per);
  }
  QEFT_HOST_DEVICE constexpr column_location locate(index_t column,
                                                    index_t in_channels) const noexcept {
    const index_t weak_per = quotient(this->count(), heads);
    const index_t head_dim = quotient(in_channels, heads);
    const index_t head = quotient(column, head_dim);
    const index_t channel = column - head * head_dim;
    const index_t dense_per_head = head_dim - weak_per;
    return channel < dense_per_head
               ? column_location{false, head * dense_per_head + channel}
               : column_location{true, head * weak_per + channel - dense_per_head};
  }
};

template <class T>
inline constexpr bool is_weak_policy_v = false;
template <>
inline constexpr bool is_weak_policy_v<weak_none> = true;
template <index_t K>
inline constexpr bool is_weak_policy_v<weak_tail<K>> = true;
template <index_t K>
inline constexpr bool is_weak_policy_v<weak_indexed<K>> = true;
template <index_t K>
inline constexpr bool is_weak_policy_v<weak_per_head<K>> = true;

}  // namespace qeft
