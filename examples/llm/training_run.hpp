// SPDX-License-Identifier: Apache-2.0
// A training from its first step to its last: shown, logged, saved, and gone on with after a kill.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "qeft/io/atomic_directory.hpp"
#include "trainer.hpp"

namespace qeft_llm {

struct run_options {
  std::string log;                      // file of one JSON object per step; empty for none
  bool json = false;                    // the same objects on stdout
  qeft::index_t checkpoint_every = 10;  // steps; 0 for never

  /// For tests: called with the number of each step that is done, and saved if it is due.
  std::function<void(qeft::index_t step)> after_step;
};

/// Whether a file is empty, or begins as the logs of run_training do.
bool may_be_log(const std::string& file);

/// The trainer's state in the partial directory of a run.
inline constexpr const char* checkpoint_file = "checkpoint.safetensors";

/// Runs all steps, or those that a run left to do whose state is in out->partial(). Progress on
/// stderr. A log is replaced, but for the steps before those to do. What an error or a signal
/// interrupts stays in out->partial() once something is saved, unless the same command would only
/// come to the error again.
///
/// Objects of the log: step, loss, rate, gradient_norm, tokens_per_second and, where it was
/// measured, validation_loss; one of step 0 has the validation loss before training alone.
/// @param out     null on other ranks than the first, which write nothing
/// @param setting see trainer::load
/// @throws qeft::error on all ranks what it throws on one, and naming what differs in the setting
///         of another rank
void run_training(trainer& train, qeft::io::atomic_directory* out, const nlohmann::json& setting,
                  const run_options& options);

}  // namespace qeft_llm
