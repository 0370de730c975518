// SPDX-License-Identifier: Apache-2.0
// A kernel of one's own around the block's product: the first half of a Llama MLP,
// y = silu(W_gate x) * (W_up x), in one launch. Checks itself against products one by one.
#include <cmath>
#include <cstdio>
#include <vector>

#include "qeft/qeft.cuh"

using qeft::half_bits;
using qeft::index_t;
using format = qeft::quant_format<4>;
using layer = qeft::quantized_matrix_view<format, qeft::weak_tail<>, qeft::layout::fragment,
                                          qeft::device_memory>;

// [swiglu]
// A block takes 32 rows of both layers, with groups of 128 columns, and up to 8 tokens.
using product = qeft::block::few_tokens_product<layer, 2, 1, 128>;

__global__ void swiglu(layer gate, layer up, qeft::block::few_tokens_x<half_bits> x,
                       qeft::tuning::parts parts, int parts_each, half_bits* y) {
  extern __shared__ uint4 shared[];
  const product of(shared, parts, parts_each, 2);
  of.multiply(gate, 2 * static_cast<int>(blockIdx.x), x, 0);
  of.multiply(up, 2 * static_cast<int>(blockIdx.x), x, 1);
  of.meet();
  for (unsigned at = threadIdx.x; at < product::places; at += blockDim.x) {
    const auto g = of.sums(at, 0);
    const auto u = of.sums(at, 1);
    const index_t token = product::token(at);
    for (int i = 0; i < product::rows_together; ++i) {
      const index_t row = index_t{blockIdx.x} * product::rows + product::row(at, i);
      if (token >= x.tokens || row >= gate.out_channels) continue;
      const float value = g.of[i] / (1.0F + expf(-g.of[i])) * u.of[i];
      y[token * gate.out_channels + row] = qeft::from_float<half_bits>(value);
    }
  }
}
// [swiglu]

namespace {

/// Fails loudly.
void check(cudaError_t e) {
  if (e != cudaSuccess) qeft::fail(qeft::errc::device_error, cudaGetErrorString(e));
}

void launch_swiglu(const layer& gate, const layer& up, const half_bits* x, index_t tokens,
                   half_bits* y) {
  const index_t dense = gate.dense_columns();
  const qeft::tuning::parts parts =
      qeft::tuning::make_parts(format::bits, dense, gate.weak_columns());
  const auto blocks = static_cast<int>(qeft::ceil_div(gate.out_channels, product::rows));
  const qeft::tuning::warp_plan plan = qeft::tuning::plan_warps(parts.count(), 2);
  const int shared = product::shared_bytes(parts.count(), plan.warps, 2);
  check(cudaFuncSetAttribute(swiglu, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  const qeft::block::few_tokens_x<half_bits> activations{
      x, x + dense, static_cast<int>(gate.in_channels), static_cast<int>(tokens)};
  swiglu<<<blocks, 32 * plan.warps, shared>>>(gate, up, activations, parts, plan.parts_each, y);
  check(cudaGetLastError());
}

qeft::quantized_matrix<qeft::layout::fragment, qeft::device_memory> make_layer(unsigned seed) {
  qeft::matrix_descriptor d;  // 4 bits, integer zero points, groups of 128
  d.out_channels = 200;
  d.in_channels = 1152;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = 128;
  qeft::quantized_matrix<qeft::layout::fragment> w(d);
  const auto next = [&seed] { return (seed = seed * 1664525U + 1013904223U) >> 16U; };
  for (index_t n = 0; n < d.out_channels; ++n) {
    for (index_t i = 0; i < d.dense_columns(); ++i) w.write_code(n, i, next() % 16U);
    for (index_t g = 0; g < d.groups(); ++g) {
      w.write_params(n, g, qeft::from_float<half_bits>(0.01F).bits, next() % 16U);
    }
    for (index_t j = 0; j < d.weak_columns; ++j) {
      const float value = static_cast<float>(next() % 100U) * 0.001F - 0.05F;
      w.write_weak(n, j, qeft::from_float<half_bits>(value).bits);
    }
  }
  return qeft::quantized_matrix<qeft::layout::fragment, qeft::device_memory>(w);
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  const auto gate = make_layer(1);
  const auto up = make_layer(2);
  const index_t tokens = 5;
  const index_t count = tokens * gate.descriptor().out_channels;
  std::vector<half_bits> x(static_cast<std::size_t>(tokens * gate.descriptor().in_channels));
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = qeft::from_float<half_bits>(static_cast<float>(i * 7 % 13) * 0.1F - 0.6F);
  }
  qeft::buffer<half_bits, qeft::device_memory> device_x(static_cast<index_t>(x.size()));
  device_x.upload(x.data());

  const qeft::weak_tail<> weak{{128}};
  qeft::buffer<half_bits, qeft::device_memory> y(count);
  launch_swiglu(gate.view<format>(weak), up.view<format>(weak), device_x.data(), tokens, y.data());
  qeft::buffer<float, qeft::device_memory> g(count);
  qeft::buffer<float, qeft::device_memory> u(count);
  const qeft::on_stream exec;  // these shapes need no workspace
  qeft::gemm(exec, gate, device_x.data(), tokens, g.data()).throw_if_error();
  qeft::gemm(exec, up, device_x.data(), tokens, u.data()).throw_if_error();
  check(cudaDeviceSynchronize());

  std::vector<half_bits> host_y(static_cast<std::size_t>(count));
  std::vector<float> host_g(host_y.size());
  std::vector<float> host_u(host_y.size());
  y.download(host_y.data());
  g.download(host_g.data());
  u.download(host_u.data());
  int wrong = 0;
  for (std::size_t i = 0; i < host_y.size(); ++i) {
    const float expected = host_g[i] / (1.0F + std::exp(-host_g[i])) * host_u[i];
    const float error = std::abs(qeft::to_float(host_y[i]) - expected);
    if (!(error <= 1e-3F * std::abs(expected) + 1e-6F)) ++wrong;
  }
  std::printf("SwiGLU of %lld outputs in one launch, %d differ from separate products\n",
              static_cast<long long>(count), wrong);
  return wrong == 0 ? 0 : 1;
}
