// SPDX-License-Identifier: Apache-2.0
// Products on the device against the definition in double, for random layers, and the same bits
// whatever stands beside a token. Half of the formats per program: they take long to compile.
#include "device/product.cuh"

namespace {

using namespace qeft_test;
using qeft::index_t;
using qeft::quant_format;
using qeft::zero_kind;
using qeft::layout::fragment;

#if defined(QEFT_TEST_OTHER_FORMATS)
using formats =
    qeft::format_list<quant_format<8>,
                      quant_format<4, qeft::dynamic, zero_kind::integer, qeft::bf16_bits>,
                      quant_format<3, qeft::dynamic, zero_kind::symmetric, qeft::bf16_bits>,
                      quant_format<2, qeft::dynamic, zero_kind::scaled>>;
#else
using formats =
    qeft::format_list<quant_format<4>, quant_format<3>,
                      quant_format<2, qeft::dynamic, zero_kind::integer, qeft::bf16_bits>,
                      quant_format<8, qeft::dynamic, zero_kind::scaled, qeft::bf16_bits>>;
#endif

template <class Format>
void compare(const plain_layer& layer, random_source& random) {
  using scalar = typename Format::scalar_type;
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  const qeft::matrix_descriptor& d = layer.d;
  const index_t most = random.integer(9, 20);
  const auto x = random_activations<scalar>(random, most * d.in_channels);
  const auto device_x = to_device(x);
  const auto all = product<Format>(w, device_x, most);
  if (const double e = error_of(layer, x, all); !(e <= 1)) {
    fail(describe(d) + ": error of " + std::to_string(e) + " times the bound");
  }
  for (const index_t tokens : {index_t{1}, random.integer(2, 8)}) {
    if (!same_start(product<Format>(w, device_x, tokens), all)) {
      fail(describe(d) + ": other bits with " + std::to_string(tokens) + " tokens");
    }
  }
}

int compare_random_layers(int count, std::uint64_t seed) {
  int ran = 0;
  for (; ran < count; ++seed) {
    random_source random(seed);
    const auto layer = random_case(random, 40000);
    const bool is_tested =
        if_tested<formats>(layer, [&](auto format) { compare<decltype(format)>(layer, random); });
    if (is_tested) ++ran;
  }
  return ran;
}

#if !defined(QEFT_TEST_OTHER_FORMATS)
/// Groups of all relations to tiles, stages, chunks and parts; warps with several parts of both
/// kinds.
void compare_groups() {
  random_source random(3);
  for (const index_t group :
       {index_t{32}, index_t{64}, index_t{96}, index_t{128}, index_t{256}, index_t{384},
        index_t{512}, index_t{1024}, index_t{1536}, qeft::per_channel}) {
    for (const index_t ic : {511, 2600, 4127}) {
      compare<quant_format<4>>(layer_of(20, ic, ic / 8, group), random);
      compare<quant_format<3>>(layer_of(20, ic, 17, group, 3), random);
    }
  }
  // More blocks than any device has multiprocessors.
  compare<quant_format<4>>(layer_of(4300, 3000, 40), random);
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
#if !defined(QEFT_TEST_OTHER_FORMATS)
  if (argc == 1) compare_groups();
#endif
  const int count = argc > 1 ? std::atoi(argv[1]) : 150;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  const int ran = compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", ran, failures);
  return failures == 0 && ran == count ? 0 : 1;
}
