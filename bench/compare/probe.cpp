// SPDX-License-Identifier: Apache-2.0
// The jobs that bench/compare times, of one version of the library, as a shared library.
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "qeft/container/repack.hpp"
#include "qeft/cpu/matmul.hpp"
#include "qeft/reorder/permute_matrix.hpp"
#include "support/layers.hpp"

namespace {

using namespace qeft_bench;
using qeft::layout::row_packed;
using qeft::layout::simd_tile;

void keep(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

template <class Activation>
std::function<void()> product(const qeft::on_host& exec, const qeft::quantized_matrix<>& w,
                              index_t tokens) {
  const index_t oc = w.descriptor().out_channels;
  const index_t ic = w.descriptor().in_channels;
  rotation layers(qeft::repack<simd_tile>(exec, w),
                  qeft::storage_of<simd_tile>(w.descriptor()).total());
  const auto x = random_floats(tokens * ic);
  std::vector<float> y(static_cast<std::size_t>(tokens * oc));
  const qeft::cpu::executor<Activation> with(exec);
  return [=]() mutable {
    qeft::gemm(with, layers.next(), x.data(), tokens, y.data()).throw_if_error();
  };
}

template <class To, class From>
std::function<void()> conversion(const qeft::on_host& exec, const qeft::quantized_matrix<From>& w) {
  return [=] { keep(qeft::repack<To>(exec, w).codes().data()); };
}

std::function<void()> make(const std::string& job, const shape& s, int bits, index_t tokens,
                           int threads) {
  const qeft::on_host exec(threads);
  const auto w = random_matrix(describe(s, bits, 128, job == "fp16" ? s.in_channels : 16));
  if (job == "exact" || job == "fp16") return product<qeft::cpu::exact>(exec, w, tokens);
  if (job == "int8") return product<qeft::cpu::int8>(exec, w, tokens);
  if (job == "repack") return conversion<simd_tile>(exec, w);
  if (job == "unpack") return conversion<row_packed>(exec, qeft::repack<simd_tile>(exec, w));
  if (job == "permute_rows") {
    std::vector<std::int32_t> reversed;
    for (index_t n = s.out_channels; n-- > 0;) reversed.push_back(static_cast<std::int32_t>(n));
    return [=, p = qeft::permutation(reversed)] { keep(qeft::permute_rows(p, w).codes().data()); };
  }
  throw std::invalid_argument("unknown job " + job);
}

}  // namespace

extern "C" void* qeft_make(const char* job, long oc, long ic, int bits, long tokens, int threads) {
  return new std::function<void()>(make(job, {"", oc, ic}, bits, tokens, threads));
}
extern "C" void qeft_run(void* job) { (*static_cast<std::function<void()>*>(job))(); }
extern "C" void qeft_free(void* job) { delete static_cast<std::function<void()>*>(job); }
