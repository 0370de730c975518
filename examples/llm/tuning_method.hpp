// SPDX-License-Identifier: Apache-2.0
// The training methods that can be compared, each as the linears that it makes of a model's.
#pragma once

#include <string>

#include "lora.hpp"
#include "tuned_block.hpp"

namespace qeft_llm {

enum class tuning_method {
  qeft,      // the weak columns of a QEFT checkpoint
  owq,       // the same where all weak columns are indexed: quantised without reordering
  lora,      // LoRA on all linears of a full-precision model
  qlora,     // the same over NF4, made of it here
  qa_lora,   // group-wise LoRA over a QEFT checkpoint with scaled zero points
  platypus,  // LoRA on gate, up and down over 8-bit weights, rounded to nearest here
};

const char* to_string(tuning_method method);
/// Whether what is trained are weak columns; else it is a lora.
bool tunes_weak_columns(tuning_method method);

/// Whether a method can tune a model. @param model its name in the message
/// @throws qeft::error errc::invalid_argument saying what the model must be
void check_model(tuning_method method, const model_config& config, const std::string& model);

/// @param config must live as long as the result @param options for LoRA and its kin
linear_maker linears_of(tuning_method method, const qeft::on_host& exec, const model_config& config,
                        const lora_options& options);

}  // namespace qeft_llm
