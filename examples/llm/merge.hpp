// SPDX-License-Identifier: Apache-2.0
// Adapters of a model, and the commands `qeft-llm merge` and `qeft-llm unmerge` (METHOD section 7).
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "llama.hpp"
#include "lora_adapter.hpp"
#include "qeft/io/adapter.hpp"

namespace qeft_llm {

/// What tuning changed of a QEFT checkpoint.
/// @param base  the checkpoint before it
/// @param tuned the weak columns of a linear after it: (OC, k) row-major, rows and columns as
///              NAME.weak of the checkpoint has them, rounded here to its 16-bit type; null for a
///              linear that was not tuned. Asked for every linear with weak columns, in order
/// @throws qeft::error as make_adapter_linear; errc::invalid_argument when nothing was tuned
qeft::io::adapter make_adapter(const model_source& base,
                               const std::function<const float*(const std::string& linear)>& tuned);

/// What LoRA or QA-LoRA found. @param parameters of a model of lora layers
lora_adapter make_lora_adapter(const model_source& base, const std::vector<parameter>& parameters,
                               qeft::index_t rank, double alpha);

/// Whether `merge` wrote this model. @param model its directory
bool is_merged(const std::filesystem::path& model);

struct merge_options {
  std::string model;  // directory to read: a QEFT checkpoint, or a full-precision model
  std::string out;    // directory to write
  std::vector<std::string> adapters;  // files
  std::vector<double> weights;        // one per adapter; empty: all 1
  bool skip_missing = false;          // leave out columns that are not weak in the model
  bool other_base = false;            // add adapters that were made of another model
  bool json = false;                  // describe the result on stdout
};

/// Writes a copy of a model with adapters added: w = round(w0 + sum of weight * delta), the sum in
/// double and rounded once to the type that the model stores. In a QEFT checkpoint w are its weak
/// columns, in a full-precision model the columns of the same number. With one adapter of weight 1
/// and the checkpoint that it was made from, w are the tuned columns bit for bit.
///
/// Everything else is copied byte for byte. The list `qeft_adapters` of config.json gains file,
/// weight and base of each. before_merge.qeft holds what `unmerge` needs: the changed columns as
/// they were. They are half as large as an adapter, and subtracting in 16 bits need not give them
/// back.
///
/// An adapter of another base is an error unless other_base is set: its base must be the model, or
/// the model must be what its base was quantised from. Where the adapter does not name that, a
/// notice on stderr says so. Of another architecture or shape it is refused, and so is a model that
/// is merged already. Columns that are not weak in the model are
/// an error unless skip_missing is set; then each layer's number is said on stderr.
///
/// Adapters may also be those of LoRA, for a full-precision model: then delta is alpha / r * B A
/// and all columns change; and of QA-LoRA, for the checkpoint that was tuned: then w are its scaled
/// zero points, and the merged layer is W + alpha / r * B A up to their rounding to 16 bits.
/// Merging holds the changed columns in memory, here all, and before_merge.qeft is as large as
/// they are.
///
/// With json, stdout is one object: out, fingerprint (of the result), adapters, same_base (whether
/// all were made of this model, null where that is not known of one), columns and missing (numbers,
/// over all adapters), and layers, a list of name, columns and missing.
/// @return the exit status of the command
/// @throws qeft::error; then nothing is left at `out`
int run_merge(const merge_options& options);

struct unmerge_options {
  std::string model;  // directory that `merge` wrote
  std::string out;    // directory to write
};

/// Writes the model that `merge` started from, bit for bit: also the fingerprint must come out as
/// it was, else errc::corrupt_file. @return the exit status of the command
int run_unmerge(const unmerge_options& options);

}  // namespace qeft_llm
