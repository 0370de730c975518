// SPDX-License-Identifier: Apache-2.0
// What launchers ask of their arguments.
#pragma once

#include <initializer_list>

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/device/on_stream.cuh"
#include "qeft/layout/fragment.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

/// Numbers that fit the 32-bit arithmetic of kernels.
inline constexpr index_t most_channels = index_t{1} << 28;
/// What kernels with a row of blocks per token can be launched for.
inline constexpr index_t most_tokens = 65535;

template <class T>
inline constexpr bool is_half_v = std::is_same_v<T, half_bits> || std::is_same_v<T, bf16_bits>;

/// @tparam X of activations  @tparam Y of outputs
template <class X, class Y>
constexpr void check_scalars() {
  static_assert(is_half_v<X>,
                "qeft: products on a stream need qeft::half_bits or qeft::bf16_bits activations");
  static_assert(
      std::is_same_v<Y, float> || is_half_v<Y>,
      "qeft: products on a stream need float, qeft::half_bits or qeft::bf16_bits outputs");
}
/// @tparam X of what the layer is multiplied with
template <class View, class X>
constexpr void check_types() {
  static_assert(std::is_same_v<typename View::memory_type, device_memory>,
                "qeft: products on a stream need a matrix in device memory");
  static_assert(std::is_same_v<typename View::scalar_type, X>,
                "qeft: products on a stream need activations of the layer's scalar type");
}

inline status refuse(const std::string& reason) { return {errc::invalid_argument, reason}; }

inline bool is_aligned(const void* p, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

/// Shape, groups and pointers of a layer over layout::fragment. @param function named in errors
template <class F, class W, class L, class M>
status check_layer(const char* function, const quantized_matrix_view<F, W, L, M>& w) {
  if (w.out_channels < 1 || w.in_channels < 1 || w.dense_columns() < 0 ||
      w.out_channels > most_channels || w.in_channels > most_channels) {
    return refuse(text(function, ": w is ", w.out_channels, " x ", w.in_channels, " with ",
                       w.weak_columns(), " weak columns, but must have 1 to ", most_channels,
                       " rows and columns and at most in_channels weak columns"));
  }
  if (w.columns_per_group < 1 || w.columns_per_group > most_channels ||
      w.groups != ceil_div(w.dense_columns(), w.columns_per_group) ||
      (w.groups > 1 && w.columns_per_group % 32 != 0)) {
    return refuse(text(function, ": w has groups = ", w.groups, " and columns_per_group = ",
                       w.columns_per_group, ", but its ", w.dense_columns(),
                       " dense columns need groups of a multiple of 32, or one for all"));
  }
  const auto bad = [](const void* p, bool needed) {
    return needed && (p == nullptr || !is_aligned(p, 16));
  };
  const bool dense = w.dense_columns() > 0;
  const char* name = nullptr;
  if (bad(w.codes, dense)) name = "codes";
  if (bad(w.scales, dense)) name = "scales";
  if (bad(w.zeros, dense && F::zero != zero_kind::symmetric)) name = "zeros";
  if (bad(w.weak_values, w.weak_columns() > 0)) name = "weak_values";
  if (name == nullptr) return {};
  return refuse(text(function, ": ", name,
                     " of w is null or not 16-byte aligned; make the view with "
                     "quantized_matrix::view"));
}

/// An array among the arguments, and its name.
struct named_array {
  template <class T>
  named_array(const char* its_name, const T* data)
      : name(its_name), pointer(data), alignment(alignof(T)) {}

  const char* name;
  const void* pointer;
  std::uintptr_t alignment;
};

/// An array that is read or written.
inline status check_array(const char* function, const named_array& a) {
  if (a.pointer != nullptr && is_aligned(a.pointer, a.alignment)) return {};
  return refuse(text(function, ": ", a.name, " is ",
                     a.pointer == nullptr ? "null" : "not aligned to its elements"));
}

/// A number of tokens, and arrays that are read or written when there are any.
inline status check_tokens(const char* function, index_t tokens,
                           std::initializer_list<named_array> arrays) {
  if (tokens < 0 || tokens > most_tokens) {
    return refuse(
        text(function, ": tokens is ", tokens, ", but must be between 0 and ", most_tokens));
  }
  if (tokens == 0) return {};
  for (const named_array& a : arrays) {
    if (status s = check_array(function, a); !s.ok()) return s;
  }
  return {};
}

inline status check_workspace(const char* function, const on_stream& exec, index_t needed) {
  const std::byte* p = exec.workspace.data();
  if (needed <= exec.workspace.size() && (needed == 0 || (p != nullptr && is_aligned(p, 256)))) {
    return {};
  }
  return refuse(text(function, ": exec.workspace has ", exec.workspace.size(),
                     " bytes, but must have ", needed,
                     " with an alignment of 256 (workspace_bytes)"));
}

/// @param major first number of a device's compute capability
inline status check_capability(const char* function, int major) {
  if (major >= 8) return {};
  return {errc::unsupported,
          text(function, ": the device has compute capability ", major, ".x, but 8.0 is needed")};
}
/// The current device.
inline status check_capability(const char* function) {
  int major = 0;
  if (status s = qeft::detail::device_attribute(major, cudaDevAttrComputeCapabilityMajor);
      !s.ok()) {
    return s;
  }
  return check_capability(function, major);
}

/// Lets a kernel have more shared memory than it may without being asked. Always the same value: it
/// belongs to the function, not to the launch.
template <class Kernel>
status allow_shared(const char* function, Kernel* kernel, int bytes) {
  if (bytes <= 48 * 1024) return {};
  return qeft::detail::cuda_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), function);
}

