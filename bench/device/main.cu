// SPDX-License-Identifier: Apache-2.0
// Products on a GPU beside cuBLAS, as lines of JSON on standard output:
//   bench_device [--quick] [--replays N]
// Every line has a median and quartiles in microseconds; the first ones are the limits of the
// machine, measured in the same run, of which later ones state what they reach.
#include <cstdlib>
#include <cstring>

#include "device/limits.cuh"
#include "device/operands.cuh"

namespace {

using namespace qeft_bench;

struct settings {
  bool quick = false;  // few and small shapes: whether it works, not how fast
};

void print(const char* what, const char* name, const std::string& variant, index_t tokens,
           const timing& t, const char* limit, double fraction) {
  std::printf(
      "{\"what\": \"%s\", \"shape\": \"%s\", \"variant\": \"%s\", \"tokens\": %lld, "
      "\"us\": %.3f, \"us_low\": %.3f, \"us_high\": %.3f, \"%s\": %.4f}\n",
      what, name, variant.c_str(), static_cast<long long>(tokens), 1e6 * t.median, 1e6 * t.low,
      1e6 * t.high, limit, fraction);
  std::fflush(stdout);
}

/// Whether y is X W^T, for some rows of the first token, against the definition in double.
void check_product(const layer& w, const halves& x, const halves& y) {
  const qeft::quantized_matrix<qeft::layout::fragment> host_w(w);
  const index_t ic = w.descriptor().in_channels;
  const index_t oc = w.descriptor().out_channels;
  std::vector<qeft::half_bits> host_x(static_cast<std::size_t>(x.size()));
  std::vector<qeft::half_bits> host_y(static_cast<std::size_t>(y.size()));
  x.download(host_x.data());
  y.download(host_y.data());
  host_w.visit<qeft::device_formats>([&](const auto& view) {
    for (index_t i = 0; i < 64; ++i) {
      const index_t n = i * (oc - 1) / 63;
      double sum = 0.0;
      for (index_t c = 0; c < ic; ++c) {
        sum += static_cast<double>(dequantize(view, n, c)) *
               static_cast<double>(to_float(host_x[static_cast<std::size_t>(c)]));
      }
      const auto got = static_cast<double>(to_float(host_y[static_cast<std::size_t>(n)]));
      if (!(std::abs(got - sum) <= 1e-3 * std::abs(sum) + 1e-2)) {
        std::fprintf(stderr, "row %lld is %g instead of %g\n", static_cast<long long>(n), got, sum);
        std::exit(1);
      }
    }
  });
}

/// What a call of `body` reads and computes, as a fraction of what the machine can do.
struct cost {
  double bytes;
  double operations;
};

class benchmark {
 public:
  explicit benchmark(const settings& s, int replays) : settings_(s), blas_(measure_.stream) {
    measure_.replays = replays;
    limits_ = measure_limits(measure_, blas_, s.quick);
    std::printf(
        "{\"what\": \"limits\", \"read_bytes_per_s\": %.4g, \"copy_bytes_per_s\": %.4g, "
        "\"fp16_flops\": %.4g}\n",
        limits_.read, limits_.copy, limits_.flops);
    std::fflush(stdout);
  }

  void run(const shape& s) {
    for (const int bits : {4, 3}) quantised(s, bits);
    dense(s);
  }

 private:
  using bytes = qeft::buffer<std::byte, qeft::device_memory>;

  std::vector<index_t> token_counts() const {
    if (settings_.quick) return {1, 16, 40};
    return {1, 2, 4, 8, 16, 32, 64, 128, 512, 2048};
  }
  std::vector<index_t> training_counts() const {
    if (settings_.quick) return {70};
    return {512, 2048};
  }
  /// Few tokens are bound by memory, many by arithmetic.
  void report(const char* what, const shape& s, const std::string& variant, index_t tokens,
              const timing& t, const cost& c) const {
    if (tokens <= 64) {
      print(what, s.name, variant, tokens, t, "of_copy", c.bytes / t.median / limits_.copy);
    } else {
      print(what, s.name, variant, tokens, t, "of_fp16", c.operations / t.median / limits_.flops);
    }
  }
  static double operations(const shape& s, index_t tokens) {
    return 2.0 * static_cast<double>(s.out_channels) * static_cast<double>(s.in_channels) *
           static_cast<double>(tokens);
  }

  /// A layer, as often as it takes for none of its copies to be in a cache.
  struct subject {
    const shape& s;
    std::string variant;
    std::vector<layer> layers;
    double bytes;  // of one

    int calls() const { return static_cast<int>(layers.size()); }
    const layer& of(int i) const { return layers[static_cast<std::size_t>(i)]; }
  };

