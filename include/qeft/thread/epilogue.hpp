// SPDX-License-Identifier: Apache-2.0
// What happens to an output of a product between its last addition and its store, for every
// executor.
//
// An epilogue is a trivially copyable function object with
//   float operator()(float value, index_t token, index_t channel) const
// which returns what is stored, and optionally
//   index_t destination(index_t channel) const
// the position within the token's outputs where output channel `channel` is stored (a bijection of
// [0, OC)); without it, that is `channel`. For kernels on a device both are QEFT_HOST_DEVICE. Each
// output goes through it exactly once, in FP32, in any order and on any thread.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "qeft/core/half.hpp"

namespace qeft::epilogue {

/// Stores the product.
struct none {
  QEFT_HOST_DEVICE constexpr float operator()(float value, index_t, index_t) const noexcept {
    return value;
  }
};

/// Adds values[channel]. T: float, half_bits or bf16_bits.
template <class T>
struct bias {
  const T* values;  // (OC)

  QEFT_HOST_DEVICE float operator()(float value, index_t, index_t channel) const noexcept {
    return value + to_float(values[channel]);
  }
};
template <class T>
bias(const T*) -> bias<T>;

/// Adds values[token * stride + channel]. `values` may be the outputs themselves, when what follows
/// does not permute.
template <class T>
struct residual {
  const T* values;  // (tokens, stride)
  index_t stride;   // elements from one token to the next, usually OC

  QEFT_HOST_DEVICE float operator()(float value, index_t token, index_t channel) const noexcept {
    return value + to_float(values[token * stride + channel]);
  }
};
template <class T>
residual(const T*, index_t) -> residual<T>;

/// max(x, 0); NaN stays.
struct relu {
  QEFT_HOST_DEVICE float operator()(float value, index_t, index_t) const noexcept {
    return value < 0.0F ? 0.0F : value;
  }
};

/// x / (1 + e^-x)
struct silu {
  QEFT_HOST_DEVICE float operator()(float value, index_t, index_t) const noexcept {
    return value / (1.0F + expf(-value));
  }
};

/// x * Phi(x), with the error function; erfc keeps its precision where x is far below zero.
struct gelu {
  QEFT_HOST_DEVICE float operator()(float value, index_t, index_t) const noexcept {
    return 0.5F * value * erfcf(value * -0.70710678F);
  }
};

/// Stores channel n at to[n].
struct permute {
  const std::int32_t* to;  // (OC), a permutation

  QEFT_HOST_DEVICE float operator()(float value, index_t, index_t) const noexcept { return value; }
  QEFT_HOST_DEVICE index_t destination(index_t channel) const noexcept { return to[channel]; }
};

namespace detail {

template <class Epilogue, class = void>
inline constexpr bool moves_channels = false;
template <class Epilogue>
inline constexpr bool moves_channels<
    Epilogue, std::void_t<decltype(std::declval<const Epilogue&>().destination(index_t{}))>> = true;

}  // namespace detail

/// Where `epilogue` stores output channel `channel`.
template <class Epilogue>
QEFT_HOST_DEVICE constexpr index_t destination([[maybe_unused]] const Epilogue& epilogue,
                                               index_t channel) noexcept {
  if constexpr (detail::moves_channels<Epilogue>) {
    return epilogue.destination(channel);
  } else {
    return channel;
  }
}

/// `first`, and `second` of its result: the channel that `second` sees is where `first` stores.
template <class First, class Second>
struct then {
  First first;
  Second second;

  QEFT_HOST_DEVICE float operator()(float value, index_t token, index_t channel) const {
    return second(first(value, token, channel), token, epilogue::destination(first, channel));
  }
  QEFT_HOST_DEVICE index_t destination(index_t channel) const {
    return epilogue::destination(second, epilogue::destination(first, channel));
  }
};
template <class First, class Second>
then(First, Second) -> then<First, Second>;

/// Whether T is an epilogue: a function object that can be passed to any executor.
template <class T>
inline constexpr bool is_epilogue_v = std::is_trivially_copyable_v<T>&&
    std::is_invocable_r_v<float, const T&, float, index_t, index_t>;

}  // namespace qeft::epilogue
