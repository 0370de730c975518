// SPDX-License-Identifier: Apache-2.0
// Products on a device as tests ask for them.
#pragma once

#include "device/support.cuh"
#include "qeft/device/gemm.cuh"

namespace qeft_test {

/// y of the first `tokens` tokens.
template <class Format, class Y = float, class Layout, class Scalar,
          class Epilogue = qeft::epilogue::none>
std::vector<Y> product(const qeft::quantized_matrix<Layout, qeft::device_memory>& w,
                       const device_array<Scalar>& x, qeft::index_t tokens,
                       const Epilogue& epilogue = {}, cudaStream_t stream = nullptr) {
  const qeft::matrix_descriptor& d = w.descriptor();
  device_array<Y> y(tokens * d.out_channels);
  qeft::visit_weak(d, w.weak_index().data(), [&](auto weak) {
    const auto view = w.template view<Format>(weak);
    device_array<std::byte> space(workspace_bytes(qeft::on_stream{}, view, x.data(), tokens));
    const qeft::on_stream exec{stream, {space.data(), space.size()}};
    const qeft::status s = gemm(exec, view, x.data(), tokens, y.data(), epilogue);
    if (!s.ok()) fail(describe(d) + ": " + s.message());
    check(cudaDeviceSynchronize(), "gemm");
  });
  return to_host(y);
}

/// Adds twice what the output already has, and reverses the channels.
struct user_epilogue {
  const float* old;
  qeft::index_t out_channels;
  QEFT_HOST_DEVICE float operator()(float value, qeft::index_t token, qeft::index_t channel) const {
    return value + 2 * old[token * out_channels + channel];
  }
  QEFT_HOST_DEVICE qeft::index_t destination(qeft::index_t channel) const {
    return out_channels - 1 - channel;
  }
};
/// Checks z, the product y with user_epilogue and y as the old output.
inline void check_user_epilogue(const std::vector<float>& y, const std::vector<float>& z,
                                std::size_t out_channels) {
  bool good = z.size() == y.size();
  for (std::size_t i = 0; good && i < z.size(); ++i) {
    const float value = y[i / out_channels * out_channels + out_channels - 1 - i % out_channels];
    good = z[i] == value + 2 * value;
  }
  check(good, "an epilogue of the user's");
}

}  // namespace qeft_test
