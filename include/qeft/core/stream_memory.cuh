// SPDX-License-Identifier: Apache-2.0
// Memory policies for owners that are made, filled and freed in the order of a stream, and for the
// host memory which copies of theirs do not wait for.
#pragma once

#include "qeft/core/device_memory.cuh"

namespace qeft {

/// Memory of the current pool of a stream's device (cudaMallocAsync), in the order of `stream`, which
/// must outlive every buffer: what uses the memory runs on the stream, or waits for an event that
/// was recorded there after the owner was made; the owner may be destroyed while such work of the
/// stream is still to come. Work on other streams must be done, or be waited for by the stream,
/// before.
///
/// The device is never synchronised. Allocations, clears and copies on the device return at once.
/// Uploads from pageable memory return when the bytes have been read, for which they may wait for
/// earlier work of the stream; from pinned memory at once: the bytes must stay as they are until
/// the stream has read them. Downloads wait for the stream and are then done.
struct stream_memory {
  using space = device_memory;

  cudaStream_t stream = nullptr;

  QEFT_ALWAYS_INLINE void* allocate(std::size_t bytes) const {
    void* p = nullptr;
    detail::check_cuda(cudaMallocAsync(&p, bytes, stream), "cudaMallocAsync");
    return p;
  }
  QEFT_ALWAYS_INLINE void deallocate(void* p, std::size_t) const noexcept {
    static_cast<void>(cudaFreeAsync(p, stream));  // fails only after errors reported already
  }
  QEFT_ALWAYS_INLINE void clear(void* p, std::size_t bytes) const {
    detail::check_cuda(cudaMemsetAsync(p, 0, bytes, stream), "cudaMemsetAsync");
  }
  QEFT_ALWAYS_INLINE void copy(void* to, const void* from, std::size_t bytes) const {
    detail::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream),
                       "cudaMemcpyAsync");
  }
  QEFT_ALWAYS_INLINE void upload(void* to, const void* from, std::size_t bytes) const {
    detail::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream),
                       "cudaMemcpyAsync");
  }
  QEFT_ALWAYS_INLINE void download(void* to, const void* from, std::size_t bytes) const {
    detail::check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream),
                       "cudaMemcpyAsync");
    detail::check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
};

/// Page-locked host memory (cudaMallocHost): copies to and from a device run beside the host.
struct pinned_memory {
  using space = host_memory;

  static QEFT_ALWAYS_INLINE void* allocate(std::size_t bytes) {
    void* p = nullptr;
    detail::check_cuda(cudaMallocHost(&p, bytes), "cudaMallocHost");
    return p;
  }
  static QEFT_ALWAYS_INLINE void deallocate(void* p, std::size_t) noexcept {
    static_cast<void>(cudaFreeHost(p));
  }
};

}  // namespace qeft
