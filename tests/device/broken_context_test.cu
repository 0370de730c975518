// SPDX-License-Identifier: Apache-2.0
// What functions say when an earlier kernel has broken the context. That lasts, so the test is a
// program of its own.
#include "device/support.cuh"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;
using qeft::errc;

__global__ void break_context() { __trap(); }

}  // namespace

int main() {
  if (!has_device()) return 77;
  const qeft::quantized_matrix<qeft::layout::fragment, qeft::device_memory> w(
      layer_of(40, 512, 16).d);
  qeft::quantized_matrix<qeft::layout::fragment, qeft::device_memory> other(w.descriptor());
  const device_array<std::int32_t> rows(40);
  const device_array<qeft::half_bits> x(512);
  device_array<float> y(40);
  break_context<<<1, 1>>>();
  const cudaError_t broken = cudaDeviceSynchronize();
  check(broken != cudaSuccess, "the context is broken");
  const qeft::status s = qeft::gemv<qeft::format_list<qeft::quant_format<4>>>(qeft::on_stream{}, w,
                                                                              x.data(), y.data());
  check_refused(s, errc::device_error, cudaGetErrorString(broken));
  check_refused(repack(qeft::on_stream{}, w, other), errc::device_error, "repack failed");
  check_refused(permute_rows(qeft::on_stream{}, rows.data(), w, other), errc::device_error,
                "permute_rows failed");
  check(cudaDeviceSynchronize() == broken, "the error is still there");
  std::printf("'%s', %d failures\n", s.message().c_str(), failures);
  std::fflush(stdout);
  std::_Exit(failures == 0 ? 0 : 1);  // nothing can be freed any more
}
