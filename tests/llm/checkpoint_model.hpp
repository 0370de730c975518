// SPDX-License-Identifier: Apache-2.0
// Random model directories with quantised layers.
#pragma once

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "llama.hpp"
#include "qeft/io/checkpoint.hpp"
#include "reference_model.hpp"
#include "support/cases.hpp"
#include "unit/io/temporary_directory.hpp"

namespace qeft_test {

/// A model directory of random tensors, FP16 or quantised, and the same numbers in memory.
struct checkpoint_model : reference_model {
  temporary_directory directory;

  using layer_maker =
      std::function<plain_layer(const qeft::matrix_descriptor& d, random_source& random)>;

  /// @param quantised the linears, by name without ".weight", to write as quantised layers
  explicit checkpoint_model(nlohmann::json source, std::uint64_t seed,
                            std::map<std::string, qeft::matrix_descriptor> quantised = {},
                            const layer_maker& make_layer = random_layer)
      : reference_model{qeft_llm::parse_config(source, "tiny"), {}} {
    using qeft::io::dtype;
    tensors = random_tensors(config, dtype::f16, seed);
    random_source random(seed);
    std::map<std::string, qeft_llm::packed_matrix> packed;
    qeft::io::safetensors_writer writer;
    for (const qeft_llm::tensor_spec& spec : qeft_llm::expected_tensors(config)) {
      const std::string name = spec.name.substr(0, spec.name.rfind('.'));
      const auto layer = quantised.find(name);
      if (layer == quantised.end() || spec.shape.size() == 1) {
        add_tensor(writer, spec, tensors.at(spec.name), dtype::f16);
        continue;
      }
      layer->second.out_channels = spec.shape[0];
      layer->second.in_channels = spec.shape[1];
      const plain_layer plain = make_layer(layer->second, random);
      const std::vector<float> weights = weights_of(plain);
      tensors.at(spec.name).assign(weights.begin(), weights.end());
      const auto at = packed.emplace(name, pack<qeft::layout::row_packed>(plain)).first;
      qeft::io::add_linear(writer, name, at->second, plain.weak_columns);
    }
    if (!quantised.empty()) {
      qeft::io::quantization_config q;
      for (const auto& [name, d] : quantised) q.layers[name] = d;
      source["quantization_config"] = qeft::io::to_json(q);
    }
    writer.write(directory / "model.safetensors");
    write_all(directory / "config.json", source.dump());
  }

  std::vector<int> tokens(std::size_t count) const { return random_tokens(config, count, count); }
  qeft_llm::llama_model model(int threads = 2) const {
    return {qeft::on_host(threads), qeft_llm::model_source(directory.path())};
  }
};

}  // namespace qeft_test
