// SPDX-License-Identifier: Apache-2.0
// What tests of device code share: arrays, random operands, the definition in double and its bound.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "qeft/core/device_memory.cuh"
#include "support/cases.hpp"

namespace qeft_test {

inline int failures = 0;

inline void fail(const std::string& what) {
  ++failures;
  std::printf("failed: %s\n", what.c_str());
}
inline void check(bool good, const char* what) {
  if (!good) fail(what);
}
/// An error of the runtime ends the program: it would fail all that follows.
inline void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(e));
  std::exit(1);
}
/// Whether a call is refused with a message that has `word`.
inline void check_refused(const qeft::status& s, qeft::errc code, const char* word) {
  if (s.code() != code || s.message().find(word) == std::string::npos) {
    fail(std::string("refusal with '") + word + "': " + s.message());
  }
}

/// Else the test is skipped: return 77.
inline bool has_device() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return true;
  std::printf("skipped: no CUDA device and no simulator\n");
  return false;
}

template <class T>
using device_array = qeft::buffer<T, qeft::device_memory>;

template <class T>
std::vector<T> to_host(const device_array<T>& a) {
  std::vector<T> host(static_cast<std::size_t>(a.size()));
  a.download(host.data());
  return host;
}
template <class T>
device_array<T> to_device(const std::vector<T>& host) {
  device_array<T> a(static_cast<qeft::index_t>(host.size()));
  a.upload(host.data());
  return a;
}

/// Captures what body(stream) starts into a graph, replays it and waits; how many nodes it has.
template <class Body>
std::size_t in_graph(const Body& body) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  const qeft::status s = body(stream);
  if (!s.ok()) fail("a capture: " + s.message());
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream, &graph), "capture");
  std::size_t nodes = 0;
  check(cudaGraphGetNodes(graph, nullptr, &nodes), "cudaGraphGetNodes");
  cudaGraphExec_t executable = nullptr;
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
  check(cudaStreamSynchronize(stream), "a graph");
  check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return nodes;
}

/// Whether the shorter of two arrays is how the other one begins.
template <class T>
bool same_start(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), std::min(a.size(), b.size()) * sizeof(T)) == 0;
}

/// Activations of which one in a hundred is 60 times as large.
template <class Scalar>
std::vector<Scalar> random_activations(random_source& random, qeft::index_t count) {
  std::vector<Scalar> x(static_cast<std::size_t>(count));
  for (Scalar& v : x) {
    const float size = random.chance(1) ? 60.0F : 1.0F;
    v = qeft::from_float<Scalar>(size * static_cast<float>(random.real()));
  }
  return x;
}

/// u of an output's type.
template <class Y>
constexpr double rounding() {
  if (std::is_same_v<Y, qeft::half_bits>) return 0x1p-11;
  return std::is_same_v<Y, qeft::bf16_bits> ? 0x1p-8 : 0;
}

/// The error of a sum of products as a part of what it may be: u |y| + 8 eps32 sum |w x|; for FP16
/// also half of its smallest number.
template <class Y>
double error_of(Y got, double exact, double magnitude) {
  const auto y = static_cast<double>(qeft::to_float(got));
  const double bound = rounding<Y>() * std::abs(exact) + 8 * 0x1p-23 * magnitude +
                       (std::is_same_v<Y, qeft::half_bits> ? 0x1p-25 : 0.0);
  if (y == exact) return 0;
  return std::isfinite(y) ? std::abs(y - exact) / bound : INFINITY;
}

/// The largest error of y = x W^T as a part of its bound.
/// @param x (tokens, IC)  @param y (tokens, OC)
template <class Scalar, class Y>
double error_of(const plain_layer& layer, const std::vector<Scalar>& x, const std::vector<Y>& y) {
  const auto w = weights_of(layer);
  const qeft::index_t oc = layer.d.out_channels;
  const qeft::index_t ic = layer.d.in_channels;
  double worst = 0;
  for (qeft::index_t i = 0; i < static_cast<qeft::index_t>(y.size()); ++i) {
    const float* row = w.data() + i % oc * ic;
    const Scalar* token = x.data() + i / oc * ic;
    double sum = 0;
    double magnitude = 0;
    for (qeft::index_t c = 0; c < ic; ++c) {
      const double term = static_cast<double>(row[c]) * static_cast<double>(to_float(token[c]));
      sum += term;
      magnitude += std::abs(term);
    }
    worst = std::max(worst, error_of(y[static_cast<std::size_t>(i)], sum, magnitude));
  }
  return worst;
}

/// A layer with `k` weak columns at its end, and integer zero points.
inline plain_layer layer_of(qeft::index_t oc, qeft::index_t ic, qeft::index_t k,
                            qeft::index_t group = 128, int bits = 4) {
  qeft::matrix_descriptor d;
  d.bits = bits;
  d.out_channels = oc;
  d.in_channels = ic;
  d.group_size = group;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = k;
  random_source random(1);
  return random_layer(d, random);
}

/// What is compared on a device: every width, kind of zero point and type, if not all of their
/// combinations.
using tested_formats = qeft::format_list<
    qeft::quant_format<4>, qeft::quant_format<3>,
    qeft::quant_format<2, qeft::dynamic, qeft::zero_kind::integer, qeft::bf16_bits>,
    qeft::quant_format<8>,
    qeft::quant_format<4, qeft::dynamic, qeft::zero_kind::integer, qeft::bf16_bits>,
    qeft::quant_format<3, qeft::dynamic, qeft::zero_kind::symmetric, qeft::bf16_bits>,
    qeft::quant_format<8, qeft::dynamic, qeft::zero_kind::scaled, qeft::bf16_bits>,
    qeft::quant_format<2, qeft::dynamic, qeft::zero_kind::scaled>>;

namespace detail {

template <class Body, class... Formats>
bool if_tested(const plain_layer& layer, const Body& body, const qeft::format_list<Formats...>&) {
  const auto attempt = [&](auto format) {
    if (!qeft::format_matches<decltype(format)>(layer.d)) return false;
    body(format);
    return true;
  };
  return (attempt(Formats{}) || ...);
}

}  // namespace detail

/// body(format) if the layer's format is among Formats; whether it is.
template <class Formats = tested_formats, class Body>
bool if_tested(const plain_layer& layer, const Body& body) {
  return detail::if_tested(layer, body, Formats{});
}

}  // namespace qeft_test
