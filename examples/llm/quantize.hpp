// SPDX-License-Identifier: Apache-2.0
// The command `qeft-llm quantize`: its options and its entry point.
#pragma once

#include <cstdint>
#include <string>

#include "qeft/core/config.hpp"
#include "qeft/format/quant_format.hpp"
#include "qeft/format/weak_columns.hpp"

namespace qeft_llm {

/// How codes are found: OPTQ compensates each column's error in the later ones, RTN only rounds.
enum class quantize_method { optq, rtn };
/// How a group's scale and zero point are found (METHOD section 3, step 4).
enum class range_search { grid, minmax };
/// The sensitivity that ranks the input columns (METHOD section 2).
enum class column_selection { hessian, hessian_perturbation, gradient };
/// What global selection adds per layer: the top-k sensitivities (paper) or all (published code).
enum class score_accumulation { paper, reference };

struct quantize_options {
  std::string model;  // directory to read
  std::string out;    // directory to write
  int bits = 4;
  qeft::index_t group_size = 128;   // multiple of 32, or -1 for one group per channel
  qeft::index_t weak_columns = 16;  // k; 0 for none
  qeft::weak_kind o_proj_placement = qeft::weak_kind::indexed;  // or per_head
  qeft::zero_kind zero = qeft::zero_kind::integer;
  quantize_method method = quantize_method::optq;
  range_search search = range_search::grid;
  int steps = 40;         // shrinking steps of the grid search
  double norm = 2.4;      // p of its error |w - Q(w)|^p
  double damping = 0.01;  // of the Hessian, as a fraction of its mean diagonal
  column_selection selection = column_selection::hessian;
  score_accumulation accumulation = score_accumulation::paper;
  bool reorder = true;  // Offline Global Reordering; else every layer has indexed weak columns
  bool act_order = false;
  bool static_groups = false;
  std::string calibration;        // text file; empty where no calibration is needed
  qeft::index_t samples = 128;    // windows of seq_len tokens
  qeft::index_t seq_len = 512;
  std::string weak_columns_from;  // QEFT checkpoint whose weak columns are reused; empty for none
  std::uint64_t seed = 0;
  bool compare_rtn = false;  // also report the error of RTN on every layer
  int threads = 0;  // 0: one per hardware thread
};

/// Quantises a model directory; throws qeft::error and leaves no partial output behind.
/// @return the exit status of the command
int run_quantize(const quantize_options& options);

}  // namespace qeft_llm
