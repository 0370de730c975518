// SPDX-License-Identifier: Apache-2.0
// One factor of a product of two FP32 matrices, in the form that the inner loop reads.
#pragma once

#include "qeft/core/on_host.hpp"
#include "qeft/cpu/exact.hpp"
#include "qeft/cpu/scratch.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

/// Vectors of equal length in blocks of Isa::tokens (the last one smaller), the elements of a block
/// interleaved.
template <class Isa>
class interleaved {
 public:
  static constexpr index_t block = Isa::tokens;

  /// @param capacity elements of all vectors together, at most
  explicit interleaved(index_t capacity) : values_(capacity) {}

  void resize(index_t vectors, index_t length) noexcept {
    vectors_ = vectors;
    length_ = length;
  }
  index_t vectors() const noexcept { return vectors_; }
  /// Vectors of the block that starts at `vector`.
  index_t block_vectors(index_t vector) const noexcept {
    return vector + block <= vectors_ ? block : vectors_ - vector;
  }
  /// The block that starts at `vector`, from an element on; the innermost index is the vector's.
  const float* at(index_t vector, index_t element) const noexcept {
    return values_.data() + vector * length_ + element * block_vectors(vector);
  }

  /// Calls fill(first vector) for every block, on all threads.
  template <class Fill>
  void for_each_block(const on_host& exec, const Fill& fill) const {
    exec.parallel_for(vectors_, block, [&](index_t begin, index_t end) {
      for (; begin < end; begin += block) fill(begin);
    });
  }
  /// Elements [first, first + count) of the block that starts at `vector`: element first + i of
  /// vector + v is from[v * vector_stride + i * element_stride].
  void fill(index_t vector, index_t first, index_t count, const float* from, index_t vector_stride,
            index_t element_stride) {
    float* to = values_.data() + vector * length_ + first * block_vectors(vector);
    const auto copy = [&](auto vectors) QEFT_INLINE_LAMBDA {
      for (index_t i = 0; i < count; ++i) {
        for (index_t v = 0; v < vectors; ++v) {
          to[i * vectors + v] = from[v * vector_stride + i * element_stride];
        }
      }
    };
    if (block_vectors(vector) == block) {
      copy(std::integral_constant<index_t, block>{});
    } else {
      copy(block_vectors(vector));
    }
  }

 private:
  index_t vectors_ = 0;
  index_t length_ = 0;
  scratch<float> values_;
};

/// y(vectors, 32) += panel(depth, 32) times elements [first, first + depth) of each vector.
template <class Isa>
void add_product(const float* panel, index_t depth, const interleaved<Isa>& x, index_t first,
                 float* y) {
  using rows = row_vectors<Isa>;
  alignas(64) c_array<float, Isa::tokens * tile_rows> product;
  for (index_t v = 0; v < x.vectors(); v += Isa::tokens) {
    multiply_panel<Isa>(panel, depth, x.at(v, first), x.block_vectors(v), product);
    float* to = y + v * tile_rows;
    for (index_t i = 0; i < x.block_vectors(v) * tile_rows; i += tile_rows) {
      rows::store(to + i, rows::add(rows::load(to + i), rows::load(product + i)));
    }
  }
}

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
