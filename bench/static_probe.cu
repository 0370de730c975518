// SPDX-License-Identifier: Apache-2.0
// One product on a device, for a simulator to count what it does: OC IC BITS GROUP K TOKENS.
#include <cstdio>
#include <cstdlib>

#include "qeft/qeft.cuh"

int main(int argc, char** argv) {
  if (argc != 7) {
    std::fprintf(stderr, "probe OC IC BITS GROUP K TOKENS\n");
    return 2;
  }
  qeft::matrix_descriptor d;
  d.out_channels = std::atol(argv[1]);
  d.in_channels = std::atol(argv[2]);
  d.bits = std::atoi(argv[3]);
  d.group_size = std::atol(argv[4]);
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = std::atol(argv[5]);
  const qeft::index_t tokens = std::atol(argv[6]);
  const qeft::quantized_matrix<qeft::layout::fragment, qeft::device_memory> w(d);
  const qeft::buffer<qeft::half_bits, qeft::device_memory> x(tokens * d.in_channels);
  qeft::buffer<qeft::half_bits, qeft::device_memory> y(tokens * d.out_channels);
  const qeft::status s = qeft::gemm(qeft::on_stream{}, w, x.data(), tokens, y.data());
  if (!s.ok() || cudaDeviceSynchronize() != cudaSuccess) {
    std::fprintf(stderr, "probe: %s\n", s.message().c_str());
    return 1;
  }
  std::printf("%lld\n", static_cast<long long>(qeft::storage_of(d).total()));
}
