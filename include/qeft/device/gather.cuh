// SPDX-License-Identifier: Apache-2.0
// Columns of activations on a device in another order, or some of them.
#pragma once

#include "qeft/device/checks.cuh"
#include "qeft/kernel/gather.cuh"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

/// @tparam T of activations. @param function named in errors
template <class T>
status check_gather(const char* function, const T* x, index_t tokens, index_t columns,
                    span<const std::int32_t> index, const T* out) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4),
                "qeft: gather and scatter are for elements of 16 or 32 bits");
  constexpr index_t most = (index_t{1} << 31) - 1;
  if (tokens < 0 || columns < 0 || columns > most || index.size() < 0 || index.size() > most) {
    return refuse(text(function, ": tokens is ", tokens, ", columns ", columns, " and index has ",
                       index.size(),
                       " entries, but they must not be negative, and the latter two "
                       "at most 2^31 - 1"));
  }
  if (tokens == 0 || index.empty()) return {};
  if (columns == 0) return refuse(text(function, ": columns is 0, but index is not empty"));
  for (const named_array& a :
       {named_array{"x", x}, named_array{"index", index.data()}, named_array{"out", out}}) {
    if (status s = check_array(function, a); !s.ok()) return s;
  }
  return {};
}

/// Elements as kernels move them.
template <class T>
using raw = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;

/// @param kernel gather_columns or scatter_columns
template <class T>
status launch_gather(const char* what, const on_stream& exec, const T* x, index_t tokens,
                     index_t columns, span<const std::int32_t> index, T* out,
                     void (*kernel)(const raw<T>*, index_t, index_t, const std::int32_t*, index_t,
                                    raw<T>*)) {
  // The index is read once for four tokens.
  const index_t rows = ceil_div(tokens, 4);
  const dim3 grid(static_cast<unsigned>(ceil_div(index.size(), kernel::gather_threads)),
                  static_cast<unsigned>(rows < 65535 ? rows : 65535));
  return qeft::detail::launch_kernel(what, kernel, grid, kernel::gather_threads, 0, exec.stream,
                                     reinterpret_cast<const raw<T>*>(x), tokens, columns,
                                     index.data(), index.size(), reinterpret_cast<raw<T>*>(out));
}

}  // namespace device::detail

/// Whether gather would accept these operands, and why not.
template <class T>
status supports_gather(const on_stream&, const T* x, index_t tokens, index_t columns,
                       span<const std::int32_t> index, const T* out) {
  return device::detail::check_gather("gather", x, tokens, columns, index, out);
}

/// out[t, i] = x[t, index[i]]: all columns through a permutation, or a choice of them, such as the
/// weak ones, whose activations are all that training keeps of a layer's (METHOD section 6).
///
/// @param exec  returns once the work is on its stream; no workspace is needed
/// @param x     (tokens, columns) row-major; elements of 16 or 32 bits
/// @param index in device memory, entries in [0, columns): others are read out of bounds
/// @param out   (tokens, index.size()) row-major, must not overlap x
/// @return what supports_gather says, or that the launch failed; then nothing is written
template <class T>
status gather(const on_stream& exec, const T* x, index_t tokens, index_t columns,
              span<const std::int32_t> index, T* out) {
  if (status s = supports_gather(exec, x, tokens, columns, index, out); !s.ok()) return s;
  if (tokens == 0 || index.empty()) return {};
  return device::detail::launch_gather("gather: the launch", exec, x, tokens, columns, index, out,
                                       kernel::gather_columns<device::detail::raw<T>>);
}

/// Whether scatter would accept these operands, and why not.
template <class T>
status supports_scatter(const on_stream&, const T* x, index_t tokens, index_t columns,
                        span<const std::int32_t> index, const T* out) {
  return device::detail::check_gather("scatter", x, tokens, columns, index, out);
}

/// out[t, index[i]] = x[t, i], the inverse of gather: with a permutation every element of `out` is
/// written, else the others stay as they are.
///
/// @param exec  returns once the work is on its stream; no workspace is needed
/// @param x     (tokens, index.size()) row-major; elements of 16 or 32 bits
/// @param index in device memory, entries in [0, columns), else written out of bounds; no two alike,
///              else any one of their columns is stored
/// @param out   (tokens, columns) row-major, must not overlap x
/// @return what supports_scatter says, or that the launch failed; then nothing is written
template <class T>
status scatter(const on_stream& exec, const T* x, index_t tokens, index_t columns,
               span<const std::int32_t> index, T* out) {
  if (status s = supports_scatter(exec, x, tokens, columns, index, out); !s.ok()) return s;
  if (tokens == 0 || index.empty()) return {};
  return device::detail::launch_gather("scatter: the launch", exec, x, tokens, columns, index, out,
                                       kernel::scatter_columns<device::detail::raw<T>>);
}

}  // namespace QEFT_TARGET
}  // namespace qeft
