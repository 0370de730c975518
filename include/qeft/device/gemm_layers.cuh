// SPDX-License-Identifier: Apache-2.0
// Products of several quantised layers with the same activations (q, k and v; gate and up) on a
// device.
#pragma once

#include "qeft/device/gemm.cuh"

namespace qeft {

/// A layer, and what becomes of its product. Made in the call: it refers to the layer.
template <class Layer, class Y, class Epilogue = epilogue::none>
struct layer_output {
  const Layer& w;  // OC x IC: a quantized_matrix_view over layout::fragment in device memory, or
                   // its owner
  Y* y;            // (tokens, OC) row-major
  Epilogue epilogue = {};
};
template <class Layer, class Y>
layer_output(const Layer&, Y*) -> layer_output<Layer, Y>;
template <class Layer, class Y, class Epilogue>
layer_output(const Layer&, Y*, Epilogue) -> layer_output<Layer, Y, Epilogue>;

inline namespace QEFT_TARGET {
namespace device::detail {

/// Whether two layers of the same IC and k want activations in the same order.
template <class Weak>
bool same_order([[maybe_unused]] const Weak& a, [[maybe_unused]] const Weak& b) {
  if constexpr (Weak::kind == weak_kind::indexed) {
    return a.index == b.index;
  } else if constexpr (Weak::kind == weak_kind::per_head) {
    return a.heads == b.heads;
  } else {
    return true;
  }
}
/// Orders of activations that layers need.
template <class View, class Y, class Epilogue, int Layers>
int orders_of(const layer_output<View, Y, Epilogue> (&layers)[Layers]) {
  for (const auto& l : layers) {
    if (!same_order(layers[0].w.weak, l.w.weak)) return Layers;
  }
  return 1;
}

/// Whether layers may share a launch, and why not.
template <class View, class Y, class Epilogue, int Layers>
status check_alike(const layer_output<View, Y, Epilogue> (&layers)[Layers]) {
  const View& first = layers[0].w;
  for (int i = 1; i < Layers; ++i) {
    const View& w = layers[i].w;
    const auto differ = [&](const char* name, index_t is, index_t was) {
      return refuse(text("gemm: w of layer ", i, " has ", name, " = ", is, ", but that of layer 0 ",
                         was, "; layers of one launch must be alike"));
    };
    if (w.in_channels != first.in_channels) {
      return differ("in_channels", w.in_channels, first.in_channels);
    }
    if (w.weak_columns() != first.weak_columns()) {
      return differ("weak columns k", w.weak_columns(), first.weak_columns());
    }
    if (w.columns_per_group != first.columns_per_group) {
      return differ("columns_per_group", w.columns_per_group, first.columns_per_group);
    }
  }
  return {};
}

template <class View, class X, class Y, class Epilogue, int Layers, int... Index>
status launch_layers(const on_stream& exec, const layer_output<View, Y, Epilogue> (&layers)[Layers],
                     const X* x, index_t tokens, std::integer_sequence<int, Index...>) {
  const activation_plan plan = plan_activations(layers[0].w, x);
  const index_t bytes = gathered_bytes(plan, tokens);
  const int orders = orders_of(layers);
  const X* x_of[] = {(static_cast<void>(Index), x)...};
  if (plan.gathered) {
    for (int i = 0; i < Layers; ++i) {
      auto* to = reinterpret_cast<X*>(exec.workspace.data() + (orders == 1 ? 0 : i) * bytes);
      x_of[i] = to;
      if (i >= orders) continue;
      if (status s = launch_order(exec.stream, layers[i].w, plan, x, tokens, to); !s.ok()) {
        return s;
      }
    }
  }
  kernel::product_args<decltype(as_tail(layers[0].w)), Y, Epilogue> args[] = {args_of(
      layers[Index].w, plan, x_of[Index], tokens, layers[Index].y, layers[Index].epilogue)...};
  return launch_products(exec.stream, args, exec.workspace.data() + orders * bytes);
}

/// The view of an owner as type View. @pre it is of that format and placement
template <class View, class M>
View view_of(const quantized_matrix<layout::fragment, M>& w) {
  View view{};
  visit_weak(w.descriptor(), w.weak_index().data(), [&](auto weak) {
    if constexpr (std::is_same_v<decltype(weak), typename View::weak_type>) {
      view = w.template view<typename View::format_type>(weak);
    }
  });
  return view;
}

/// Whether owners may share a launch as far as types go, and why not.
template <class M, class Y, class Epilogue, int Layers>
status check_types_alike(
    const layer_output<quantized_matrix<layout::fragment, M>, Y, Epilogue> (&layers)[Layers]) {
  const matrix_descriptor& first = layers[0].w.descriptor();
  for (int i = 1; i < Layers; ++i) {
    const matrix_descriptor& d = layers[i].w.descriptor();
    if (status s = validate(d); !s.ok()) return s;  // moved from, or never filled
    const char* what = nullptr;
    if (d.bits != first.bits) what = "number of bits";
    if (d.zero != first.zero) what = "kind of zero points";
    if (d.scalar != first.scalar) what = "scalar type";
    if (d.weak != first.weak) what = "placement of weak columns";
    if (what != nullptr) {
      return refuse(text("gemm: w of layer ", i, " has another ", what,
                         " than that of layer 0; layers of one launch must be alike"));
    }
  }
  return {};
}

/// body(layers) with typed views in place of owners, which must be of X's type and of one of
/// Formats.
template <class Formats, class X, class M, class Y, class Epilogue, int Layers, class Body,
          int... Index>
status with_views(
    const layer_output<quantized_matrix<layout::fragment, M>, Y, Epilogue> (&layers)[Layers],
    const Body& body, std::integer_sequence<int, Index...>) {
  if (status s = check_types_alike(layers); !s.ok()) return s;
  return with_view<Formats, X>("gemm", layers[0].w, [&](const auto& view) {
    using view_type = std::decay_t<decltype(view)>;
    const view_type views[] = {view_of<view_type>(layers[Index].w)...};
    const layer_output<view_type, Y, Epilogue> of_views[] = {
        {views[Index], layers[Index].y, layers[Index].epilogue}...};
    return body(of_views);
  });
}

}  // namespace device::detail

/// Bytes of workspace that gemm of several layers needs with these operands.
template <class F, class W, class L, class M, class X, class Y, class Epilogue, int Layers>
index_t workspace_bytes(
    const on_stream&,
    const layer_output<quantized_matrix_view<F, W, L, M>, Y, Epilogue> (&layers)[Layers],
    const X* x, index_t tokens) {
  namespace d = device::detail;
  d::check_types<quantized_matrix_view<F, W, L, M>, X>();
  const auto& first = layers[0].w;
  index_t out_channels[Layers];
  for (int i = 0; i < Layers; ++i) out_channels[i] = layers[i].w.out_channels;
  return d::orders_of(layers) * d::gathered_bytes(d::plan_activations(first, x), tokens) +
         d::part_sums_bytes(d::parts_of(first), out_channels, tokens);
}

/// Whether gemm of several layers would accept these operands, and why not.
template <class F, class W, class L, class M, class X, class Y, class Epilogue, int Layers>
status supports_gemm(
    const on_stream& exec,
    const layer_output<quantized_matrix_view<F, W, L, M>, Y, Epilogue> (&layers)[Layers],
    const X* x, index_t tokens) {
  namespace d = device::detail;
  static_assert(Layers <= kernel::most_layers, "qeft::gemm: at most four layers share a launch");
  static_assert(std::is_same_v<L, layout::fragment>,
                "qeft::gemm: layers of one launch need qeft::layout::fragment; repack them");
  d::check_scalars<X, Y>();
  if (status s = d::check_alike(layers); !s.ok()) return s;
  for (const auto& l : layers) {
    if (status s = d::check_layer("gemm", l.w); !s.ok()) return s;
    const Y* const y = l.y;
    if (status s = d::check_tokens("gemm", tokens, {{"x", x}, {"y", y}}); !s.ok()) return s;
  }
  if (status s = d::check_workspace("gemm", exec, workspace_bytes(exec, layers, x, tokens));
      !s.ok()) {
    return s;
  }
  return d::check_capability("gemm");
}

/// gemm of two to four layers with the same activations, bit for bit what gemm of each writes.
/// Their products share a launch, so that small layers fill the device together:
///
///     gemm(exec, {layer_output{w_gate, gate}, layer_output{w_up, up}}, x, tokens)
///
/// Where activations are put into order, or sums of parts are added, that takes launches of its
/// own.
///
/// @param layers of one type, with the same IC, k and group size; OC may differ. No two outputs
///               overlap
/// @param x, tokens as in gemm of one layer. Where activations are put into order, that is done
///               once if weak columns are tail, per_head with as many heads, or indexed by the same
///               array; else once per layer
/// @return what supports_gemm says, or that a launch failed; then nothing, or only the workspace,
///         is written
template <class F, class W, class L, class M, class X, class Y, class Epilogue, int Layers>
status gemm(const on_stream& exec,
            const layer_output<quantized_matrix_view<F, W, L, M>, Y, Epilogue> (&layers)[Layers],
            const X* x, index_t tokens) {
  namespace d = device::detail;
  static_assert(epilogue::is_epilogue_v<Epilogue>,
                "qeft::gemm: Epilogue must be trivially copyable and callable as "
                "float(float value, qeft::index_t token, qeft::index_t channel) const");
  if (status s = supports_gemm(exec, layers, x, tokens); !s.ok() || tokens == 0) return s;
  return d::launch_layers(exec, layers, x, tokens, std::make_integer_sequence<int, Layers>{});
}

/// workspace_bytes of layers whose format is known at run time; 0 where that is not built in.
template <class Formats = device_formats, class M, class X, class Y, class Epilogue, int Layers>
index_t workspace_bytes(
    const on_stream& exec,
    const layer_output<quantized_matrix<layout::fragment, M>, Y, Epilogue> (&layers)[Layers],
    const X* x, index_t tokens) {
  index_t bytes = 0;
  static_cast<void>(device::detail::with_views<Formats, X>(
      layers,
      [&](const auto& views) {
        bytes = workspace_bytes(exec, views, x, tokens);
        return status{};
      },
      std::make_integer_sequence<int, Layers>{}));
  return bytes;
}

/// supports_gemm of layers whose format is known at run time.
template <class Formats = device_formats, class M, class X, class Y, class Epilogue, int Layers>
status supports_gemm(
    const on_stream& exec,
    const layer_output<quantized_matrix<layout::fragment, M>, Y, Epilogue> (&layers)[Layers],
    const X* x, index_t tokens) {
  return device::detail::with_views<Formats, X>(
      layers, [&](const auto& views) { return supports_gemm(exec, views, x, tokens); },
      std::make_integer_sequence<int, Layers>{});
}

/// gemm of layers whose format is known at run time, out of Formats.
template <class Formats = device_formats, class M, class X, class Y, class Epilogue, int Layers>
status gemm(
    const on_stream& exec,
    const layer_output<quantized_matrix<layout::fragment, M>, Y, Epilogue> (&layers)[Layers],
    const X* x, index_t tokens) {
  return device::detail::with_views<Formats, X>(
      layers, [&](const auto& views) { return gemm(exec, views, x, tokens); },
      std::make_integer_sequence<int, Layers>{});
}

}  // namespace QEFT_TARGET
}  // namespace qeft
