// SPDX-License-Identifier: Apache-2.0
// The choice of weak columns on a device (METHOD section 2): the results of reorder/ and of
// solver::diagonal_accumulator, bit for bit. Includes CUB and Thrust, and is therefore not part of
// qeft.cuh.
#pragma once

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

#include "qeft/device/checks.cuh"
#include "qeft/kernel/selection.cuh"
#include "qeft/reorder/weak_selection.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

/// What sorts and scans of columns need beside their operands, in a workspace.
struct selection_space {
  double* mean;
  double* shared;           // (columns), sensitivities that several heads share
  double* sorted;           // (columns)
  std::int32_t* numbers;    // (columns)
  std::int32_t* order;      // (columns)
  std::int32_t* is_chosen;  // (columns)
  std::int32_t* before;     // (columns)
  void* scratch;            // CUB's
  std::size_t scratch_bytes;
  index_t bytes;  // of all

  selection_space(std::byte* base, index_t columns, std::size_t needed) : scratch_bytes(needed) {
    index_t at = 0;
    const auto take = [&](auto*& array, index_t count) {
      array =
          base == nullptr ? nullptr : reinterpret_cast<std::decay_t<decltype(array)>>(base + at);
      at += round_up(count * static_cast<index_t>(sizeof(*array)), 256);
    };
    take(mean, 1);
    take(shared, columns);
    take(sorted, columns);
    take(numbers, columns);
    take(order, columns);
    take(is_chosen, columns);
    take(before, columns);
    std::byte* rest;
    take(rest, static_cast<index_t>(needed));
    scratch = rest;
    bytes = at;
  }
};

/// Where the run of a head begins.
struct head_begin {
  int head_dim;
  __host__ __device__ int operator()(int head) const { return head * head_dim; }
};

/// Calls of CUB with `bytes` at `scratch`, or with null to learn the bytes.
inline cudaError_t sort_columns(void* scratch, std::size_t& bytes, const double* keys,
                                double* sorted, const std::int32_t* numbers, std::int32_t* order,
                                index_t columns, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairsDescending(scratch, bytes, keys, sorted, numbers, order,
                                                   static_cast<int>(columns), 0, 64, stream);
}
inline cudaError_t sort_heads(void* scratch, std::size_t& bytes, const double* keys, double* sorted,
                              const std::int32_t* numbers, std::int32_t* order, index_t heads,
                              index_t head_dim, cudaStream_t stream) {
  const auto begin = thrust::make_transform_iterator(thrust::counting_iterator<int>(0),
                                                     head_begin{static_cast<int>(head_dim)});
  return cub::DeviceSegmentedRadixSort::SortPairsDescending(
      scratch, bytes, keys, sorted, numbers, order, static_cast<int>(heads * head_dim),
      static_cast<int>(heads), begin, begin + 1, 0, 64, stream);
}
inline cudaError_t count_before(void* scratch, std::size_t& bytes, const std::int32_t* is_chosen,
                                std::int32_t* before, index_t columns, cudaStream_t stream) {
  return cub::DeviceScan::ExclusiveSum(scratch, bytes, is_chosen, before, static_cast<int>(columns),
                                       stream);
}

/// Bytes that the most demanding of these calls needs.
inline status scratch_for(const char* function, index_t columns, std::size_t& bytes) {
  bytes = 0;
  const auto ask = [&](auto call) {
    std::size_t needed = 0;
    const cudaError_t code = call(needed);
    bytes = bytes < needed ? needed : bytes;
    return qeft::detail::cuda_status(code, function);
  };
  double* const d = nullptr;
  std::int32_t* const i = nullptr;
  if (status s = ask(
          [&](std::size_t& n) { return sort_columns(nullptr, n, d, d, i, i, columns, nullptr); });
      !s.ok()) {
    return s;
  }
  if (status s = ask(
          [&](std::size_t& n) { return sort_heads(nullptr, n, d, d, i, i, columns, 1, nullptr); });
      !s.ok()) {
    return s;
  }
  return ask([&](std::size_t& n) { return count_before(nullptr, n, i, i, columns, nullptr); });
}

/// A thread for each of `count` elements.
template <class... Parameters, class... Arguments>
status for_each_element(const char* what, cudaStream_t stream, index_t count,
                        void (*kernel)(Parameters...), const Arguments&... arguments) {
  const dim3 grid(static_cast<unsigned>(ceil_div(count, kernel::selection_threads)));
  return qeft::detail::launch_kernel<Parameters...>(what, kernel, grid, kernel::selection_threads,
                                                    0, stream, arguments...);
}

