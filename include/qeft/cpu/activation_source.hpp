// SPDX-License-Identifier: Apache-2.0
// Where the activations of a call come from: any element type and weak policy behind one signature,
// so that packing is compiled once.
#pragma once

#include "qeft/cpu/scratch.hpp"
#include "qeft/cpu/simd.hpp"
#include "qeft/thread/activation_order.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

/// The runs of a weak policy by ascending slot, that is, the dense ones first.
class run_list {
 public:
  template <class Weak>
  void assign(const Weak& weak, index_t in_channels) {
    runs_.resize(count_runs(weak, in_channels));
    activation_run* end = runs_.data();
    const auto append = [&](const activation_run& run) { *end++ = run; };
    for_each_dense_run(weak, in_channels, append);
    for_each_weak_run(weak, in_channels, append);
  }
  const activation_run* data() const noexcept { return runs_.data(); }

 private:
  template <class Weak>
  static index_t count_runs(const Weak& weak, index_t in_channels) {
    index_t runs = 0;
    const auto count = [&](const activation_run&) { ++runs; };
    for_each_dense_run(weak, in_channels, count);
    for_each_weak_run(weak, in_channels, count);
    return runs;
  }
  scratch<activation_run> runs_;
};

/// to(count) = x[first ...] as floats.
template <class Isa, class X>
void convert_activations(const void* x, index_t first, index_t count, float* to) {
  const X* from = static_cast<const X*>(x) + first;
  index_t i = 0;
  for (; i + Isa::lanes <= count; i += Isa::lanes) Isa::store(to + i, Isa::load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

/// Valid while `runs` lives.
class activation_source {
 public:
  template <class Isa, class X>
  static activation_source of(const X* x, index_t in_channels, const run_list& runs) {
    return {x, in_channels, runs.data(), &convert_activations<Isa, X>};
  }

  /// Reads the activations of one token in the kernel's order, from slot 0 on.
  class reader {
   public:
    reader() = default;
    reader(const activation_source& source, index_t token)
        : source_(&source), row_(token * source.in_channels_), run_(source.runs_) {}

    /// The next `count` activations.
    void read(index_t count, float* to) {
      while (count > 0) {
        const index_t left = run_->count - used_;
        const index_t here = count < left ? count : left;
        source_->convert_(source_->x_, row_ + run_->column + used_, here, to);
        to += here;
        count -= here;
        used_ += here;
        if (used_ == run_->count) {
          ++run_;
          used_ = 0;
        }
      }
    }

   private:
    const activation_source* source_ = nullptr;
    index_t row_ = 0;
    const activation_run* run_ = nullptr;
    index_t used_ = 0;  // of the run
  };

 private:
  using convert = void (*)(const void* x, index_t first, index_t count, float* to);
  activation_source(const void* x, index_t in_channels, const activation_run* runs, convert c)
      : x_(x), in_channels_(in_channels), runs_(runs), convert_(c) {}

  const void* x_;  // (tokens, IC)
  index_t in_channels_;
  const activation_run* runs_;
  convert convert_;
};

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
