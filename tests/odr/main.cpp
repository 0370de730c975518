// SPDX-License-Identifier: Apache-2.0
// odr_program baseline: prints the results of the baseline unit, all error paths included, and
// calls no other. odr_program dispatch: runs every unit that this machine can, alone and with the
// others' objects, and compares.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "unit.hpp"

using namespace qeft_odr;

namespace {

int faults = 0;

void expect(bool good, const char* unit, const char* what) {
  if (good) return;
  std::printf("FAULT: %s: %s\n", unit, what);
  ++faults;
}

std::uint64_t hash(const void* data, std::size_t size) {
  std::uint64_t h = 1469598103934665603U;
  for (std::size_t i = 0; i < size; ++i) {
    h = (h ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211U;
  }
  return h;
}

bool close(const float* a, const float* b, index_t count, double tolerance = 1e-6) {
  double error = 0.0;
  double norm = 0.0;
  for (index_t i = 0; i < count; ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    error += difference * difference;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return error <= tolerance * tolerance * norm && norm > 0.0;
}

/// `user` works with what `maker` made.
void check_pair(const unit& maker, const unit& user, const outputs& expected) {
  float x[columns];
  for (index_t i = 0; i < columns; ++i) x[i] = activation(i);
  float y[rows] = {};
  const qeft::on_host exec = maker.executor();
  qeft::quantized_matrix<> packed;
  maker.fill(&packed);
  const matrix tiles = qeft::repack<qeft::layout::simd_tile>(exec, packed);
  user.multiply(exec, tiles.view<format>(weak{}), x, y);
  expect(close(y, expected.one_token, rows), user.name, "gemv of a view of another unit's matrix");
  qeft::quantized_matrix<> again = packed;
  user.fill(&again);  // replaces what the other unit allocated
  expect(again.codes().size() == packed.codes().size() &&
             std::memcmp(again.codes().data(), packed.codes().data(),
                         static_cast<std::size_t>(packed.codes().size())) == 0,
         user.name, "assignment to another unit's matrix");
  const qeft::status s = user.refused_launch(exec, tiles.view<format>(weak{}), y);
  expect(s.code() == qeft::errc::invalid_argument && s.message().find("x") != std::string::npos,
         user.name, "a status from another unit");
}

bool error_arrives(const unit& u) {
  try {
    u.throws();
  } catch (const qeft::error& e) {
    return e.code() == qeft::errc::invalid_argument && std::strstr(e.what(), "-7") != nullptr;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  outputs expected{};
  baseline.work(&expected);
  expect(error_arrives(baseline), "baseline", "an error");
  check_pair(baseline, baseline, expected);
  std::printf("%016llx\n", static_cast<unsigned long long>(hash(&expected, sizeof expected)));

  if (argc > 1 && std::strcmp(argv[1], "dispatch") == 0) {
    const unit* units[3] = {&baseline};
    int count = 1;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) units[count++] = &v3;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      units[count++] = &v4;
    }
    for (int i = 0; i < count; ++i) {
      const unit& u = *units[i];
      outputs out{};
      u.work(&out);
      expect(close(out.one_token, expected.one_token, rows), u.name, "gemv");
      expect(close(out.slow, expected.slow, rows), u.name, "gemv of rows");
      expect(close(out.many_tokens, expected.many_tokens, 3 * rows), u.name, "gemm");
      expect(close(out.portable, expected.portable, rows), u.name, "portable gemv");
      expect(close(out.int8, expected.one_token, rows, 0.02), u.name, "int8 gemv");
      float halves[rows];
      for (index_t n = 0; n < rows; ++n) halves[n] = qeft::to_float(out.halves[n]);
      expect(close(halves, expected.one_token, rows, 1e-3), u.name, "gemv of halves");
      expect(close(out.permuted, expected.permuted, rows), u.name, "a permuted layer");
      expect(error_arrives(u), u.name, "an error");
      for (int j = 0; j < count; ++j) check_pair(*units[i], *units[j], expected);
    }
    outputs again{};
    baseline.work(&again);
    expect(std::memcmp(&again, &expected, sizeof again) == 0, "baseline", "the same results again");
    std::printf("%d units ran\n", count);
  }
  return faults == 0 ? 0 : 1;
}