inline status check_columns(const char* function, index_t columns) {
  constexpr index_t most = index_t{1} << 30;
  if (columns >= 0 && columns <= most) return {};
  return refuse(text(function, ": columns is ", columns, ", but must be between 0 and 2^30"));
}

/// Columns, k, the workspace, and that CUB, which takes it for its own, finds no earlier error.
inline status check_choice(const char* function, const on_stream& exec, index_t columns, index_t k,
                           std::size_t& scratch_bytes) {
  if (status s = check_columns(function, columns); !s.ok()) return s;
  if (k < 0 || k > columns) {
    return refuse(text(function, ": k is ", k, ", but must be between 0 and ", columns));
  }
  if (const cudaError_t earlier = cudaPeekAtLastError(); earlier != cudaSuccess) {
    return {errc::device_error,
            text(function, ": an earlier CUDA call failed and left its error (cudaGetLastError): ",
                 cudaGetErrorString(earlier))};
  }
  if (status s = scratch_for(function, columns, scratch_bytes); !s.ok()) return s;
  const selection_space space(nullptr, columns, scratch_bytes);
  if (space.bytes <= exec.workspace.size()) {
    return check_workspace(function, exec, space.bytes);
  }
  return refuse(text(function, ": exec.workspace has ", exec.workspace.size(),
                     " bytes, but must have ", space.bytes, " (selection_workspace_bytes)"));
}

/// Sets is_chosen in the workspace. @param s (heads.value_heads, heads.repeats, heads.head_dim)
inline status mark_best(const char* function, cudaStream_t stream, const selection_space& space,
                        const double* s, const kernel::head_choice& heads) {
  const index_t count = heads.value_heads * heads.head_dim;
  if (status r = for_each_element(function, stream, count, kernel::number<std::int32_t>,
                                  space.numbers, count);
      !r.ok()) {
    return r;
  }
  const double* keys = s;
  if (heads.value_heads > 1 || heads.repeats > 1) {
    keys = space.shared;
    if (status r = for_each_element(function, stream, count, kernel::add_repeats<double>, heads, s,
                                    space.shared);
        !r.ok()) {
      return r;
    }
  }
  std::size_t bytes = space.scratch_bytes;
  const cudaError_t code = heads.value_heads == 1
                               ? sort_columns(space.scratch, bytes, keys, space.sorted,
                                              space.numbers, space.order, count, stream)
                               : sort_heads(space.scratch, bytes, keys, space.sorted, space.numbers,
                                            space.order, heads.value_heads, heads.head_dim, stream);
  if (code != cudaSuccess) return qeft::detail::cuda_status(code, function);
  return for_each_element(function, stream, count, kernel::mark_chosen<std::int32_t>, heads,
                          space.order, space.is_chosen);
}

/// Sets `before` in the workspace from is_chosen.
inline status count_before(const char* function, cudaStream_t stream, const selection_space& space,
                           index_t columns) {
  std::size_t bytes = space.scratch_bytes;
  return qeft::detail::cuda_status(
      count_before(space.scratch, bytes, space.is_chosen, space.before, columns, stream), function);
}

/// Lists what is_chosen in the workspace says.
inline status list_columns(const char* function, cudaStream_t stream, const selection_space& space,
                           index_t columns, std::int32_t* chosen) {
  if (status s = count_before(function, stream, space, columns); !s.ok()) return s;
  return for_each_element(function, stream, columns, kernel::list_columns<std::int32_t>,
                          space.is_chosen, space.before, columns, chosen);
}

/// weak_last inside each of `heads` heads.
inline status weak_last(const char* name, const on_stream& exec, index_t size, index_t heads,
                        span<const std::int32_t> weak, std::int32_t* source) {
  std::size_t scratch = 0;
  const index_t k = weak.size();
  if (status s = check_choice(name, exec, size, k, scratch); !s.ok()) return s;
  if (heads < 1 || size % heads != 0 || k % heads != 0) {
    return refuse(text(name, ": heads is ", heads, ", but must divide both the ", size,
                       " columns and the ", k, " weak ones"));
  }
  if (size == 0) return {};
  if (status s = check_array(name, {"source", source}); !s.ok()) return s;
  if (k > 0) {
    if (status s = check_array(name, {"weak", weak.data()}); !s.ok()) return s;
  }
  const selection_space space(exec.workspace.data(), size, scratch);
  const cudaError_t code = cudaMemsetAsync(
      space.is_chosen, 0, static_cast<std::size_t>(size) * sizeof(std::int32_t), exec.stream);
  if (code != cudaSuccess) return qeft::detail::cuda_status(code, name);
  if (k > 0) {
    if (status s = for_each_element(name, exec.stream, k, kernel::mark_listed<std::int32_t>,
                                    weak.data(), k, space.is_chosen);
        !s.ok()) {
      return s;
    }
  }
  if (status s = count_before(name, exec.stream, space, size); !s.ok()) return s;
  return for_each_element(name, exec.stream, size, kernel::order_chosen_last<std::int32_t>,
                          space.is_chosen, space.before, size, size / heads, k / heads, source);
}

}  // namespace device::detail

