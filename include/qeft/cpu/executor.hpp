// SPDX-License-Identifier: Apache-2.0
// The policies that only products on the CPU have, as part of their executor.
#pragma once

#include "qeft/core/on_host.hpp"
#include "qeft/cpu/exact.hpp"
#include "qeft/cpu/int8.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu {

/// An on_host whose products use these policies; a plain on_host stands for executor<>.
/// @tparam Activation exact or int8: how activations are multiplied, see there
/// @tparam Isa        one of cpu::isa that this translation unit may use
template <class Activation = exact, class Isa = native_isa>
class executor : public on_host {
 public:
  static_assert(std::is_same_v<Activation, exact> || std::is_same_v<Activation, int8>,
                "qeft::cpu::executor: Activation must be qeft::cpu::exact or qeft::cpu::int8");
  using activation = Activation;
  using isa = Isa;

  /// Shares the pool of `host`.
  explicit executor(const on_host& host) : on_host(host) {}
};

/// `host` with other policies: gemm(cpu::with<cpu::int8>(exec), w, x, tokens, y).
template <class Activation, class Isa = native_isa>
executor<Activation, Isa> with(const on_host& host) {
  return executor<Activation, Isa>(host);
}

namespace detail {

/// The policies of a host executor.
template <class Executor>
struct policies;
template <class Activation, class Isa>
struct policies<executor<Activation, Isa>> {
  using activation = Activation;
  using isa = Isa;
};
template <>
struct policies<on_host> : policies<executor<>> {};

}  // namespace detail

}  // namespace cpu
}  // namespace QEFT_TARGET
}  // namespace qeft
