// SPDX-License-Identifier: Apache-2.0
// Which columns are weak: local sensitivity, its global accumulation, and the choice of k
// (METHOD section 2, the paper's Eq. 3 and Algorithm 1).
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "qeft/core/text.hpp"
#include "qeft/reorder/permutation.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

/// The sensitivity of a column: hessian = H_jj (QEFT's global selection); hessian_perturbation =
/// H_jj * ||dW_:,j||^2 (OWQ, Eq. 3); gradient = ||dL/dW_:,j||^2 (the theorem of section 4).
enum class selection_metric { hessian, hessian_perturbation, gradient };

/// Elementwise H_jj * ||dW_:,j||^2.
/// @param hessian_diagonal (IC)  @param perturbation (IC) squared column norms of a trial error
inline std::vector<double> hessian_perturbation(span<const double> hessian_diagonal,
                                                span<const double> perturbation) {
  if (hessian_diagonal.size() != perturbation.size()) {
    fail(errc::invalid_argument, text("hessian_perturbation: sizes are ", hessian_diagonal.size(),
                                      " and ", perturbation.size(), ", but must be equal"));
  }
  std::vector<double> s(static_cast<std::size_t>(perturbation.size()));
  for (index_t j = 0; j < perturbation.size(); ++j) {
    s[static_cast<std::size_t>(j)] = hessian_diagonal[j] * perturbation[j];
  }
  return s;
}

namespace detail {

inline void check_sensitivity(span<const double> s, index_t k, const char* function) {
  for (index_t j = 0; j < s.size(); ++j) {
    if (!std::isfinite(s[j]) || s[j] < 0.0) {
      fail(errc::invalid_argument, text(function, ": the sensitivity of column ", j, " is ", s[j],
                                        ", but must be finite and not negative"));
    }
  }
  if (k < 0 || k > s.size()) {
    fail(errc::invalid_argument,
         text(function, ": k is ", k, ", but must be between 0 and ", s.size()));
  }
}

/// (value_heads * head_dim): the sensitivities of the query heads that read a value head, added up.
inline std::vector<double> sum_over_query_heads(span<const double> sensitivity, index_t heads,
                                                index_t value_heads, const char* function) {
  check_sensitivity(sensitivity, 0, function);
  if (heads < 1 || value_heads < 1 || heads % value_heads != 0 || sensitivity.size() % heads != 0) {
    fail(errc::invalid_argument,
         text(function, ": heads is ", heads, " with value_heads = ", value_heads,
              ", but heads must be a multiple of value_heads and divide the ", sensitivity.size(),
              " columns"));
  }
  const index_t head_dim = sensitivity.size() / heads;
  const index_t repeats = heads / value_heads;
  std::vector<double> shared(static_cast<std::size_t>(value_heads * head_dim));
  for (index_t j = 0; j < sensitivity.size(); ++j) {
    const index_t head = j / head_dim / repeats;
    shared[static_cast<std::size_t>(head * head_dim + j % head_dim)] += sensitivity[j];
  }
  return shared;
}

}  // namespace detail

/// The k columns of greatest sensitivity, in ascending order of column; among equals the lower
/// column wins, so the choice is reproducible.
inline std::vector<std::int32_t> top_k(span<const double> sensitivity, index_t k) {
  detail::check_sensitivity(sensitivity, k, "top_k");
  std::vector<std::int32_t> order(static_cast<std::size_t>(sensitivity.size()));
  for (std::size_t j = 0; j < order.size(); ++j) order[j] = static_cast<std::int32_t>(j);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return sensitivity[a] != sensitivity[b] ? sensitivity[a] > sensitivity[b] : a < b;
  });
  order.resize(static_cast<std::size_t>(k));
  std::sort(order.begin(), order.end());
  return order;
}

/// The k / heads most sensitive channels of every head, shared by the query heads that read one
/// value head (their sensitivities add up), so that a permutation inside value heads can bring them
/// to the tails.
/// @param sensitivity (heads * head_dim) of o_proj's input columns
/// @param heads       query heads, a multiple of value_heads
/// @param k           weak columns in all, a multiple of heads
/// @return ascending columns: equally many, at the same channels, for all query heads of a value
/// head
inline std::vector<std::int32_t> top_k_per_head(span<const double> sensitivity, index_t heads,
                                                index_t value_heads, index_t k) {
  detail::check_sensitivity(sensitivity, k, "top_k_per_head");
  const std::vector<double> shared =
      detail::sum_over_query_heads(sensitivity, heads, value_heads, "top_k_per_head");
  if (k % heads != 0) {
    fail(errc::invalid_argument,
         text("top_k_per_head: k is ", k, ", but must be a multiple of heads = ", heads));
  }
  const index_t head_dim = sensitivity.size() / heads;
  const index_t repeats = heads / value_heads;
  std::vector<std::int32_t> chosen;
  for (index_t v = 0; v < value_heads; ++v) {
    const auto channels = top_k({shared.data() + v * head_dim, head_dim}, k / heads);
    for (index_t r = 0; r < repeats; ++r) {
      for (const std::int32_t c : channels) {
        chosen.push_back(static_cast<std::int32_t>((v * repeats + r) * head_dim + c));
      }
    }
  }
  return chosen;
}

