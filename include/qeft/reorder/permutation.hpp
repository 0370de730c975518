// SPDX-License-Identifier: Apache-2.0
// Validated permutations and their application to dense matrices and vectors.
#pragma once

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "qeft/core/checked_product.hpp"
#include "qeft/core/math.hpp"
#include "qeft/core/memory.hpp"
#include "qeft/core/status.hpp"
#include "qeft/core/text.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace detail {

/// Indices are 32 bits.
inline void check_size(const char* function, index_t size) {
  if (size >= 0 && size <= std::numeric_limits<std::int32_t>::max()) return;
  fail(errc::invalid_argument, text(function, ": size is ", size, ", but must be in [0, 2^31)"));
}

}  // namespace detail

/// A bijection of [0, size). Applying it to a vector x gives y with y[i] = x[source(i)].
class permutation {
 public:
  permutation() = default;

  /// @param source source[i] is the old index that moves to position i; throws qeft::error naming
  ///               the first entry that is out of range or repeated
  explicit permutation(std::vector<std::int32_t> source) : source_(std::move(source)) {
    const auto n = static_cast<index_t>(source_.size());
    std::vector<bool> seen(source_.size(), false);
    for (index_t i = 0; i < n; ++i) {
      const std::int32_t s = source_[static_cast<std::size_t>(i)];
      if (s < 0 || s >= n || seen[static_cast<std::size_t>(s)]) {
        fail(errc::invalid_argument, text("permutation: source[", i, "] is ", s,
                                          s < 0 || s >= n ? text(", but must be in [0, ", n, ")")
                                                          : ", which occurs twice"));
      }
      seen[static_cast<std::size_t>(s)] = true;
    }
  }

  /// Leaves everything where it is. @param size in [0, 2^31)
  static permutation identity(index_t size) {
    detail::check_size("permutation::identity", size);
    std::vector<std::int32_t> source(static_cast<std::size_t>(size));
    for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::int32_t>(i);
    return permutation(std::move(source));
  }

  index_t size() const noexcept { return static_cast<index_t>(source_.size()); }
  /// The old index that moves to position i.
  index_t operator[](index_t i) const noexcept { return source_[static_cast<std::size_t>(i)]; }
  const std::vector<std::int32_t>& source() const& noexcept { return source_; }
  std::vector<std::int32_t> source() && { return std::move(source_); }

  bool is_identity() const noexcept {
    for (index_t i = 0; i < size(); ++i) {
      if ((*this)[i] != i) return false;
    }
    return true;
  }

  /// The permutation that undoes this one.
  permutation inverse() const {
    std::vector<std::int32_t> inverse(source_.size());
    for (std::size_t i = 0; i < source_.size(); ++i) {
      inverse[static_cast<std::size_t>(source_[i])] = static_cast<std::int32_t>(i);
    }
    return permutation(std::move(inverse));
  }

  friend bool operator==(const permutation& a, const permutation& b) {
    return a.source_ == b.source_;
  }
  friend bool operator!=(const permutation& a, const permutation& b) { return !(a == b); }

 private:
  std::vector<std::int32_t> source_;
};

