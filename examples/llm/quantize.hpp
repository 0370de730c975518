// SPDX-License-Identifier: Apache-2.0
// The command `qeft-llm quantize`: its options and its entry point.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "qeft/reorder/weak_selection.hpp"
#include "qeft/solver/layer.hpp"
#include "qeft/solver/target.hpp"

namespace qeft_llm {

/// The order in which the columns of a linear are quantised, and form groups.
enum class column_order {
  natural,      // that of the model
  sensitivity,  // robust columns by falling sensitivity, where Offline Global Reordering is free to
};

struct quantize_options {
  std::string model;  // directory to read
  std::string out;    // directory to write
  /// Format, method and search of every layer; its weak columns are found here.
  qeft::solver::layer_options layer;
  qeft::index_t weak_columns = 16;                              // k; 0 for none
  qeft::weak_kind o_proj_placement = qeft::weak_kind::indexed;  // or per_head
  qeft::selection_metric selection = qeft::selection_metric::hessian;
  qeft::accumulation accumulation = qeft::accumulation::top_k;
  bool reorder = true;  // Offline Global Reordering; else every layer has indexed weak columns
  column_order order = column_order::natural;
  /// How far layers make up for the error of those before them (METHOD section 9).
  qeft::solver::asymmetric_options asymmetric;
  std::string calibration;      // text file; empty where no calibration is needed
  qeft::index_t samples = 128;  // windows of seq_len tokens
  qeft::index_t seq_len = 512;
  /// QEFT checkpoint whose weak columns, and their number, are reused; empty for none.
  std::string weak_columns_from;
  std::uint64_t seed = 0;
  bool compare_rtn = false;   // also find the error of RTN on every layer
  bool keep_partial = false;  // a run that fails or is interrupted leaves its finished layers
  bool json = false;          // describe the result on stdout
  int threads = 0;            // 0: one per hardware thread

  /// Whether weak columns are chosen, instead of taken over.
  bool chooses_columns() const { return weak_columns > 0 && weak_columns_from.empty(); }
  /// Whether columns change their order, beside weak ones.
  bool sorts_columns() const { return reorder && order == column_order::sensitivity; }
  /// Whether something is chosen before any layer is quantised.
  bool chooses_ahead() const { return chooses_columns() || sorts_columns(); }
  bool needs_hessian() const {
    return layer.method == qeft::solver::layer_method::optq || compare_rtn ||
           layer.refine_rounds > 0 ||
           (chooses_ahead() && selection != qeft::selection_metric::gradient);
  }
  bool needs_calibration() const { return needs_hessian() || chooses_ahead(); }
  bool is_asymmetric() const { return asymmetric.input > 0 || asymmetric.stream > 0; }

  /// For tests: called with the name of each step whose result is on the disk.
  std::function<void(const std::string& step)> after_step;
};

/// Quantises a model directory; throws qeft::error and leaves no partial output behind. A run that
/// was killed left its finished layers beside `out`: the next one with the same options and input
/// goes on from there, to the same bytes.
/// @return the exit status of the command
int run_quantize(const quantize_options& options);

}  // namespace qeft_llm
