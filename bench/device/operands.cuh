// SPDX-License-Identifier: Apache-2.0
// What is multiplied: layers of real models, random and made on the device; cuBLAS as the peer.
#pragma once

#include <cublas_v2.h>

#include <vector>

#include "device/measure.cuh"
#include "qeft/qeft.cuh"
#include "support/shape.hpp"

namespace qeft_bench {

/// Linears as inference engines fuse them.
inline constexpr shape shapes[] = {
    {"llama2_7b/qkv", 12288, 4096},     {"llama2_7b/o", 4096, 4096},
    {"llama2_7b/gate_up", 22016, 4096}, {"llama2_7b/down", 4096, 11008},
    {"llama3_8b/qkv", 6144, 4096},      {"llama3_8b/gate_up", 28672, 4096},
    {"llama3_8b/down", 4096, 14336},    {"llama2_13b/qkv", 15360, 5120},
    {"llama2_13b/o", 5120, 5120},       {"llama2_13b/gate_up", 27648, 5120},
    {"llama2_13b/down", 5120, 13824},   {"llama2_70b/qkv", 10240, 8192},
    {"llama2_70b/o", 8192, 8192},       {"llama2_70b/gate_up", 57344, 8192},
    {"llama2_70b/down", 8192, 28672},
};

namespace kernel {

__device__ inline std::uint32_t scrambled(std::uint32_t x) {
  x = (x ^ x >> 16U) * 0x7feb352dU;
  x = (x ^ x >> 15U) * 0x846ca68bU;
  return x ^ x >> 16U;
}
/// Random bits where `mask` has ones.
__global__ void fill_words(std::uint32_t* words, index_t count, std::uint32_t mask) {
  const index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) words[i] = scrambled(static_cast<std::uint32_t>(i)) & mask;
}
/// Uniform in [mean - spread, mean + spread).
__global__ void fill_halves(qeft::half_bits* to, index_t count, float mean, float spread) {
  const index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const auto unit = static_cast<float>(scrambled(static_cast<std::uint32_t>(i)) >> 8U) * 0x1p-23F;
  to[i] = qeft::from_float<qeft::half_bits>(mean + spread * (unit - 1.0F));
}

}  // namespace kernel

inline unsigned blocks(index_t count) { return static_cast<unsigned>(qeft::ceil_div(count, 256)); }

using halves = qeft::buffer<qeft::half_bits, qeft::device_memory>;

inline halves random_halves(index_t count, float mean = 0.0F, float spread = 1.0F) {
  halves a(count);
  kernel::fill_halves<<<blocks(count), 256>>>(a.data(), count, mean, spread);
  return a;
}

using layer = qeft::quantized_matrix<qeft::layout::fragment, qeft::device_memory>;

/// Random codes and zero points, scales around 0.01, weak values in [-1, 1).
inline layer random_layer(const shape& s, int bits, index_t group_size, index_t k) {
  qeft::matrix_descriptor d;
  d.out_channels = s.out_channels;
  d.in_channels = s.in_channels;
  d.bits = bits;
  d.group_size = group_size;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = k;
  layer w(d);
  const auto words = [](qeft::span<std::byte> bytes, std::uint32_t mask) {
    const index_t count = bytes.size() / 4;
    if (count > 0) {
      kernel::fill_words<<<blocks(count), 256>>>(reinterpret_cast<std::uint32_t*>(bytes.data()),
                                                 count, mask);
    }
  };
  const auto scalars = [](qeft::span<std::byte> bytes, float mean, float spread) {
    const index_t count = bytes.size() / 2;
    if (count > 0) {
      kernel::fill_halves<<<blocks(count), 256>>>(reinterpret_cast<qeft::half_bits*>(bytes.data()),
                                                  count, mean, spread);
    }
  };
  words(w.codes(), ~0U);
  words(w.zeros(), bits == 3 ? 0x77777777U : ~0U);  // a zero point of 3 bits takes 4
  scalars(w.scales(), 0.01F, 0.005F);
  scalars(w.weak(), 0.0F, 1.0F);
  check(cudaDeviceSynchronize(), "random_layer");
  return w;
}

/// Copies of something that together exceed the caches: more than four times as large, and at least
/// eight, so that a graph runs long. @param bytes of one
template <class T>
std::vector<T> rotation(const T& first, index_t bytes, bool quick) {
  int device = 0;
  int cache = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device), "cudaDeviceGetAttribute");
  const index_t cold = std::max(index_t{8}, qeft::ceil_div(4 * index_t{cache}, bytes));
  return std::vector<T>(static_cast<std::size_t>(quick ? 2 : cold), first);
}

/// FP16 products with FP32 sums by cuBLAS.
class cublas {
 public:
  explicit cublas(cudaStream_t stream) : workspace_(32 << 20) {
    check(cublasCreate(&handle_), "cublasCreate");
    check(cublasSetStream(handle_, stream), "cublasSetStream");
    check(
        cublasSetWorkspace(handle_, workspace_.data(), static_cast<std::size_t>(workspace_.size())),
        "cublasSetWorkspace");
  }
  cublas(const cublas&) = delete;
  cublas& operator=(const cublas&) = delete;
  ~cublas() { cublasDestroy(handle_); }

  /// Y = X W^T. @param w (OC, IC)  @param x (tokens, IC)  @param y (tokens, OC)
  void forward(const halves& w, const halves& x, halves& y, const shape& s, index_t tokens) const {
    multiply(CUBLAS_OP_T, w, x, y, s.out_channels, tokens, s.in_channels);
  }
  /// X = Y W
  void backward(const halves& w, const halves& y, halves& x, const shape& s, index_t tokens) const {
    multiply(CUBLAS_OP_N, w, y, x, s.in_channels, tokens, s.out_channels);
  }

 private:
  static void check(cublasStatus_t code, const char* what) {
    if (code == CUBLAS_STATUS_SUCCESS) return;
    std::fprintf(stderr, "%s: %s\n", what, cublasGetStatusString(code));
    std::exit(1);
  }
  /// In cuBLAS's order: C (m x n) = op(A) B, all columns first.
  void multiply(cublasOperation_t op, const halves& a, const halves& b, halves& c, index_t m,
                index_t n, index_t k) const {
    const float one = 1.0F;
    const float zero = 0.0F;
    const auto leading = static_cast<int>(op == CUBLAS_OP_T ? k : m);
    check(cublasGemmEx(handle_, op, CUBLAS_OP_N, static_cast<int>(m), static_cast<int>(n),
                       static_cast<int>(k), &one, a.data(), CUDA_R_16F, leading, b.data(),
                       CUDA_R_16F, static_cast<int>(k), &zero, c.data(), CUDA_R_16F,
                       static_cast<int>(m), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
          "cublasGemmEx");
  }

  cublasHandle_t handle_ = nullptr;
  qeft::buffer<std::byte, qeft::device_memory> workspace_;
};

}  // namespace qeft_bench
