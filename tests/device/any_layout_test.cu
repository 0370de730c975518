// SPDX-License-Identifier: Apache-2.0
// Products over layouts that have no kernels of their own, against the definition in double.
#include "device/product.cuh"

namespace {

using namespace qeft_test;
using qeft::index_t;
using qeft::quant_format;

template <class Format, class Layout>
void compare(const plain_layer& layer, random_source& random) {
  const qeft::quantized_matrix<Layout, qeft::device_memory> w(pack<Layout>(layer));
  const index_t tokens = random.integer(1, 20);
  const auto x =
      random_activations<typename Format::scalar_type>(random, tokens * layer.d.in_channels);
  const auto device_x = to_device(x);
  const auto y = product<Format>(w, device_x, tokens);
  if (const double e = error_of(layer, x, y); !(e <= 1)) {
    fail(describe(layer.d) + " in " + Layout::name + ": error of " + std::to_string(e) +
         " times the bound");
  }
  const auto old = to_device(y);
  const user_epilogue epilogue{old.data(), layer.d.out_channels};
  check_user_epilogue(y, product<Format>(w, device_x, tokens, epilogue),
                      static_cast<std::size_t>(layer.d.out_channels));
}

int compare_random_layers(int count, std::uint64_t seed) {
  int ran = 0;
  for (; ran < count; ++seed) {
    random_source random(seed);
    const auto layer = random_case(random, 20000);
    const bool is_tested = if_tested(layer, [&](auto format) {
      compare<decltype(format), qeft::layout::row_packed>(layer, random);
      compare<decltype(format), qeft::layout::simd_tile>(layer, random);
    });
    if (is_tested) ++ran;
  }
  return ran;
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  const int count = argc > 1 ? std::atoi(argv[1]) : 20;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  const int ran = compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", ran, failures);
  return failures == 0 && ran == count ? 0 : 1;
}
