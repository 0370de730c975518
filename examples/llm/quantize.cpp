// SPDX-License-Identifier: Apache-2.0
// `qeft-llm quantize`: block by block, each with the inputs that the blocks quantised before it
// produce (METHOD section 3), then Offline Global Reordering of the packed model (section 4).
#include "quantize.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "calibration.hpp"
#include "checkpoint_writer.hpp"
#include "elementwise.hpp"
#include "gradient.hpp"
#include "hf_model.hpp"
#include "llama.hpp"
#include "llama_graph.hpp"
#include "progress.hpp"
#include "qeft/reorder/permute_matrix.hpp"
#include "qeft/reorder/weak_selection.hpp"
#include "qeft/solver/hessian.hpp"
#include "qeft/solver/optq.hpp"
#include "tokenizer.hpp"

namespace qeft_llm {
namespace {

using qeft::errc;
using qeft::fail;
using qeft::index_t;
using column_list = std::vector<std::int32_t>;  // ascending input columns, original coordinates

/// A quantised linear in original coordinates (weak columns indexed), and how good it is.
struct quantized_linear {
  packed_matrix matrix;
  column_list weak;
  qeft::solver::layer_report report;
};

class quantizer {
 public:
  explicit quantizer(const quantize_options& options)
      : o_(options), exec_(options.threads), config_(read_config(options.model)),
        weights_(options.model) {}

  void run() {
    check_options();
    weights_.require(expected_tensors(config_));
    windows_ = calibration_windows(tokenizer::from_file(o_.model + "/tokenizer.json"),
                                   o_.calibration, o_.samples, o_.seq_len, o_.seed);
    output_directory out(o_.out);
    if (o_.weak_columns > 0 && o_.selection == column_selection::gradient) find_gradients();
    if (o_.weak_columns > 0 && o_.reorder) choose_stream_columns(out.path());
    quantize_blocks(out.path());
    write(out);
  }

 private:
  quantize_options o_;
  qeft::on_host exec_;
  model_config config_;
  hf_weights weights_;
  std::vector<std::vector<int>> windows_;
  column_sensitivities gradients_;  // selection by gradient only
  column_list stream_weak_;         // of the residual stream; with reordering only
  std::map<std::string, quantized_linear> linears_;
};

}  // namespace

int run_quantize(const quantize_options& options) {
  quantizer(options).run();
  return 0;
}

}  // namespace qeft_llm