/// sum[j] += x[t, j]^2 over the tokens, in double and in their order: what
/// solver::diagonal_accumulator::add does, bit for bit, sample by sample.
///
/// @param exec returns once the work is on its stream; no workspace is needed
/// @param x    (tokens, columns) row-major; float, half_bits or bf16_bits. The host refuses NaN and
///             infinity; here the sum of such a column becomes NaN or infinite
/// @param sum  (columns), zeros at first
template <class X>
status add_column_squares(const on_stream& exec, const X* x, index_t tokens, index_t columns,
                          double* sum) {
  namespace d = device::detail;
  static_assert(std::is_same_v<X, float> || d::is_half_v<X>,
                "qeft::add_column_squares: x must be of float, qeft::half_bits or qeft::bf16_bits");
  constexpr const char* name = "add_column_squares";
  if (status s = d::check_columns(name, columns); !s.ok()) return s;
  if (tokens < 0) {
    return d::refuse(text(name, ": tokens is ", tokens, ", but must not be negative"));
  }
  if (tokens == 0 || columns == 0) return {};
  if (status s = d::check_array(name, {"x", x}); !s.ok()) return s;
  if (status s = d::check_array(name, {"sum", sum}); !s.ok()) return s;
  return d::for_each_element("add_column_squares: the launch", exec.stream, columns,
                             kernel::add_column_squares<X>, x, tokens, columns, sum);
}

/// diag(H) = 2 / tokens * sum, what solver::diagonal_accumulator::diagonal returns, bit for bit.
///
/// @param exec   returns once the work is on its stream; no workspace is needed
/// @param sum    (columns), of add_column_squares
/// @param tokens that were added; with none the diagonal is 0
/// @param out    (columns); may be `sum`
inline status hessian_diagonal(const on_stream& exec, const double* sum, index_t columns,
                               index_t tokens, double* out) {
  namespace d = device::detail;
  constexpr const char* name = "hessian_diagonal";
  if (status s = d::check_columns(name, columns); !s.ok()) return s;
  if (tokens < 0) {
    return d::refuse(text(name, ": tokens is ", tokens, ", but must not be negative"));
  }
  if (columns == 0) return {};
  if (status s = d::check_array(name, {"sum", sum}); !s.ok()) return s;
  if (status s = d::check_array(name, {"out", out}); !s.ok()) return s;
  const double factor = tokens == 0 ? 0.0 : 2.0 / static_cast<double>(tokens);
  return d::for_each_element("hessian_diagonal: the launch", exec.stream, columns,
                             kernel::scale<double>, sum, columns, factor, out);
}

/// Bytes of workspace that each of the functions below needs for so many columns; 0 where CUB
/// cannot tell, which the function called then reports. Depends on the current device.
inline index_t selection_workspace_bytes(const on_stream&, index_t columns) {
  namespace d = device::detail;
  std::size_t scratch = 0;
  if (!d::check_columns("", columns).ok() || !d::scratch_for("", columns, scratch).ok()) return 0;
  return d::selection_space(nullptr, columns, scratch).bytes;
}

/// The k columns of greatest sensitivity, in ascending order of column; among equals the lower
/// column wins: qeft::top_k of the host.
///
/// @param exec        returns once the work is on its stream; with selection_workspace_bytes
/// @param sensitivity (columns). Finite and not negative, which the host checks and a stream
///                    cannot: else NaN with a positive sign counts as more than infinity, with a
///                    negative one as less than 0, and what is below 0 as less than 0
/// @param chosen      (k)
inline status top_k(const on_stream& exec, const double* sensitivity, index_t columns, index_t k,
                    std::int32_t* chosen) {
  namespace d = device::detail;
  constexpr const char* name = "top_k";
  std::size_t scratch = 0;
  if (status s = d::check_choice(name, exec, columns, k, scratch); !s.ok()) return s;
  if (k == 0) return {};
  if (status s = d::check_array(name, {"sensitivity", sensitivity}); !s.ok()) {
    return s;
  }
  if (status s = d::check_array(name, {"chosen", chosen}); !s.ok()) return s;
  const d::selection_space space(exec.workspace.data(), columns, scratch);
  if (status s = d::mark_best(name, exec.stream, space, sensitivity, {1, 1, columns, k}); !s.ok()) {
    return s;
  }
  return d::list_columns(name, exec.stream, space, columns, chosen);
}

