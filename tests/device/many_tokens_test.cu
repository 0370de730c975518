// SPDX-License-Identifier: Apache-2.0
// Products with more tokens than a tensor core takes at a time: the definition in double, and the
// bits that a token alone has.
#include "device/product.cuh"

namespace {

using namespace qeft_test;
using qeft::index_t;
using qeft::quant_format;
using qeft::layout::fragment;

/// What differs from few tokens: types and widths once each.
using formats =
    qeft::format_list<quant_format<4>,
                      quant_format<3, qeft::dynamic, qeft::zero_kind::integer, qeft::bf16_bits>,
                      quant_format<8, qeft::dynamic, qeft::zero_kind::symmetric>,
                      quant_format<2, qeft::dynamic, qeft::zero_kind::scaled>>;

template <class Format>
void compare(const plain_layer& layer, index_t tokens, random_source& random) {
  using scalar = typename Format::scalar_type;
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  const index_t oc = layer.d.out_channels;
  const index_t ic = layer.d.in_channels;
  const auto x = random_activations<scalar>(random, tokens * ic);
  const auto y = product<Format>(w, to_device(x), tokens);
  const std::string what = describe(layer.d) + ", " + std::to_string(tokens) + " tokens";
  if (const double e = error_of(layer, x, y); !(e <= 1)) {
    fail(what + ": error of " + std::to_string(e) + " times the bound");
  }
  const index_t token = random.integer(0, tokens - 1);
  const std::vector<scalar> one(x.begin() + token * ic, x.begin() + (token + 1) * ic);
  const auto alone = product<Format>(w, to_device(one), 1);
  if (std::memcmp(alone.data(), y.data() + token * oc, alone.size() * sizeof(float)) != 0) {
    fail(what + ": other bits than a token alone");
  }
}

int compare_random_layers(int count, std::uint64_t seed) {
  int ran = 0;
  for (; ran < count; ++seed) {
    random_source random(seed);
    const auto layer = random_case(random, 40000);
    const index_t tokens = random.integer(17, random.chance(50) ? 40 : 150);
    const bool is_tested = if_tested<formats>(
        layer, [&](auto format) { compare<decltype(format)>(layer, tokens, random); });
    if (is_tested) ++ran;
  }
  return ran;
}

/// So large that blocks take all parts.
void compare_whole_rows() {
  random_source random(5);
  const auto layer = layer_of(2100, 1056, 32);
  for (const index_t tokens : {index_t{520}, index_t{449}}) {
    const index_t row_blocks = qeft::ceil_div(2100, qeft::tuning::many_block_rows);
    check(!qeft::tuning::many_by_parts(row_blocks, tokens), "blocks take all parts");
    compare<quant_format<4>>(layer, tokens, random);
  }
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  for (const index_t tokens : {index_t{20}, index_t{449}}) {
    const auto x = to_device(random_activations<qeft::half_bits>(random, tokens * 1056));
    const auto y = product<quant_format<4>>(w, x, tokens);
    const auto old = to_device(y);
    check_user_epilogue(y, product<quant_format<4>>(w, x, tokens, user_epilogue{old.data(), 2100}),
                        2100);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  if (argc == 1) compare_whole_rows();
  const int count = argc > 1 ? std::atoi(argv[1]) : 100;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  const int ran = compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", ran, failures);
  return failures == 0 && ran == count ? 0 : 1;
}
