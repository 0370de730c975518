// SPDX-License-Identifier: Apache-2.0
// One product on a device, for a simulator to count what it does: OC IC BITS GROUP K TOKENS and
// where weak columns are.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "qeft/qeft.cuh"

namespace {

struct formats
    : qeft::format_product<qeft::width_list<4, 3>, qeft::zero_list<qeft::zero_kind::integer>,
                           qeft::scalar_list<qeft::half_bits>> {};

/// k of IC columns, anywhere, ascending.
std::vector<std::int32_t> random_columns(qeft::index_t k, qeft::index_t in_channels) {
  std::mt19937 random(1);
  std::vector<std::int32_t> chosen;
  for (qeft::index_t column = 0; column < in_channels; ++column) {
    const auto wanted = static_cast<std::size_t>(k) - chosen.size();
    if (random() % static_cast<std::size_t>(in_channels - column) < wanted) {
      chosen.push_back(static_cast<std::int32_t>(column));
    }
  }
  return chosen;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr, "probe OC IC BITS GROUP K TOKENS tail|indexed|per_head\n");
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
  std::vector<std::int32_t> index;
  if (std::strcmp(argv[7], "indexed") == 0) {
    d.weak = qeft::weak_kind::indexed;
    index = random_columns(d.weak_columns, d.in_channels);
  } else if (std::strcmp(argv[7], "per_head") == 0) {
    d.weak = qeft::weak_kind::per_head;
    d.heads = 32;
  }
  const qeft::quantized_matrix<qeft::layout::fragment, qeft::device_memory> w(d, index);
  const qeft::buffer<qeft::half_bits, qeft::device_memory> x(tokens * d.in_channels);
  qeft::buffer<qeft::half_bits, qeft::device_memory> y(tokens * d.out_channels);
  qeft::buffer<std::byte, qeft::device_memory> space(
      qeft::workspace_bytes<formats>(qeft::on_stream{}, w, x.data(), tokens));
  const qeft::on_stream exec{nullptr, {space.data(), space.size()}};
  const qeft::status s = qeft::gemm<formats>(exec, w, x.data(), tokens, y.data());
  if (!s.ok() || cudaDeviceSynchronize() != cudaSuccess) {
    std::fprintf(stderr, "probe: %s\n", s.message().c_str());
    return 1;
  }
  std::printf("%lld\n", static_cast<long long>(qeft::storage_of(d).total()));
}
