// SPDX-License-Identifier: Apache-2.0
// device_memory as a memory policy: memory of the current device. No call changes the device.
#pragma once

#include <cuda_runtime_api.h>

#include <new>

#include "qeft/core/buffer.hpp"
#include "qeft/core/status.hpp"
#include "qeft/core/text.hpp"

namespace qeft {

inline namespace QEFT_TARGET {

namespace detail {

/// Throws std::bad_alloc when the device has no memory left, else errc::device_error.
inline void check_cuda(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // not for the next caller to find
  if (code == cudaErrorMemoryAllocation) throw std::bad_alloc();
  fail(errc::device_error, text(call, " failed: ", cudaGetErrorString(code)));
}

}  // namespace detail

}  // namespace QEFT_TARGET

/// Every call waits until it is done, and for the work of the default stream and of streams that
/// follow it: for loading a model, not for a forward pass. Work of non-blocking streams on the same
/// memory must be waited for before.
template <>
struct memory_operations<device_memory> {
  static QEFT_ALWAYS_INLINE void* allocate(device_memory&, std::size_t bytes) {
    void* p = nullptr;
    detail::check_cuda(cudaMalloc(&p, bytes), "cudaMalloc");
    return p;
  }
  static QEFT_ALWAYS_INLINE void deallocate(device_memory&, void* p, std::size_t) noexcept {
    static_cast<void>(cudaFree(p));  // fails only after errors that were reported already
  }
  static QEFT_ALWAYS_INLINE void clear(device_memory&, void* p, std::size_t bytes) {
    detail::check_cuda(cudaMemset(p, 0, bytes), "cudaMemset");
    wait();
  }
  static QEFT_ALWAYS_INLINE void copy(device_memory&, void* to, const void* from,
                                      std::size_t bytes) {
    detail::check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice), "cudaMemcpy");
    wait();
  }
  static QEFT_ALWAYS_INLINE void upload(device_memory&, void* to, const void* from,
                                        std::size_t bytes) {
    detail::check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    wait();
  }
  static QEFT_ALWAYS_INLINE void download(device_memory&, void* to, const void* from,
                                          std::size_t bytes) {
    detail::check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }

 private:
  /// cudaMemset, and cudaMemcpy but from a device to the host, may return before the device has
  /// written; streams that do not wait for the default one would then read what was there before.
  static QEFT_ALWAYS_INLINE void wait() {
    detail::check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  }
};

}  // namespace qeft
