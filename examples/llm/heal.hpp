// SPDX-License-Identifier: Apache-2.0
// The command `qeft-llm heal`: its options and its entry point.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "communicator.hpp"
#include "qeft/core/config.hpp"

namespace qeft_llm {

struct heal_options {
  std::string model;      // QEFT checkpoint to heal
  std::string reference;  // the full-precision model that it was made from
  std::string text;       // of which windows are drawn
  std::string out;        // directory to write
  std::vector<std::string> train = {"weak", "scales", "norms"};
  qeft::index_t seq_len = 512;  // tokens of a sample
  qeft::index_t steps = 90;     // of the optimiser
  qeft::index_t batch = 8;      // samples per step
  // Of weak columns, scales and norms: the share of the loss that a step would take off if all
  // gradients were as large as those of single samples and without noise (see
  // healed_model::calibrate).
  double rate = 0.3;
  double scale_rate = 0.3;
  double norm_rate = 0.3;
  qeft::index_t warmup = 10;             // steps at most; behind it the rates fall to 0 as a cosine
  double clip = 0;                       // of the gradient's norm, 0 for none
  qeft::index_t validation_windows = 8;  // of the text, to choose and report by; 0 for none
  qeft::index_t eval_every = 0;          // steps; 0: before and after only
  qeft::index_t checkpoint_every = 10;   // steps; 0 for never
  std::uint64_t seed = 0;                // of the choice and order of samples
  std::string log;                       // file of one JSON object per step; empty for none
  bool json = false;                     // the same objects, and one for the result, on stdout
  int threads = 0;                       // 0: one per hardware thread

  /// For tests: called with the number of each step that is done, and saved if it is due.
  std::function<void(qeft::index_t step)> after_step;
};

/// Writes a copy of a QEFT checkpoint whose weak columns, group scales and norms, or those of them
/// that `train` names, are tuned so that its next-token distributions come closer to those of the
/// full-precision model: AdamW on KL(reference || model) per token of windows of a text. Format and
/// size stay; every other tensor is copied byte for byte. config.json says how in
/// quantization_config.provenance.heal.
///
/// Some windows are only validated with: of the initial parameters, the last ones and those
/// measured between, the best on them are written.
///
/// A run that was killed left its state in the partial directory of `out`: the same command goes on
/// from there, to the same bytes. Whatever decides the result must be as it was.
///
/// Ranks share the samples, as in run_finetune.
///
/// The objects of the log are those of run_training; loss is the KL per token in nats. The object
/// of the result: out, steps, tokens (trained on), parameters, fingerprint (of the result), and
/// start_kl, kl and best_step, on the validation windows, which are null without any.
/// @return the exit status of the command
/// @throws qeft::error; then nothing is at `out`
int run_heal(const heal_options& options, communicator& ranks = one_process());

}  // namespace qeft_llm