/// The permutation that applies `first`, then `second`.
inline permutation compose(const permutation& first, const permutation& second) {
  if (first.size() != second.size()) {
    fail(errc::invalid_argument,
         text("compose: sizes are ", first.size(), " and ", second.size(), ", but must be equal"));
  }
  std::vector<std::int32_t> source(second.source().size());
  for (index_t i = 0; i < second.size(); ++i) {
    source[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(first[second[i]]);
  }
  return permutation(std::move(source));
}

/// Robust columns in order, then the weak ones in order (METHOD section 4).
/// @param weak ascending columns in [0, size)
inline permutation weak_last(index_t size, const std::vector<std::int32_t>& weak) {
  detail::check_size("weak_last", size);
  std::vector<std::int32_t> source;
  source.reserve(static_cast<std::size_t>(size));
  std::size_t next = 0;
  for (index_t c = 0; c < size; ++c) {
    if (next < weak.size() && weak[next] == c) {
      ++next;
    } else {
      source.push_back(static_cast<std::int32_t>(c));
    }
  }
  if (next != weak.size()) {
    fail(errc::invalid_argument, text("weak_last: weak[", next, "] is ", weak[next],
                                      ", but weak must ascend and stay below ", size));
  }
  source.insert(source.end(), weak.begin(), weak.end());
  return permutation(std::move(source));
}

/// weak_last inside each of `heads` heads of equal size: channels never leave their head.
/// @param weak ascending; every head must hold equally many, so that no index is needed afterwards
inline permutation weak_last_per_head(index_t size, index_t heads,
                                      const std::vector<std::int32_t>& weak) {
  detail::check_size("weak_last_per_head", size);
  if (heads < 1 || size % heads != 0) {
    fail(errc::invalid_argument,
         text("weak_last_per_head: heads is ", heads, ", but must divide size = ", size));
  }
  const index_t head_dim = size / heads;
  std::vector<std::int32_t> source;
  source.reserve(static_cast<std::size_t>(size));
  auto next = weak.begin();
  for (index_t h = 0; h < heads; ++h) {
    std::vector<std::int32_t> local;
    for (; next != weak.end() && *next < (h + 1) * head_dim; ++next) {
      local.push_back(static_cast<std::int32_t>(*next - h * head_dim));
    }
    if (static_cast<index_t>(local.size()) * heads != static_cast<index_t>(weak.size())) {
      fail(errc::invalid_argument,
           text("weak_last_per_head: head ", h, " holds ", local.size(), " of ", weak.size(),
                " weak channels, but every head must hold equally many"));
    }
    const permutation within = weak_last(head_dim, local);
    for (const std::int32_t s : within.source()) {
      source.push_back(static_cast<std::int32_t>(s + h * head_dim));
    }
  }
  return permutation(std::move(source));
}

/// The permutation of query heads that follows from one of key/value heads: with grouped-query
/// attention each of `heads` value heads is read by `repeats` consecutive query heads.
/// @param value permutation of heads * head_dim channels that keeps every channel in its head
inline permutation repeat_heads(const permutation& value, index_t heads, index_t repeats) {
  if (heads < 1 || value.size() % heads != 0 || repeats < 1) {
    fail(errc::invalid_argument,
         text("repeat_heads: heads is ", heads, " and repeats ", repeats,
              ", but both must be positive and heads must divide ", value.size()));
  }
  const index_t size = checked_product(value.size(), repeats, "repeat_heads: repeats");
  detail::check_size("repeat_heads", size);
  const index_t head_dim = value.size() / heads;
  std::vector<std::int32_t> source;
  source.reserve(static_cast<std::size_t>(size));
  for (index_t h = 0; h < heads; ++h) {
    for (index_t r = 0; r < repeats; ++r) {
      for (index_t c = 0; c < head_dim; ++c) {
        const index_t s = value[h * head_dim + c];
        if (s / head_dim != h) {
          fail(errc::invalid_argument, text("repeat_heads: channel ", s, " moves to head ", h,
                                            ", but channels must stay in their head"));
        }
        source.push_back(static_cast<std::int32_t>((h * repeats + r) * head_dim + s % head_dim));
      }
    }
  }
  return permutation(std::move(source));
}

/// Rows of a dense matrix: out[i, :] = in[p[i], :].
/// @param data (p.size(), columns) row-major, permuted in place (needs a copy of the data)
template <class T>
void permute_rows(const permutation& p, span<T> data, index_t columns) {
  if (data.size() != checked_product(p.size(), columns, "permute_rows: columns")) {
    fail(errc::invalid_argument, text("permute_rows: the matrix has ", data.size(),
                                      " elements, but ", p.size(), " x ", columns, " are needed"));
  }
  const std::vector<T> old(data.begin(), data.end());
  for (index_t i = 0; i < p.size(); ++i) {
    for (index_t c = 0; c < columns; ++c) {
      data[i * columns + c] = old[static_cast<std::size_t>(p[i] * columns + c)];
    }
  }
}

/// Columns of a dense matrix: out[:, i] = in[:, p[i]].
/// @param data (rows, p.size()) row-major, permuted in place; rows = 1 permutes a vector
template <class T>
void permute_columns(const permutation& p, span<T> data, index_t rows = 1) {
  if (data.size() != checked_product(p.size(), rows, "permute_columns: rows")) {
    fail(errc::invalid_argument, text("permute_columns: the matrix has ", data.size(),
                                      " elements, but ", rows, " x ", p.size(), " are needed"));
  }
  std::vector<T> old(static_cast<std::size_t>(p.size()));
  for (index_t r = 0; r < rows; ++r) {
    T* row = data.data() + r * p.size();
    for (index_t i = 0; i < p.size(); ++i) old[static_cast<std::size_t>(i)] = row[i];
    for (index_t i = 0; i < p.size(); ++i) row[i] = old[static_cast<std::size_t>(p[i])];
  }
}

}  // namespace QEFT_TARGET
}  // namespace qeft
