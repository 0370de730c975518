// SPDX-License-Identifier: Apache-2.0
// Permutations applied to layers that are packed already. The bytes equal those of packing after
// permuting.
#pragma once

#include <cstring>
#include <vector>

#include "qeft/container/copy_rows.hpp"
#include "qeft/reorder/permutation.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

/// The layer with output channel i = old output channel p[i]: rows move with their scales, zero
/// points and weak columns.
inline quantized_matrix<layout::row_packed> permute_rows(
    const permutation& p, const quantized_matrix<layout::row_packed>& w) {
  const matrix_descriptor& d = w.descriptor();
  if (p.size() != d.out_channels) {
    fail(errc::invalid_argument, text("permute_rows: the permutation has ", p.size(),
                                      " entries, but out_channels is ", d.out_channels));
  }
  if (d.out_channels == 0) return {};  // made without arguments, or moved from
  quantized_matrix<layout::row_packed> result(d, w.weak_index());
  const auto move_rows = [&](span<const std::byte> from, span<std::byte> to) {
    const index_t row = from.size() / d.out_channels;
    for (index_t n = 0; n < d.out_channels && row > 0; ++n) {
      std::memcpy(to.data() + n * row, from.data() + p[n] * row, static_cast<std::size_t>(row));
    }
  };
  move_rows(w.codes(), result.codes());
  move_rows(w.scales(), result.scales());
  move_rows(w.weak(), result.weak());
  if (d.zero == zero_kind::scaled) move_rows(w.zeros(), result.zeros());
  detail::copy_integer_zeros(w, result, [&](index_t n) { return index_t{p[n]}; });
  return result;
}

/// The layer with input column i = old input column p[i].
///
/// Moving a dense column would move it between groups, so `p` must keep the dense columns in their
/// order, as Offline Global Reordering does; then no code moves, and only the place of the weak
/// columns changes: they become `tail` or (with `heads` > 1) `per_head` when they arrive there,
/// else `indexed`. Weak columns may be permuted among themselves.
inline quantized_matrix<layout::row_packed> permute_columns(
    const permutation& p, const quantized_matrix<layout::row_packed>& w, index_t heads = 1) {
  const matrix_descriptor& d = w.descriptor();
  if (p.size() != d.in_channels) {
    fail(errc::invalid_argument, text("permute_columns: the permutation has ", p.size(),
                                      " entries, but in_channels is ", d.in_channels));
  }
  if (heads < 1) {
    fail(errc::invalid_argument,
         text("permute_columns: heads is ", heads, ", but must be positive"));
  }
  if (d.out_channels == 0) return {};   // made without arguments, or moved from
  std::vector<std::int32_t> new_index;  // where the weak columns arrive
  std::vector<index_t> weak_source;     // and which they are
  visit_weak(d, w.weak_index().data(), [&](auto weak) {
    index_t next_dense = 0;
    for (index_t i = 0; i < p.size(); ++i) {
      const column_location from = weak.locate(p[i], d.in_channels);
      if (from.is_weak) {
        new_index.push_back(static_cast<std::int32_t>(i));
        weak_source.push_back(from.index);
      } else if (from.index != next_dense++) {
        fail(errc::invalid_argument,
             text("permute_columns: input column ", p[i], " moves to ", i,
                  " and changes the order of the quantised columns; only weak columns can move "
                  "after packing"));
      }
    }
  });

  matrix_descriptor to = d;
  to.heads = 1;
  const auto arrives_as = [&](auto weak) {
    for (index_t j = 0; j < d.weak_columns; ++j) {
      if (weak.weak_column(j, d.in_channels) != new_index[static_cast<std::size_t>(j)]) {
        return false;
      }
    }
    return true;
  };
  if (d.weak_columns == 0) {
    to.weak = d.weak == weak_kind::per_head ? weak_kind::tail : d.weak;
  } else if (arrives_as(weak_tail<>{{d.weak_columns}})) {
    to.weak = weak_kind::tail;
  } else if (heads > 1 && d.in_channels % heads == 0 && d.weak_columns % heads == 0 &&
             arrives_as(weak_per_head<>{{d.weak_columns}, heads})) {
    to.weak = weak_kind::per_head;
    to.heads = heads;
  } else {
    to.weak = weak_kind::indexed;
  }

  const span<const std::int32_t> index = new_index;
  quantized_matrix<layout::row_packed> result(
      to, to.weak == weak_kind::indexed ? index : span<const std::int32_t>{});
  const auto copy = [](span<const std::byte> from, span<std::byte> into) {
    if (!from.empty()) {
      std::memcpy(into.data(), from.data(), static_cast<std::size_t>(from.size()));
    }
  };
  copy(w.codes(), result.codes());
  copy(w.scales(), result.scales());
  copy(w.zeros(), result.zeros());
  for (index_t n = 0; n < d.out_channels; ++n) {
    for (index_t j = 0; j < d.weak_columns; ++j) {
      result.write_weak(n, j, w.read_weak(n, weak_source[static_cast<std::size_t>(j)]));
    }
  }
  return result;
}

}  // namespace QEFT_TARGET
}  // namespace qeft
