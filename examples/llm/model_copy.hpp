// SPDX-License-Identifier: Apache-2.0
// Copies of a model in which some tensors hold other numbers.
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "qeft/io/safetensors.hpp"

namespace qeft_llm {

/// The bytes that a tensor is to have, as many as it has; nothing where it stays as it is.
using tensor_changes =
    std::function<std::optional<std::vector<std::byte>>(const qeft::io::tensor_view& tensor)>;

/// Copies all files of a model but config.json. Only the tensors that change, and the checksum
/// where there is one, are other bytes.
/// @param reader of `model`
/// @param to     an existing directory
/// @return the fingerprint of the copy
std::string copy_model(const std::filesystem::path& model,
                       const qeft::io::safetensors_reader& reader, const std::filesystem::path& to,
                       const tensor_changes& changes);

}  // namespace qeft_llm
