// SPDX-License-Identifier: Apache-2.0
// Layers from one layout to another on a device, and their rows in another order.
#pragma once

#include "qeft/device/checks.cuh"
#include "qeft/device/copy.cuh"
#include "qeft/kernel/repack.cuh"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

/// A layer on its way to another layout: its arrays, and the row that each row comes from.
template <class From, class To, class FromMemory, class ToMemory>
struct layout_change {
  const char* function;  // named in errors
  cudaStream_t stream;
  const quantized_matrix<From, FromMemory>& from;
  quantized_matrix<To, ToMemory>& to;
  kernel::row_source source;
  layout::extent e = from.descriptor().extent();

  template <class... Parameters, class... Arguments>
  status launch(void (*kernel)(Parameters...), dim3 grid, index_t threads,
                const Arguments&... arguments) const {
    return qeft::detail::launch_kernel<Parameters...>(
        function, kernel, grid, static_cast<unsigned>(threads), 0, stream, arguments...);
  }
  /// Blocks of 128 threads with a warp for each row.
  dim3 rows() const { return {static_cast<unsigned>(ceil_div(e.out_channels, 4))}; }

  status clear() const {
    for (const span<std::byte> bytes : {to.codes(), to.scales(), to.zeros(), to.weak()}) {
      if (bytes.empty()) continue;
      const cudaError_t code =
          cudaMemsetAsync(bytes.data(), 0, static_cast<std::size_t>(bytes.size()), stream);
      if (code != cudaSuccess) return qeft::detail::cuda_status(code, function);
    }
    return {};
  }
  status move_scalars() const {
    if (e.groups == 0 && e.weak == 0) return {};
    using scalars = std::uint16_t;
    return launch(
        kernel::repack_scalars<To, From>, rows(), 128, e,
        kernel::scalar_arrays<const scalars>{from.scale_scalars(),
                                             reinterpret_cast<const scalars*>(from.zeros().data()),
                                             from.weak_scalars()},
        kernel::scalar_arrays<scalars>{
            to.scale_scalars(), reinterpret_cast<scalars*>(to.zeros().data()), to.weak_scalars()},
        source);
  }
  template <int Bits>
  status move_codes() const {
    if (e.dense == 0) return {};
    constexpr index_t warps = kernel::repack_warps<To>;
    constexpr index_t tiles_per_warp = 4;
    const index_t tiles = ceil_div(e.dense, To::template columns<Bits>);
    const index_t blocks = kernel::tiles_apart<To> ? ceil_div(tiles, warps * tiles_per_warp) : 1;
    const dim3 grid(static_cast<unsigned>(ceil_div(e.out_channels, To::rows)),
                    static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
    return launch(kernel::repack_codes<Bits, To, From>, grid, 32 * warps, e, from.code_words(),
                  to.code_words(), source);
  }
  template <int Bits>
  status move_zeros() const {
    if (e.groups == 0 || e.zero != zero_kind::integer) return {};
    return launch(kernel::repack_zeros<Bits, To, From>, rows(), 128, e,
                  reinterpret_cast<const std::uint32_t*>(from.zeros().data()),
                  reinterpret_cast<std::uint32_t*>(to.zeros().data()), source);
  }
  template <int Bits>
  status move_fields() const {
    if (status s = move_codes<Bits>(); !s.ok()) return s;
    return move_zeros<Bits>();
  }

  status run() const {
    if (status s = clear(); !s.ok()) return s;
    if (status s = move_scalars(); !s.ok()) return s;
    status result;
    visit_bits(from.descriptor().bits, [&](auto bits) {
      static_cast<void>(result = move_fields<bits>());  // nvcc takes it for a value that is dropped
    });
    if (!result.ok()) return result;
    return copy_array<device_memory, device_memory>(stream, function, from.weak_index(),
                                                    weak_index_access::of(to));
  }
};

template <class From, class To, class FromMemory, class ToMemory>
status check_change(const char* function, const quantized_matrix<From, FromMemory>& from,
                    const quantized_matrix<To, ToMemory>& to) {
  static_assert(!is_host_accessible_v<FromMemory> && !is_host_accessible_v<ToMemory>,
                "qeft::repack on a stream needs matrices in device memory");
  if (status s = check_same(function, from.descriptor(), to.descriptor()); !s.ok()) return s;
  if (static_cast<const void*>(&from) == static_cast<const void*>(&to)) {
    return refuse(text(function, ": from and to are one matrix, but must be two"));
  }
  return {};
}

}  // namespace device::detail

/// Whether repack would accept these operands, and why not.
template <class From, class To, class FromMemory, class ToMemory>
status supports_repack(const on_stream&, const quantized_matrix<From, FromMemory>& from,
                       const quantized_matrix<To, ToMemory>& to) {
  return device::detail::check_change("repack", from, to);
}

/// `to` becomes the same layer as `from`, in its own layout, with the bytes that repack on the host
/// gives it. For any two layouts whose members are QEFT_HOST_DEVICE.
///
/// @param exec returns once the work is on its stream; no workspace is needed
/// @param from @param to two matrices of the device with one descriptor. What `to` holds is
///             replaced, its index of weak columns included
/// @return what supports_repack says, or that a launch failed; then `to` may be half written
template <class From, class To, class FromMemory, class ToMemory>
status repack(const on_stream& exec, const quantized_matrix<From, FromMemory>& from,
              quantized_matrix<To, ToMemory>& to) {
  if (status s = supports_repack(exec, from, to); !s.ok()) return s;
  if (from.descriptor().out_channels == 0) return {};  // made without arguments, or moved from
  return device::detail::layout_change<From, To, FromMemory, ToMemory>{
      "repack", exec.stream, from, to, {nullptr}}
      .run();
}

/// Whether permute_rows would accept these operands, and why not.
template <class From, class To, class FromMemory, class ToMemory>
status supports_permute_rows(const on_stream&, const std::int32_t* source,
                             const quantized_matrix<From, FromMemory>& from,
                             const quantized_matrix<To, ToMemory>& to) {
  namespace d = device::detail;
  if (status s = d::check_change("permute_rows", from, to); !s.ok()) return s;
  if (from.descriptor().out_channels == 0) return {};  // made without arguments, or moved from
  return d::check_array("permute_rows", {"source", source});
}

/// Output channel n of `to` becomes output channel source[n] of `from`: codes, scales, zero points
/// and weak columns move; with another layout they are repacked as well. The bytes are those of
/// permuting first and packing then (METHOD section 4).
///
/// @param source (OC) in device memory, a permutation: entries outside of [0, OC) are read out of
///               bounds
/// @param from @param to as for repack
/// @return what supports_permute_rows says, or that a launch failed; then `to` may be half written
template <class From, class To, class FromMemory, class ToMemory>
status permute_rows(const on_stream& exec, const std::int32_t* source,
                    const quantized_matrix<From, FromMemory>& from,
                    quantized_matrix<To, ToMemory>& to) {
  if (status s = supports_permute_rows(exec, source, from, to); !s.ok()) return s;
  if (from.descriptor().out_channels == 0) return {};
  return device::detail::layout_change<From, To, FromMemory, ToMemory>{
      "permute_rows", exec.stream, from, to, {source}}
      .run();
}

}  // namespace QEFT_TARGET
}  // namespace qeft
