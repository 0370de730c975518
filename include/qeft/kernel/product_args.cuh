// SPDX-License-Identifier: Apache-2.0
// What kernels of products are about.
#pragma once

#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/thread/epilogue.hpp"
#include "qeft/tuning/parts.hpp"

namespace qeft::kernel {

/// Y = X W^T, passed by value.
template <class View, class Y, class Epilogue>
struct product_args {
  View w;                                     // weak_tail over layout::fragment
  const typename View::scalar_type* dense_x;  // (tokens, IC - k), 16-byte aligned
  const typename View::scalar_type* weak_x;   // (tokens, k), 16-byte aligned
  int stride;                                 // of both, a multiple of 8
  int tokens;
  Y* y;  // (tokens, OC)
  Epilogue epilogue;
  tuning::parts parts;
  int parts_each = 1;  // that a warp of few_tokens takes in a row
};

}  // namespace qeft::kernel
