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
  std::vector<index_t> token_counts() const {
    if (settings_.quick) return {1, 16, 40};
    return {1, 2, 4, 8, 16, 32, 64, 128, 512, 2048};
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

  void quantised(const shape& s, int bits) {
    const layer w = random_layer(s, bits, 128, 128);
    const auto bytes = static_cast<double>(qeft::storage_of(w.descriptor()).total());
    const std::vector<layer> layers =
        rotation(w, qeft::storage_of(w.descriptor()).total(), settings_.quick);
    const auto calls = static_cast<int>(layers.size());
    const std::string variant = "qeft" + std::to_string(bits);
    for (const index_t tokens : token_counts()) {
      const halves x = random_halves(tokens * s.in_channels);
      halves y(tokens * s.out_channels);
      qeft::on_stream exec{measure_.stream};
      const qeft::buffer<std::byte, qeft::device_memory> space(
          qeft::workspace_bytes(exec, w, x.data(), tokens));
      exec.workspace = {const_cast<std::byte*>(space.data()), space.size()};
      const timing t = measure_(calls, [&](int i) {
        qeft::gemm(exec, layers[static_cast<std::size_t>(i)], x.data(), tokens, y.data())
            .throw_if_error();
      });
      check_product(w, x, y);
      report("gemm", s, variant, tokens, t, {bytes, operations(s, tokens)});
    }
  }
  void dense(const shape& s) {
    const index_t count = s.out_channels * s.in_channels;
    const std::vector<halves> weights =
        rotation(random_halves(count, 0.0F, 0.1F), 2 * count, settings_.quick);
    const auto calls = static_cast<int>(weights.size());
    for (const index_t tokens : token_counts()) {
      const halves x = random_halves(tokens * s.in_channels);
      halves y(tokens * s.out_channels);
      const timing t = measure_(calls, [&](int i) {
        blas_.forward(weights[static_cast<std::size_t>(i)], x, y, s, tokens);
      });
      report("gemm", s, "cublas", tokens, t,
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
