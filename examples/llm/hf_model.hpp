// SPDX-License-Identifier: Apache-2.0
// The weights of a Hugging Face model directory.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "config.hpp"
#include "qeft/core/half.hpp"
#include "qeft/core/memory.hpp"
#include "qeft/io/safetensors.hpp"

namespace qeft_llm {

/// A tensor by its Hugging Face name, such as "model.layers.0.mlp.up_proj.weight", and its shape:
/// (OC, IC) for linears, (vocabulary, hidden) for embedding and head, (channels) otherwise.
struct tensor_spec {
  std::string name;
  std::vector<qeft::index_t> shape;
};

/// Every tensor that is not part of a quantised linear, in the order of the computation; no head
/// where it is tied to the embedding.
std::vector<tensor_spec> expected_tensors(const model_config& config);

/// Full-precision tensors (F16, BF16, F32, F64) of model.safetensors or its shards. The files stay
/// mapped; nothing is converted or copied before it is asked for. Movable.
class hf_weights {
 public:
  /// Throws qeft::error for files that are missing, truncated, inconsistent, or damaged as far as
  /// their checksum tells (files written by qeft have one).
  explicit hf_weights(const std::filesystem::path& directory);

  /// Throws qeft::error listing every tensor of `expected` that is missing, has another shape, or
  /// whose type is not a floating-point type: up to 20 by name, and the number of others.
  void require(const std::vector<tensor_spec>& expected) const;

  /// From now on `name`, which the files lack, is read from the tensor `stored`.
  void read_instead(const std::string& name, const std::string& stored) {
    stored_names_[name] = stored;
  }

  bool contains(const std::string& name) const { return reader_.contains(stored_name(name)); }

  /// Whether two tensors have the same shape and the same numbers, whatever their types. @pre both
  /// are there
  bool equal(const std::string& a, const std::string& b) const;

  /// The tensor as floats, row-major. Throws qeft::error naming the tensor when it is missing, has
  /// another shape or type, or holds a NaN or an infinity (then with its flat index).
  std::vector<float> read(const std::string& name, const std::vector<qeft::index_t>& shape) const;

  /// The stored bytes and type after the same check of the shape, without conversion and without
  /// the check for NaN. Valid while this object lives.
  const qeft::io::tensor_view& view(const std::string& name,
                                    const std::vector<qeft::index_t>& shape) const;

  const qeft::io::safetensors_reader& reader() const noexcept { return reader_; }

 private:
  const std::string& stored_name(const std::string& name) const {
    const auto found = stored_names_.find(name);
    return found == stored_names_.end() ? name : found->second;
  }

  qeft::io::safetensors_reader reader_;
  std::map<std::string, std::string> stored_names_;
};

}  // namespace qeft_llm
