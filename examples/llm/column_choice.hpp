// SPDX-License-Identifier: Apache-2.0
// Which columns of each linear are weak (METHOD section 2), and the order in which they are
// quantised (section 9).
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "calibration.hpp"
#include "llama.hpp"
#include "qeft/core/on_host.hpp"
#include "quantize.hpp"

namespace qeft_llm {

/// Ascending input columns, in the coordinates of the original model.
using column_list = std::vector<std::int32_t>;

/// The places of columns in an order, ascending if the order keeps theirs.
column_list places_of(const column_list& columns, const qeft::permutation& order);

/// Whether a linear's input is the (normed) residual stream: all such linears share their weak
/// columns when the model is reordered.
bool reads_stream(linear_kind kind);

/// The choices for all layers. They are made one by one: some from the full-precision model, others
/// when a linear's turn has come.
class column_choice {
 public:
  column_choice(const quantize_options& options, const qeft::on_host& exec,
                const model_source& source);

  /// Whether a linear's weak columns lie in each head equally.
  bool per_head(linear_kind kind) const;
  /// k of a linear: with per_head placement the next multiple of the heads.
  qeft::index_t count(linear_kind kind) const;
  /// Whether a linear's columns are sorted by sensitivity: those that Offline Global Reordering can
  /// move freely, or within heads.
  bool sorts(linear_kind kind) const;

  /// Takes over the weak columns of another checkpoint of the same architecture; throws qeft::error
  /// for one that does not fit.
  void take_from(const std::filesystem::path& checkpoint);
  /// Chooses what depends on the full-precision model alone: by the gradient metric everything,
  /// else what concerns the residual stream when the model is reordered (Algorithm 1, with every
  /// sample).
  /// @param directory for activations
  void choose_ahead(const token_windows& windows, const std::filesystem::path& directory);

  /// The weak columns of a linear, chosen now if they are not known yet.
  /// @param inputs of the linear; asked only where the choice depends on them
  const column_list& weak(qeft::index_t block, linear_kind kind, const layer_inputs* inputs);
  /// The order of its columns, chosen now if it is not known yet: column i is for input channel
  /// order[i]. Weak ones are in ascending order, and where columns are sorted they come last (of
  /// each head). @pre its weak columns are known
  const qeft::permutation& order(qeft::index_t block, linear_kind kind, const layer_inputs* inputs);
  /// Those known already; throw std::out_of_range.
  const column_list& weak(const std::string& linear) const { return weak_.at(linear); }
  const qeft::permutation& order(const std::string& linear) const { return order_.at(linear); }

  /// What an interrupted run chose for a linear.
  void set(const std::string& linear, column_list weak, qeft::permutation order) {
    weak_[linear] = std::move(weak);
    order_[linear] = std::move(order);
  }

  /// What is known, for an interrupted quantisation to go on with.
  nlohmann::json to_json() const;
  void restore(const nlohmann::json& known);

 private:
  class stream_sensitivity;

  std::vector<double> by_hessian(qeft::index_t block, linear_kind kind,
                                 const std::vector<double>& diagonal) const;
  column_list top(linear_kind kind, const std::vector<double>& sensitivity) const;
  qeft::permutation sorted(linear_kind kind, const std::vector<double>& sensitivity,
                           const column_list& weak) const;
  void choose_by_gradient(const token_windows& windows);
  void choose_stream_by_hessian(const token_windows& windows,
                                const std::filesystem::path& directory);
  void set_stream(const stream_sensitivity& sensitivity);

  const quantize_options& o_;
  const qeft::on_host& exec_;
  const model_source& source_;
  const model_config& config_;
  std::map<std::string, column_list> weak_;  // by linear, in the coordinates of the original model
  std::map<std::string, qeft::permutation> order_;
};

/// The weight of a linear as numbers, (OC, IC).
std::vector<float> weight_of(const model_source& source, qeft::index_t block, linear_kind kind);

/// The layer options of a linear with these weak columns: those of the command, stored as the type
/// that loses least (qeft::solver::choose_scalar).
qeft::solver::layer_options options_for(const qeft::on_host& exec, const quantize_options& options,
                                        const std::vector<float>& weight, linear_shape shape,
                                        const column_list& weak);

}  // namespace qeft_llm
