// SPDX-License-Identifier: Apache-2.0
// The command `qeft-llm finetune`: its options and its entry point.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "communicator.hpp"
#include "qeft/training/schedule.hpp"
#include "training_data.hpp"
#include "tuning_method.hpp"

namespace qeft_llm {

struct finetune_options {
  std::string model;  // QEFT checkpoint to tune, or what the method needs
  tuning_method method = tuning_method::qeft;
  qeft::index_t rank = 16;         // r of the LoRA methods
  double alpha = 16;               // their factor is alpha / r
  std::string data;                // .txt or .jsonl, see training_data_reader
  std::string out;                 // adapter file to write
  std::string validation;          // data of the same kinds; empty: a share of `data`
  double validation_share = 0.05;  // 0 for no validation
  std::string template_name;       // of several chat templates
  qeft::index_t seq_len = 512;     // tokens of a sample at most
  long_records too_long = long_records::refuse;
  qeft::index_t steps = 0;   // of the optimiser; 0: what `epochs` take
  qeft::index_t epochs = 1;  // passes over the data
  qeft::index_t batch = 16;  // samples per step
  double rate = 1e-4;
  qeft::schedule_kind schedule = qeft::schedule_kind::constant;
  qeft::index_t warmup = 0;  // steps
  double clip = 0.3;         // of the gradient's norm, 0 for none
  double weight_decay = 0;
  double l2_sp = 0;
  double weak_dropout = 0;
  qeft::index_t eval_every = 20;        // steps; 0: before and after only
  qeft::index_t checkpoint_every = 10;  // steps; 0 for never
  std::uint64_t seed = 0;
  std::string log;    // file of one JSON object per step; empty for none
  bool json = false;  // the same objects, and one for the result, on stdout
  int threads = 0;    // 0: one per hardware thread

  /// For tests: called with the number of each step that is done, and saved if it is due.
  std::function<void(qeft::index_t step)> after_step;
};

/// Tunes the weak columns of a QEFT checkpoint and writes an adapter (see qeft/io/adapter.hpp) of
/// those that validate best, or of the last ones where there is no validation. The other methods of
/// tuning_method are baselines for comparison; those with LoRA write what write_lora_adapter does.
///
/// A run that was killed, stopped by Ctrl-C or ended by an error left its last checkpoint in
/// OUT.unfinished.partial: the same command goes on from there, to the same bytes. Whatever decides
/// the result must be as it was. Where loss, gradients or values stop being finite, the adapter of
/// the step that validated best until then is written before the error, and no checkpoint stays.
///
/// Ranks share the samples (see trainer). The result is the same for any number of them, and so is
/// the checkpoint, which any number can go on with. Each reads the model and the data; rank 0 alone
/// writes.
///
/// A log file that exists is replaced, but must be the log of a run. With a checkpoint the lines of
/// the steps that are done stay.
///
/// The objects of the log are those of run_training. The object of the result: out, method, steps,
/// samples, validation_samples, parameters (a number), saved_bytes_per_token (what all linears keep
/// for backward), optimiser_bytes (AdamW's moments), and start_loss, best_loss and best_step, which
/// are null without validation.
/// @return the exit status of the command
/// @throws qeft::error; then nothing is at `out`, or the adapter that the message names
int run_finetune(const finetune_options& options, communicator& ranks = one_process());

}  // namespace qeft_llm
