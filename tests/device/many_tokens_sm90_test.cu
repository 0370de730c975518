// SPDX-License-Identifier: Apache-2.0
// Products with many tokens on compute capability 9.0, against the definition in double and, bit
// for bit, against those with few tokens.
#include "device/product.cuh"
#include "qeft/device/many_tokens_sm90.cuh"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;
using qeft::index_t;
using qeft::quant_format;
using qeft::layout::fragment;
namespace detail = qeft::device::detail;

/// Activations in the order of kernels, their columns padded as gemm pads them.
template <class Scalar>
struct ordered_activations {
  std::vector<Scalar> x;  // (tokens, stride)
  index_t stride;
  index_t weak_at;
};
template <class Scalar>
ordered_activations<Scalar> in_order(const plain_layer& layer, const std::vector<Scalar>& x) {
  const index_t ic = layer.d.in_channels;
  const auto k = static_cast<index_t>(layer.weak_columns.size());
  const index_t weak_at = qeft::round_up(ic - k, 8);
  const index_t stride = weak_at + qeft::round_up(k, 8);
  const index_t tokens = static_cast<index_t>(x.size()) / ic;
  // What is between the columns must not matter.
  const Scalar nan = qeft::from_float<Scalar>(NAN);
  ordered_activations<Scalar> a{std::vector<Scalar>(static_cast<std::size_t>(tokens * stride), nan),
                                stride, weak_at};
  for (index_t t = 0; t < tokens; ++t) {
    Scalar* to = a.x.data() + t * stride;
    index_t dense = 0;
    index_t weak = 0;
    for (index_t c = 0; c < ic; ++c) {
      const bool is_weak = weak < k && layer.weak_columns[static_cast<std::size_t>(weak)] == c;
      (is_weak ? to[weak_at + weak] : to[dense]) = x[static_cast<std::size_t>(t * ic + c)];
      ++(is_weak ? weak : dense);
    }
  }
  return a;
}

/// What computes a product, and the tokens of its blocks.
template <int Tokens>
using by_many = qeft::constant<Tokens>;
/// Of the kernels for few tokens the one for groups of any size: all have the same results.
struct by_few {};
struct by_choice {};

int multiprocessors() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "the device");
  return count;
}

template <int Tokens, class Args>
qeft::status launch(by_many<Tokens>, const Args& args) {
  const Args layers[] = {args};
  return detail::launch_many_tokens_sm90<Tokens>(nullptr, layers, multiprocessors());
}
template <class Args>
qeft::status launch(by_choice, const Args& args) {
  const Args layers[] = {args};
  return detail::launch_many_tokens_sm90(nullptr, layers, multiprocessors());
}
template <class Args>
qeft::status launch(by_few, const Args& args) {
  Args layers[] = {args};
  return detail::launch_few<1, 2, qeft::dynamic>(nullptr, layers, multiprocessors());
}

/// y of the first `tokens` tokens.
template <class Y, class Format, class By, class Epilogue = qeft::epilogue::none>
std::vector<Y> product(By by, const qeft::quantized_matrix<fragment, qeft::device_memory>& w,
                       const ordered_activations<typename Format::scalar_type>& x, index_t tokens,
                       const Epilogue& epilogue = {}) {
  const auto device_x = to_device(x.x);
  const qeft::matrix_descriptor& d = w.descriptor();
  device_array<Y> y(tokens * d.out_channels);
  qeft::visit_weak(d, w.weak_index().data(), [&](auto weak) {
    const auto view = as_tail(w.template view<Format>(weak));
    const qeft::kernel::product_args<std::decay_t<decltype(view)>, Y, Epilogue> args{
        view,
        device_x.data(),
        device_x.data() + x.weak_at,
        static_cast<int>(x.stride),
        static_cast<int>(tokens),
        y.data(),
        epilogue,
        qeft::tuning::make_parts(Format::bits, view.dense_columns(), view.weak_columns())};
    const qeft::status s = launch(by, args);
    if (!s.ok()) fail(describe(d) + ": " + s.message());
    check(cudaDeviceSynchronize(), "a product");
  });
  return to_host(y);
}

template <class Format>
void compare(const plain_layer& layer, index_t most, random_source& random) {
  using scalar = typename Format::scalar_type;
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  const auto x = random_activations<scalar>(random, most * layer.d.in_channels);
  const auto ordered = in_order(layer, x);
  const auto few = product<float, Format>(by_few{}, w, ordered, most);
  const auto check_many = [&](auto by, index_t tokens) {
    const auto many = product<float, Format>(by, w, ordered, tokens);
    const auto what = [&] {
      return describe(layer.d) + " and " + std::to_string(tokens) + " tokens, " +
             std::to_string(by) + " in a block: ";
    };
    if (const double e = error_of(layer, x, many); !(e <= 1)) {
      fail(what() + "error of " + std::to_string(e) + " times the bound");
    }
    if (!same_start(many, few)) fail(what() + "other bits than with few tokens");
  };
  check_many(by_many<64>{}, random.integer(1, most));
  if constexpr (Format::zero != qeft::zero_kind::scaled) {
    check_many(by_many<128>{}, most);
  } else {
    check_many(by_many<64>{}, most);
  }
}