/// Robust channels by falling sensitivity (equals in order), then the weak ones in order: act-order
/// with groups of its own and without a gather at inference (METHOD section 9).
/// @param weak ascending channels
inline permutation by_sensitivity(span<const double> sensitivity,
                                  const std::vector<std::int32_t>& weak) {
  detail::check_sensitivity(sensitivity, 0, "by_sensitivity");
  std::vector<std::int32_t> order = weak_last(sensitivity.size(), weak).source();
  std::stable_sort(order.begin(), order.end() - static_cast<std::ptrdiff_t>(weak.size()),
                   [&](std::int32_t a, std::int32_t b) { return sensitivity[a] > sensitivity[b]; });
  return permutation(std::move(order));
}

/// by_sensitivity inside every head, the same in all query heads that read one value head: their
/// sensitivities add up.
/// @param sensitivity (heads * head_dim) of o_proj's input columns
/// @param heads       query heads, a multiple of value_heads
/// @param weak        ascending, the same in all query heads of a value head
inline permutation by_sensitivity_per_head(span<const double> sensitivity, index_t heads,
                                           index_t value_heads,
                                           const std::vector<std::int32_t>& weak) {
  const std::vector<double> shared =
      detail::sum_over_query_heads(sensitivity, heads, value_heads, "by_sensitivity_per_head");
  const index_t head_dim = sensitivity.size() / heads;
  const index_t repeats = heads / value_heads;
  weak_last(sensitivity.size(), weak);  // throws for columns that are not there, or not ascending
  std::vector<std::int32_t> order;
  std::vector<std::int32_t> weak_of_value;
  for (index_t h = 0; h < heads; ++h) {
    std::vector<std::int32_t> weak_of_head;
    for (const std::int32_t c : weak) {
      if (c / head_dim == h) weak_of_head.push_back(static_cast<std::int32_t>(c % head_dim));
    }
    if (h % repeats == 0) weak_of_value = weak_of_head;
    if (weak_of_head != weak_of_value) {
      fail(errc::invalid_argument,
           text("by_sensitivity_per_head: the weak columns of head ", h,
                " are not those of the first head that reads its value head"));
    }
    const span<const double> of_head(shared.data() + h / repeats * head_dim, head_dim);
    for (const std::int32_t c : by_sensitivity(of_head, weak_of_head).source()) {
      order.push_back(static_cast<std::int32_t>(h * head_dim + c));
    }
  }
  return permutation(std::move(order));
}

/// Which terms of a layer enter the global sum.
enum class accumulation {
  top_k,        // the layer's k largest only: Algorithm 1 of the paper
  all_columns,  // every column: the authors' published code
};

/// Global selection over all layers that read one stream: S[c] += s[c] / mean(s), then the k
/// largest.
class global_selection {
 public:
  global_selection(index_t channels, index_t k, accumulation which = accumulation::top_k)
      : k_(k), which_(which) {
    detail::check_size("global_selection", channels);
    sum_.resize(static_cast<std::size_t>(channels));
    detail::check_sensitivity(sum_, k, "global_selection");
  }

  /// Adds one layer. A layer without any activation (mean 0) says nothing and adds nothing.
  void add(span<const double> sensitivity) {
    if (sensitivity.size() != static_cast<index_t>(sum_.size())) {
      fail(errc::invalid_argument, text("global_selection::add: the layer has ", sensitivity.size(),
                                        " columns, but the stream has ", sum_.size()));
    }
    detail::check_sensitivity(sensitivity, k_, "global_selection::add");
    double mean = 0.0;
    for (const double s : sensitivity) mean += s;
    mean /= static_cast<double>(sensitivity.size());
    if (mean == 0.0) return;
    if (which_ == accumulation::all_columns) {
      for (std::size_t c = 0; c < sum_.size(); ++c) {
        sum_[c] += sensitivity[static_cast<index_t>(c)] / mean;
      }
    } else {
      for (const std::int32_t c : top_k(sensitivity, k_)) {
        sum_[static_cast<std::size_t>(c)] += sensitivity[c] / mean;
      }
    }
  }

  const std::vector<double>& sum() const noexcept { return sum_; }

  /// The k weak channels of the stream, ascending.
  std::vector<std::int32_t> choose() const { return top_k(sum_, k_); }

 private:
  index_t k_;
  accumulation which_;
  std::vector<double> sum_;
};

}  // namespace QEFT_TARGET
}  // namespace qeft
