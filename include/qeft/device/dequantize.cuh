// SPDX-License-Identifier: Apache-2.0
// A quantised layer as a plain matrix on a device.
#pragma once

#include "qeft/device/checks.cuh"
#include "qeft/kernel/dequantize.cuh"

namespace qeft {
inline namespace QEFT_TARGET {
/// Whether dequantize would accept these operands, and why not.
template <class F, class W, class L, class M, class Y>
status supports_dequantize(const on_stream&, const quantized_matrix_view<F, W, L, M>& w,
                           const Y* out) {
  namespace d = device::detail;
  static_assert(std::is_same_v<Y, float> || d::is_half_v<Y>,
                "qeft::dequantize: out must be of float, qeft::half_bits or qeft::bf16_bits");
  static_assert(std::is_same_v<M, device_memory>,
                "qeft::dequantize on a stream needs a matrix in device memory");
  static_assert(std::is_same_v<L, layout::fragment>,
                "qeft::dequantize on a stream needs qeft::layout::fragment; repack the matrix");
  if (status s = d::check_layer("dequantize", w); !s.ok()) return s;
  if (status s = d::check_array("dequantize", {"out", out}); !s.ok()) return s;
  constexpr index_t most_blocks = (index_t{1} << 31) - 1;
  if (ceil_div(w.in_channels, kernel::dequantize_columns<Y>) >
      most_blocks / ceil_div(w.out_channels, 16)) {
    return d::refuse(text("dequantize: w is ", w.out_channels, " x ", w.in_channels,
                          ", but at most 2^31 - 1 tiles of 16 x ", kernel::dequantize_columns<Y>,
                          " can be launched"));
  }
  return d::check_capability("dequantize");
}

/// W as a matrix, weak columns included, each weight where the layer has it before any reordering
/// by kernels: out[n * IC + c] is qeft::dequantize(w, n, c) rounded to Y, bit for bit (a NaN among
/// the weak columns stays one).
///
/// @param exec returns once the work is on its stream; no workspace is needed
/// @param w    OC x IC layer
/// @param out  (OC, IC) row-major; float, half_bits or bf16_bits. Any address and IC will do; rows
///             are written by 16 bytes but for their ends
/// @return what supports_dequantize says, or that the launch failed; then nothing is written
template <class F, class W, class L, class M, class Y>
status dequantize(const on_stream& exec, const quantized_matrix_view<F, W, L, M>& w, Y* out) {
  if (status s = supports_dequantize(exec, w, out); !s.ok()) return s;
  const index_t blocks = ceil_div(w.in_channels, kernel::dequantize_columns<Y>) *
                         ceil_div(w.out_channels, layout::fragment::rows);
  return qeft::detail::launch_kernel(
      "dequantize: the launch", kernel::dequantize<quantized_matrix_view<F, W, L, M>, Y>,
      dim3(static_cast<unsigned>(blocks)), kernel::dequantize_threads, 0, exec.stream, w, out);
}

/// supports_dequantize of a layer whose format is known at run time.
template <class Formats = device_formats, class M, class Y>
status supports_dequantize(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w,
                           const Y* out) {
  return device::detail::with_any_view<Formats>(
      w, [&](const auto& view) { return supports_dequantize(exec, view, out); });
}

/// dequantize of a layer whose format is known at run time, out of Formats. A format that is not
/// built in is errc::unsupported.
template <class Formats = device_formats, class M, class Y>
status dequantize(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w, Y* out) {
  return device::detail::with_any_view<Formats>(
      w, [&](const auto& view) { return dequantize(exec, view, out); });
}

}  // namespace QEFT_TARGET
}  // namespace qeft
