// SPDX-License-Identifier: Apache-2.0
// Where work for a device goes.
#pragma once

#include <cuda_runtime.h>

#include "qeft/core/memory.hpp"
#include "qeft/core/status.hpp"
#include "qeft/core/text.hpp"

namespace qeft {

/// The executor of a device: functions that take it put their work on `stream` and return. They do
/// not wait, allocate or change the current device, which must be that of the stream, and can be
/// captured into a graph.
struct on_stream {
  cudaStream_t stream = nullptr;
  /// Device memory that calls may use until their work is done, 256-byte aligned: as much as
  /// workspace_bytes says. Calls on one stream can share it.
  span<std::byte> workspace = {};
};

inline namespace QEFT_TARGET {
namespace detail {

/// What a launch or a query of the CUDA runtime returned, as a status.
inline status cuda_status(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return {};
  static_cast<void>(cudaGetLastError());  // not for the next caller to find
  return {code == cudaErrorMemoryAllocation ? errc::out_of_memory : errc::device_error,
          text(what, " failed: ", cudaGetErrorString(code))};
}

/// Starts a kernel and says whether that failed; an error that was there before is not looked at.
template <class... Parameters>
status launch_kernel(const char* what, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                     int shared_bytes, cudaStream_t stream, Parameters... arguments) {
  void* pointers[] = {&arguments...};
  return cuda_status(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads),
                                      pointers, static_cast<std::size_t>(shared_bytes), stream),
                     what);
}

/// The same, of a kernel whose blocks form clusters.
template <class... Parameters>
status launch_cluster(const char* what, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                      int cluster_blocks, int shared_bytes, cudaStream_t stream,
                      Parameters... arguments) {
  void* pointers[] = {&arguments...};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cuda_status(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers),
                     what);
}

/// An attribute of the current device.
inline status device_attribute(int& value, cudaDeviceAttr attribute) {
  int device = 0;
  if (status s = cuda_status(cudaGetDevice(&device), "cudaGetDevice"); !s.ok()) return s;
  return cuda_status(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
}

}  // namespace detail
}  // namespace QEFT_TARGET
}  // namespace qeft
