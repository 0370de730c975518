// SPDX-License-Identifier: Apache-2.0
// Writes a quantised model: Offline Global Reordering of the packed layers (METHOD section 4), then
// the files of the checkpoint.
#pragma once

#include <filesystem>
#include <vector>

#include "llama.hpp"
#include "qeft/io/quantization_config.hpp"
#include "qeft/reorder/reorder_plan.hpp"
#include "weak_choice.hpp"
#include "work_directory.hpp"

namespace qeft_llm {

/// The permutations that bring the weak columns of every layer to the tail (of o_proj: to the tails
/// of its heads, or not at all); identities when the model is not reordered.
/// @param weak knows the columns of every linear
/// @throws qeft::error when those of o_proj do not suit its placement
qeft::reorder_plan reorder(const quantize_options& options, const model_config& config,
                           const weak_choice& weak);

/// Writes model.safetensors (or shards), config.json and copies of `side_files` to `directory`.
/// Layers are read from `finished`, reordered and written one at a time.
/// @param provenance of the model; the reports of the layers are added
/// @return what config.json says about the layers
qeft::io::quantization_config write_quantized_model(
    const std::filesystem::path& directory, const quantize_options& options,
    const model_source& source, const weak_choice& weak, const work_directory& finished,
    const std::vector<std::filesystem::path>& side_files, nlohmann::json provenance);

}  // namespace qeft_llm