int compare_random_layers(int count, std::uint64_t seed) {
  int ran = 0;
  for (; ran < count; ++seed) {
    random_source random(seed);
    const auto layer = random_case(random, 100000);
    const index_t most = random.chance(50) ? random.integer(1, 64) : random.integer(65, 300);
    if (layer.d.out_channels * most > 60000) continue;
    const bool ran_one =
        if_tested(layer, [&](auto format) { compare<decltype(format)>(layer, most, random); });
    if (ran_one) ++ran;
  }
  return ran;
}

/// Groups of all relations to stages, sums and parts; blocks of rows and of tokens.
void compare_groups() {
  random_source random(3);
  for (const index_t group : {index_t{32}, index_t{96}, index_t{128}, index_t{256}, index_t{384},
                              index_t{512}, index_t{1024}, qeft::per_channel}) {
    compare<quant_format<4>>(layer_of(20, 1700, 40, group), 9, random);
    compare<quant_format<3>>(layer_of(150, 2600, 17, group, 3), 70, random);
  }
  compare<quant_format<4>>(layer_of(16, 1300, 1300), 70, random);
  // More places than multiprocessors.
  compare<quant_format<4>>(layer_of(1400, 100, 16), 1500, random);
}

void check_outputs() {
  const auto layer = layer_of(177, 520, 16);
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  random_source random(2);
  const auto x = in_order(layer, random_activations<qeft::half_bits>(random, 140 * 520));
  const auto same = [&](auto y, const auto& epilogue) {
    using output = decltype(y);
    return product<output, quant_format<4>>(by_many<64>{}, w, x, 140, epilogue) ==
           product<output, quant_format<4>>(by_few{}, w, x, 140, epilogue);
  };
  check(same(qeft::half_bits{}, qeft::epilogue::none{}), "half");
  check(same(qeft::bf16_bits{}, qeft::epilogue::none{}), "bf16");
  std::vector<float> values(140 * 177);
  for (float& v : values) v = static_cast<float>(random.real());
  const auto old = to_device(values);
  check(same(float{}, user_epilogue{old.data(), 177}), "an epilogue of the user's");
  check(product<float, quant_format<4>>(by_choice{}, w, x, 140) ==
            product<float, quant_format<4>>(by_few{}, w, x, 140),
        "tokens of a block by choice");
}

/// Every pair of a block of rows and one of tokens is the place of one cluster.
void check_places() {
  using tune = qeft::tuning::many_tokens_sm90;
  for (const int rows : {1, 2, 7}) {
    for (const int tokens : {1, 7, 8, 9, 16, 21}) {
      std::vector<int> clusters(static_cast<std::size_t>(rows * tokens), 0);
      for (int i = 0; i < rows * tokens; ++i) {
        const tune::place at = tune::place_of(i, rows, tokens);
        check(at.row >= 0 && at.row < rows && at.token >= 0 && at.token < tokens, "a place");
        ++clusters[static_cast<std::size_t>(at.row * tokens + at.token)];
      }
      check(clusters == std::vector<int>(clusters.size(), 1), "places");
    }
  }
}

void check_choices() {
  using tune = qeft::tuning::many_tokens_sm90;
  check(tune::suits(32, 2048, 132) && tune::suits(86, 33, 132), "enough blocks and tokens");
  check(!tune::suits(32, 64, 132) && !tune::suits(250, 32, 132), "too few blocks or tokens");
  check(tune::tokens_for(32, 2048, 132) == 128 && tune::tokens_for(32, 256, 132) == 64,
        "tokens of a block");
}

bool is_built_in(index_t tokens) {
  using view = qeft::quantized_matrix_view<quant_format<4>, qeft::weak_tail<>, fragment,
                                           qeft::device_memory>;
  qeft::kernel::product_args<view, float, qeft::epilogue::none> layers[1] = {};
  layers[0].w.out_channels = 4096;
  layers[0].tokens = static_cast<int>(tokens);
  bool has = false;
  bool suits = false;
  check(detail::has_many_tokens_sm90(layers[0], has).ok(), "the kernel's code");
  check(detail::suits_many_tokens_sm90(layers, multiprocessors(), suits).ok(), "the choice");
  if (tokens < 64) check(!suits, "so few tokens");
  if (tokens > 2000) check(suits == has, "so many tokens");
  return has;
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  int major = 0;
  int minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "the device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "the device");
  const bool is_hopper = major == 9 && minor == 0;
  if (is_built_in(1) != is_hopper || is_built_in(2048) != is_hopper) fail("has_many_tokens_sm90");
  if (!is_hopper) {
    std::printf("skipped: compute capability %d.%d, not 9.0; %d failures\n", major, minor,
                failures);
    return failures == 0 ? 77 : 1;
  }
  check_places();
  check_choices();
  check_outputs();
  compare_groups();
  const int count = argc > 1 ? std::atoi(argv[1]) : 100;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  const int ran = compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", ran, failures);
  return failures == 0 && ran == count ? 0 : 1;
}
