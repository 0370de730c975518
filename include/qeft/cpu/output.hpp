// SPDX-License-Identifier: Apache-2.0
// Where outputs go: any epilogue and element type behind one signature, so that the heavy code is
// compiled once.
#pragma once

#include "qeft/cpu/simd.hpp"
#include "qeft/thread/epilogue.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu::detail {

/// Valid while the epilogue lives.
struct output {
  void* y;  // (tokens, OC)
  const void* epilogue;
  index_t out_channels;
  void (*store_rows)(const output&, index_t token, index_t channel, float* values, index_t count);

  /// Stores values(count), the products of output channels [channel, channel + count); spoils them.
  void store(index_t token, index_t channel, float* values, index_t count) const {
    store_rows(*this, token, channel, values, count);
  }
};

template <class Isa, class Y, class Epilogue>
void store_rows(const output& to, index_t token, index_t channel, float* values, index_t count) {
  const Epilogue& then = *static_cast<const Epilogue*>(to.epilogue);
  Y* row = static_cast<Y*>(to.y) + token * to.out_channels;
  for (index_t i = 0; i < count; ++i) values[i] = then(values[i], token, channel + i);
  if constexpr (qeft::epilogue::detail::moves_channels<Epilogue>) {
    for (index_t i = 0; i < count; ++i) {
      row[qeft::epilogue::destination(then, channel + i)] = from_float<Y>(values[i]);
    }
  } else {
    row += channel;
    index_t i = 0;
    for (; i + Isa::lanes <= count; i += Isa::lanes) Isa::store(row + i, Isa::load(values + i));
    for (; i < count; ++i) row[i] = from_float<Y>(values[i]);
  }
}

template <class Isa, class Y, class Epilogue>
output make_output(Y* y, const Epilogue& epilogue, index_t out_channels) {
  return {y, &epilogue, out_channels, &store_rows<Isa, Y, Epilogue>};
}

}  // namespace cpu::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
