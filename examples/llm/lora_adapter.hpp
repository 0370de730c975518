// SPDX-License-Identifier: Apache-2.0
// Files of LoRA and QA-LoRA adapters, with the names that PEFT has.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "parameter.hpp"

namespace qeft_llm {

/// What an adapter adds to one linear: alpha / r * B A.
struct lora_linear {
  qeft::index_t out_channels = 0;
  qeft::index_t width = 0;  // columns of A: IC, or with QA-LoRA the groups of the layer
  std::vector<float> a;     // (r, width)
  std::vector<float> b;     // (OC, r)
};

struct lora_adapter {
  bool groupwise = false;  // QA-LoRA
  qeft::index_t rank = 0;  // r
  double alpha = 0;
  std::string base;                            // weights_fingerprint of the model that was tuned
  std::string architecture;                    // as in qeft::io::adapter
  std::map<std::string, lora_linear> linears;  // by name, without ".weight"
};

/// The product alpha / r * B A of a linear, (OC, width), in double.
std::vector<double> product(const lora_adapter& adapter, const lora_linear& linear);

/// The parameters of a model of lora layers, as they are. The rest of the adapter is left to the
/// caller.
std::map<std::string, lora_linear> lora_linears(const std::vector<parameter>& parameters);

/// Whether a file says that it is such an adapter. @throws qeft::error errc::io_error and
/// errc::corrupt_file for what is no safetensors file
bool is_lora_adapter(const std::filesystem::path& path);

/// Writes one safetensors file: base_model.model.NAME.lora_A.weight, (r, width), and
/// base_model.model.NAME.lora_B.weight, (OC, r), both F32; r, lora_alpha, whether it is groupwise,
/// base and architecture in the metadata. @throws qeft::error errc::not_finite, naming the tensor,
/// for NaN and infinity, and errc::io_error; then a file that was there is as it was
void write_lora_adapter(const std::filesystem::path& path, const lora_adapter& adapter);

/// The counterpart of write_lora_adapter. @throws qeft::error errc::corrupt_file, naming file and
/// tensor, for what is not as write_lora_adapter leaves it
lora_adapter read_lora_adapter(const std::filesystem::path& path);

}  // namespace qeft_llm