  void quantised(const shape& s, int bits) {
    const layer w = random_layer(s, bits, 128, 128);
    const index_t bytes = qeft::storage_of(w.descriptor()).total();
    const subject q{s, "qeft" + std::to_string(bits), rotation(w, bytes, settings_.quick),
                    static_cast<double>(bytes)};
    for (const index_t tokens : token_counts()) forward(q, tokens);
    dequantise(q);
    for (const index_t tokens : training_counts()) gradients(q, tokens);
  }
  void forward(const subject& q, index_t tokens) {
    const halves x = random_halves(tokens * q.s.in_channels);
    halves y(tokens * q.s.out_channels);
    bytes space(qeft::workspace_bytes(qeft::on_stream{}, q.of(0), x.data(), tokens));
    const qeft::on_stream exec{measure_.stream, {space.data(), space.size()}};
    const timing t = measure_(q.calls(), [&](int i) {
      qeft::gemm(exec, q.of(i), x.data(), tokens, y.data()).throw_if_error();
    });
    check_product(q.of(0), x, y);
    report("gemm", q.s, q.variant, tokens, t, {q.bytes, operations(q.s, tokens)});
  }
  void dequantise(const subject& q) {
    const index_t count = q.s.out_channels * q.s.in_channels;
    const qeft::on_stream exec{measure_.stream};
    halves w(count);
    const timing t = measure_(
        q.calls(), [&](int i) { qeft::dequantize(exec, q.of(i), w.data()).throw_if_error(); });
    report("dequantize", q.s, q.variant, 0, t, {q.bytes + 2.0 * static_cast<double>(count), 0.0});
  }
  /// And what one would do without kernels for packed layers: dequantise, then cuBLAS.
  void gradients(const subject& q, index_t tokens) {
    const index_t k = q.of(0).descriptor().weak_columns;
    const halves x = random_halves(tokens * q.s.in_channels);
    const halves dy = random_halves(tokens * q.s.out_channels);
    halves y(tokens * q.s.out_channels);
    halves dx(tokens * q.s.in_channels);
    halves x_weak(tokens * k);
    halves w(q.s.out_channels * q.s.in_channels);
    qeft::buffer<float, qeft::device_memory> dw(q.s.out_channels * k);
    bytes space(
        qeft::input_gradient_workspace_bytes(qeft::on_stream{}, q.of(0), dy.data(), tokens));
    const qeft::on_stream exec{measure_.stream, {space.data(), space.size()}};
    const double all = operations(q.s, tokens);

    report("input_gradient", q.s, q.variant, tokens,
           measure_(
               q.calls(),
               [&](int i) {
                 qeft::input_gradient(exec, q.of(i), dy.data(), tokens, dx.data()).throw_if_error();
               }),
           {q.bytes, all});
    report("weak_gradient", q.s, q.variant, tokens,
           measure_(
               q.calls(),
               [&](int i) {
                 qeft::gather_weak(exec, q.of(i), x.data(), tokens, x_weak.data()).throw_if_error();
                 qeft::weak_gradient(exec, q.of(i), dy.data(), x_weak.data(), tokens, dw.data())
                     .throw_if_error();
               }),
           {0.0, all * static_cast<double>(k) / static_cast<double>(q.s.in_channels)});
    const std::string detour = q.variant + "_dequantize_cublas";
    report("gemm", q.s, detour, tokens,
           measure_(q.calls(),
                    [&](int i) {
                      qeft::dequantize(exec, q.of(i), w.data()).throw_if_error();
                      blas_.forward(w, x, y, q.s, tokens);
                    }),
           {q.bytes, all});
    report("input_gradient", q.s, detour, tokens,
           measure_(q.calls(),
                    [&](int i) {
                      qeft::dequantize(exec, q.of(i), w.data()).throw_if_error();
                      blas_.backward(w, dy, dx, q.s, tokens);
                    }),
           {q.bytes, all});
  }
  void dense(const shape& s) {
    const index_t count = s.out_channels * s.in_channels;
    const std::vector<halves> weights =
        rotation(random_halves(count, 0.0F, 0.1F), 2 * count, settings_.quick);
    const auto calls = static_cast<int>(weights.size());
    for (const index_t tokens : token_counts()) {
      const halves x = random_halves(tokens * s.in_channels);
      halves y(tokens * s.out_channels);
      report("gemm", s, "cublas", tokens,
             measure_(calls,
                      [&](int i) {
                        blas_.forward(weights[static_cast<std::size_t>(i)], x, y, s, tokens);
                      }),
             {2.0 * static_cast<double>(count), operations(s, tokens)});
    }
    for (const index_t tokens : training_counts()) {
      const halves dy = random_halves(tokens * s.out_channels);
      halves dx(tokens * s.in_channels);
      report("input_gradient", s, "cublas", tokens,
             measure_(calls,
                      [&](int i) {
                        blas_.backward(weights[static_cast<std::size_t>(i)], dy, dx, s, tokens);
                      }),
             {2.0 * static_cast<double>(count), operations(s, tokens)});
    }
  }

  settings settings_;
  measurement measure_;
  cublas blas_;
  limits limits_{};
};

}  // namespace

int main(int argc, char** argv) {
  settings s;
  int replays = 25;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0) {
      s.quick = true;
    } else if (std::strcmp(argv[i], "--replays") == 0 && i + 1 < argc) {
      replays = std::atoi(argv[++i]);
    } else {
      std::fprintf(stderr, "bench_device [--quick] [--replays N]\n");
      return 2;
    }
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "bench_device: no CUDA device\n");
    return 77;
  }
  try {
    benchmark b(s, replays);
    if (s.quick) {
      b.run({"quick", 272, 1024});
    } else {
      for (const shape& one : shapes) b.run(one);
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_device: %s\n", e.what());
    return 1;
  }
  return 0;
}
