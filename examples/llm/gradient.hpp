// SPDX-License-Identifier: Apache-2.0
// The gradient metric of weak-column selection: squared gradient per input column of each linear
// (METHOD section 2; the theorem of the paper's section 4).
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "config.hpp"
#include "hf_model.hpp"
#include "qeft/core/on_host.hpp"

namespace qeft_llm {

/// Tensor name, such as "model.layers.3.self_attn.q_proj", to one number per input column: (IC).
using column_sensitivities = std::map<std::string, std::vector<double>>;

/// Called after each sample with its number, from 0, and its loss in nats per token.
using gradient_progress = std::function<void(qeft::index_t sample, double loss)>;

/// sum over samples of ||dL/dW_:,j||^2 for every input column j of every linear in the blocks,
/// where L is the mean next-token cross-entropy of ONE sample. Squaring before summing makes it the
/// diagonal of an empirical Fisher matrix, summed over each column; gradients of different samples
/// do not cancel.
///
/// Runs the full-precision model forward and backward in FP32, one sample at a time. All weights
/// stay resident, in 16 bits as in inference. Of the activations only each block's input is kept;
/// the backward pass computes the block again. Results do not depend on the number of threads.
/// @param windows token ids, at least 2 per sample; samples may differ in length
/// @throws qeft::error for a missing or misshapen tensor, a short sample, a token outside of the
///         vocabulary, or a loss that is not finite
column_sensitivities gradient_sensitivity(const qeft::on_host& exec, const model_config& config,
                                          const hf_weights& weights,
                                          const std::vector<std::vector<int>>& windows,
                                          const gradient_progress& progress = {});

}  // namespace qeft_llm