/// Whether the current device has compute capability 9.0 and runs code of a kernel that was made
/// for sm_90a. That code has static shared memory, which any other has only where a functor of the
/// user's brings some. (It is then taken for code for sm_90a, if all that a unit instantiates is
/// made for the same architectures.)
template <class Kernel>
status is_sm90a_code(Kernel* kernel, bool& is) {
  is = false;
  int major = 0;
  if (status s = qeft::detail::device_attribute(major, cudaDevAttrComputeCapabilityMajor);
      !s.ok() || major != 9) {
    return s;
  }
  cudaFuncAttributes attributes{};
  const cudaError_t code = cudaFuncGetAttributes(&attributes, kernel);
  is = code == cudaSuccess && attributes.sharedSizeBytes > 0;
  return qeft::detail::cuda_status(code, "gemm: cudaFuncGetAttributes");
}

/// body(view) with the typed view of a matrix, which must be one of Formats.
template <class Formats, class M, class Body>
status with_any_view(const quantized_matrix<layout::fragment, M>& w, const Body& body) {
  if (status s = validate(w.descriptor()); !s.ok()) return s;  // moved from, or never filled
  status result;
  try {
    w.template visit<Formats>([&](const auto& view) {
      static_cast<void>(result = body(view));  // nvcc takes it for a value that is dropped
    });
  } catch (const error& e) {  // a format that is not built in
    return {e.code(), e.what()};
  }
  return result;
}

/// The same with a matrix that must be of X's type.
template <class Formats, class X, class M, class Body>
status with_view(const char* function, const quantized_matrix<layout::fragment, M>& w,
                 const Body& body) {
  static_assert(is_half_v<X>,
                "qeft: products on a stream need qeft::half_bits or qeft::bf16_bits activations");
  if constexpr (is_half_v<X>) {
    const scalar_kind scalar = w.descriptor().scalar;
    if (validate(w.descriptor()).ok() && scalar_kind_of<X>::value != scalar) {
      return {errc::unsupported,
              text(function, ": x is ", to_string(scalar_kind_of<X>::value), ", but the layer ",
                   to_string(scalar), "; on a device they must be the same")};
    }
    return with_any_view<Formats>(w, [&](const auto& view) {
      if constexpr (std::is_same_v<typename std::decay_t<decltype(view)>::scalar_type, X>) {
        return body(view);
      } else {
        return status{};  // never: the types were compared
      }
    });
  }
}

}  // namespace device::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
