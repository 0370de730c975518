// SPDX-License-Identifier: Apache-2.0
// The channel spaces and tensors of a Llama-family model, for Offline Global Reordering.
#pragma once

#include <vector>

#include "config.hpp"
#include "qeft/reorder/reorder_plan.hpp"

namespace qeft_llm {

struct llama_graph {
  qeft::reorder_graph graph;  // tensors by their Hugging Face names, without ".weight" for linears
  qeft::space_id stream;      // the residual stream
  std::vector<qeft::space_id> mlp;    // per block: between gate/up and down
  std::vector<qeft::space_id> value;  // per block: value heads; o_proj's input repeats them
};

/// Rows of q and k are fixed by rotary embeddings, rows of the embedding and the head by the
/// vocabulary; everything else may move.
llama_graph describe(const model_config& config);

}  // namespace qeft_llm
