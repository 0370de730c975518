// SPDX-License-Identifier: Apache-2.0
// Writes a quantised model: Offline Global Reordering of the packed layers (METHOD section 4), then
// the files of the checkpoint.
#pragma once

#include <filesystem>
#include <vector>

#include "column_choice.hpp"
#include "llama.hpp"
#include "qeft/io/quantization_config.hpp"
#include "qeft/reorder/reorder_plan.hpp"
#include "work_directory.hpp"

namespace qeft_llm {

/// The permutations that bring the columns of every layer into their order, weak ones last (of
/// o_proj: last in its heads, or not at all); identities when the model is not reordered.
/// @param columns knows those of every linear
qeft::reorder_plan reorder(const quantize_options& options, const model_config& config,
                           const column_choice& columns);

/// Throws when o_proj's weak columns are to lie in each head equally, but those that were taken
/// over from another checkpoint do not.
void check_heads(const model_config& config, const column_choice& columns);

/// Writes model.safetensors (or shards), config.json and copies of `side_files` to `directory`.
/// Layers are read from `finished`, reordered and written one at a time.
/// @param provenance of the model; the reports of the layers are added
/// @return what config.json says about the layers
qeft::io::quantization_config write_quantized_model(
    const std::filesystem::path& directory, const quantize_options& options,
    const model_source& source, const column_choice& columns, const work_directory& finished,
    const std::vector<std::filesystem::path>& side_files, nlohmann::json provenance);

}  // namespace qeft_llm