/// The k / heads most sensitive channels of every head, shared by the query heads of a value head:
/// qeft::top_k_per_head of the host.
///
/// @param exec        @param sensitivity (columns) as for top_k
/// @param columns     heads * head_dim
/// @param heads       query heads, a multiple of value_heads; divides columns and k
/// @param chosen      (k), ascending
inline status top_k_per_head(const on_stream& exec, const double* sensitivity, index_t columns,
                             index_t heads, index_t value_heads, index_t k, std::int32_t* chosen) {
  namespace d = device::detail;
  constexpr const char* name = "top_k_per_head";
  std::size_t scratch = 0;
  if (status s = d::check_choice(name, exec, columns, k, scratch); !s.ok()) return s;
  if (heads < 1 || value_heads < 1 || heads % value_heads != 0 || columns % heads != 0 ||
      k % heads != 0) {
    return d::refuse(text(name, ": heads is ", heads, " with value_heads = ", value_heads,
                          ", but heads must be a multiple of value_heads and divide both the ",
                          columns, " columns and k = ", k));
  }
  if (k == 0) return {};
  if (status s = d::check_array(name, {"sensitivity", sensitivity}); !s.ok()) {
    return s;
  }
  if (status s = d::check_array(name, {"chosen", chosen}); !s.ok()) return s;
  const d::selection_space space(exec.workspace.data(), columns, scratch);
  const kernel::head_choice choice{value_heads, heads / value_heads, columns / heads, k / heads};
  if (status s = d::mark_best(name, exec.stream, space, sensitivity, choice); !s.ok()) return s;
  return d::list_columns(name, exec.stream, space, columns, chosen);
}

/// Adds a layer to the global selection: sum[c] += s[c] / mean(s), where s is among the k largest
/// of the layer (Algorithm 1), or everywhere: qeft::global_selection::add of the host. A layer of
/// mean 0 adds nothing. top_k of `sum` then chooses.
///
/// @param exec        @param sensitivity (columns) as for top_k
/// @param sum         (columns), zeros at first
inline status add_to_selection(const on_stream& exec, const double* sensitivity, index_t columns,
                               index_t k, accumulation which, double* sum) {
  namespace d = device::detail;
  constexpr const char* name = "add_to_selection";
  std::size_t scratch = 0;
  if (status s = d::check_choice(name, exec, columns, k, scratch); !s.ok()) return s;
  if (columns == 0) return {};
  if (status s = d::check_array(name, {"sensitivity", sensitivity}); !s.ok()) {
    return s;
  }
  if (status s = d::check_array(name, {"sum", sum}); !s.ok()) return s;
  const d::selection_space space(exec.workspace.data(), columns, scratch);
  if (status s = qeft::detail::launch_kernel(name, kernel::mean_in_order<double>, dim3(1),
                                             kernel::selection_threads, 0, exec.stream, sensitivity,
                                             columns, space.mean);
      !s.ok()) {
    return s;
  }
  const std::int32_t* is_chosen = nullptr;
  if (which == accumulation::top_k) {
    if (status s = d::mark_best(name, exec.stream, space, sensitivity, {1, 1, columns, k});
        !s.ok()) {
      return s;
    }
    is_chosen = space.is_chosen;
  }
  return d::for_each_element(name, exec.stream, columns, kernel::add_in_means<double, std::int32_t>,
                             sensitivity, space.mean, is_chosen, columns, sum);
}

/// The permutation that moves weak columns to the end: qeft::weak_last of the host. Gathers columns
/// (qeft::gather) and, for o_proj and down_proj, rows (qeft::permute_rows).
///
/// @param exec   returns once the work is on its stream; with selection_workspace_bytes
/// @param size   columns
/// @param weak   device memory, in [0, size) without duplicates, else written out of bounds or with
///               gaps
/// @param source (size); source[i] is the column that moves to i
inline status weak_last(const on_stream& exec, index_t size, span<const std::int32_t> weak,
                        std::int32_t* source) {
  return device::detail::weak_last("weak_last", exec, size, 1, weak, source);
}

/// weak_last inside each of `heads` heads of equal size: qeft::weak_last_per_head of the host.
///
/// @param exec   @param size @param weak @param source as for weak_last; every head must hold
///               equally many of the weak columns, else `source` is written out of bounds or with
///               gaps
/// @param heads  divides size and the number of weak columns
inline status weak_last_per_head(const on_stream& exec, index_t size, index_t heads,
                                 span<const std::int32_t> weak, std::int32_t* source) {
  return device::detail::weak_last("weak_last_per_head", exec, size, heads, weak, source);
}

}  // namespace QEFT_TARGET
}  // namespace qeft
