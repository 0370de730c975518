// SPDX-License-Identifier: Apache-2.0
// Layers between host and device, in the order of a stream.
#pragma once

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/core/stream_memory.cuh"
#include "qeft/device/on_stream.cuh"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

/// Whether two matrices describe the same layer, else what differs. @param function named in errors
inline status check_same(const char* function, const matrix_descriptor& from,
                         const matrix_descriptor& to) {
  const auto differ = [&](const char* field, const auto& a, const auto& b) {
    return status(errc::invalid_argument,
                  text(function, ": ", field, " is ", a, " in from, but ", b, " in to"));
  };
  if (from == to) return {};
  if (from.out_channels != to.out_channels) {
    return differ("out_channels", from.out_channels, to.out_channels);
  }
  if (from.in_channels != to.in_channels) {
    return differ("in_channels", from.in_channels, to.in_channels);
  }
  if (from.bits != to.bits) return differ("bits", from.bits, to.bits);
  if (from.group_size != to.group_size) return differ("group_size", from.group_size, to.group_size);
  if (from.zero != to.zero) return differ("zero", to_string(from.zero), to_string(to.zero));
  if (from.scalar != to.scalar) {
    return differ("scalar", to_string(from.scalar), to_string(to.scalar));
  }
  if (from.weak != to.weak) return differ("weak", to_string(from.weak), to_string(to.weak));
  if (from.weak_columns != to.weak_columns) {
    return differ("weak_columns", from.weak_columns, to.weak_columns);
  }
  return differ("heads", from.heads, to.heads);
}

/// @tparam From @tparam To memory spaces
template <class From, class To, class T>
status copy_array(cudaStream_t stream, const char* what, span<const T> from, span<T> to) {
  constexpr bool from_host = std::is_same_v<From, host_memory>;
  constexpr bool to_host = std::is_same_v<To, host_memory>;
  static_assert(!from_host || !to_host, "qeft::copy on a stream needs the device on one side");
  if (from.empty()) return {};
  return qeft::detail::cuda_status(
      cudaMemcpyAsync(to.data(), from.data(), static_cast<std::size_t>(from.size()) * sizeof(T),
                      from_host ? cudaMemcpyHostToDevice
                      : to_host ? cudaMemcpyDeviceToHost
                                : cudaMemcpyDeviceToDevice,
                      stream),
      what);
}

}  // namespace device::detail

/// Whether copy would accept these operands, and why not.
template <class Layout, class From, class To>
status supports_copy(const on_stream&, const quantized_matrix<Layout, From>& from,
                     const quantized_matrix<Layout, To>& to) {
  return device::detail::check_same("copy", from.descriptor(), to.descriptor());
}

/// `to` becomes the same layer as `from`, every byte of it, index of weak columns included.
///
/// Never synchronises the device. Between matrices of the device, and with pinned memory on the
/// host's side (pinned_memory), the call returns at once, and both matrices must live, and `from`
/// must not change, until the stream has copied. Pageable memory of the host's is read before the
/// call returns, and written when it returns; the call may then wait for earlier work of the
/// stream, and cannot be captured into a graph.
///
/// @param exec the stream; no workspace is needed
/// @param from @param to of one layout and one descriptor, at least one of them of the device
/// @return what differs between them, or that a transfer failed; then `to` may be half written
template <class Layout, class From, class To>
status copy(const on_stream& exec, const quantized_matrix<Layout, From>& from,
            quantized_matrix<Layout, To>& to) {
  namespace d = device::detail;
  if (status s = supports_copy(exec, from, to); !s.ok()) return s;
  if (static_cast<const void*>(&from) == static_cast<const void*>(&to)) return {};
  const auto part = [&](const char* what, auto source, auto destination) {
    return d::copy_array<typename From::space, typename To::space>(exec.stream, what, source,
                                                                   destination);
  };
  if (status s = part("copy: codes", from.codes(), to.codes()); !s.ok()) return s;
  if (status s = part("copy: scales", from.scales(), to.scales()); !s.ok()) return s;
  if constexpr (!Layout::zeros_in_scales) {
    if (status s = part("copy: zeros", from.zeros(), to.zeros()); !s.ok()) return s;
  }
  if (status s = part("copy: weak", from.weak(), to.weak()); !s.ok()) return s;
  return part("copy: weak_index", from.weak_index(), weak_index_access::of(to));
}

}  // namespace QEFT_TARGET
}  // namespace qeft
