// SPDX-License-Identifier: Apache-2.0
// Writes safetensors files, with a checksum, without holding the tensors in memory.
#pragma once

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "qeft/core/math.hpp"
#include "qeft/io/atomic_file.hpp"
#include "qeft/io/checksum.hpp"
#include "qeft/io/safetensors_reader.hpp"
#include "qeft/io/tensor.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// Collects descriptions of tensors, then writes them. Equal input gives equal files: inside a file
/// the tensors are ordered by falling element size (so that each is aligned), then by name.
class safetensors_writer {
 public:
  using metadata_map = std::map<std::string, std::string>;
  /// Receives the next bytes of a tensor.
  using sink = std::function<void(span<const std::byte>)>;
  /// Hands all bytes of a tensor to the sink, in order, in pieces of any size.
  using producer = std::function<void(const sink&)>;

  /// @param metadata goes into each file's `__metadata__`; UTF-8; "qeft.checksum" is ours
  explicit safetensors_writer(const metadata_map& metadata = {}) {
    for (const auto& [key, value] : metadata) set_metadata(key, value);
    metadata_.emplace(checksum_key, to_hex(0));
  }

  /// Adds an entry to `__metadata__`, or replaces it.
  void set_metadata(const std::string& key, const std::string& value) {
    if (key.find(checksum_key) != std::string::npos ||
        value.find(checksum_key) != std::string::npos) {
      fail(errc::invalid_argument,
           "safetensors_writer: metadata '" + key + "' holds the reserved name " + checksum_key);
    }
    metadata_[key] = value;
  }

  /// Bytes that stay valid until the file is written.
  void add(const std::string& name, dtype type, const std::vector<index_t>& shape,
           span<const std::byte> bytes) {
    add(name, type, shape, [bytes](const sink& out) { out(bytes); });
    if (tensors_.back().bytes != bytes.size()) {
      const index_t needed = tensors_.back().bytes;
      names_.erase(name);
      tensors_.pop_back();
      fail(errc::invalid_argument, "safetensors_writer: tensor '" + name + "' has " +
                                       std::to_string(bytes.size()) + " bytes, but " +
                                       to_string(type) + " " + to_string(shape) + " needs " +
                                       std::to_string(needed));
    }
  }
  /// Bytes the writer keeps.
  void add(const std::string& name, dtype type, const std::vector<index_t>& shape,
           std::vector<std::byte> bytes) {
    const auto kept = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
    add(name, type, shape, span<const std::byte>(*kept));
    tensors_.back().produce = [kept](const sink& out) { out(*kept); };
  }
  /// Bytes made while the file is written; called once per write.
  void add(const std::string& name, dtype type, const std::vector<index_t>& shape,
           producer produce) {
    const std::optional<index_t> bytes = byte_size(type, shape);
    if (!bytes) {
      fail(errc::invalid_argument, "safetensors_writer: tensor '" + name + "' has shape " +
                                       to_string(shape) + ", which is negative or overflows");
    }
    if (name == "__metadata__" || !names_.insert(name).second) {
      fail(errc::invalid_argument,
           "safetensors_writer: tensor '" + name + "' is added twice or has a reserved name");
    }
    tensors_.push_back({name, type, shape, *bytes, std::move(produce)});
  }

  /// Bytes of all tensors.
  index_t data_bytes() const noexcept {
    index_t total = 0;
    for (const entry& t : tensors_) total += t.bytes;
    return total;
  }

  /// Writes one file. Throws errc::io_error, naming the file and the system's reason, and then
  /// leaves no partial file; an existing file is replaced only by a complete one.
  void write(const std::filesystem::path& path) const {
    std::vector<const entry*> all;
    for (const entry& t : tensors_) all.push_back(&t);
    atomic_file file(path);
    fill(file, std::move(all));
    file.commit();
  }

  /// Writes model.safetensors into a directory or, where that would hold more than
  /// `max_shard_bytes`, shards in the order of add() and model.safetensors.index.json. Throws like
  /// write(), and then a model that was there is as it was.
  void write_directory(const std::filesystem::path& directory,
                       index_t max_shard_bytes = 5'000'000'000) const {
    const auto shards = split(max_shard_bytes);
    const std::filesystem::path single = directory / "model.safetensors";
    const std::filesystem::path index = directory / "model.safetensors.index.json";
    const std::filesystem::path& other = shards.size() == 1 ? index : single;
    std::error_code unknown;
    if (std::filesystem::exists(other, unknown)) {
      fail(errc::io_error, "cannot write a model to " + directory.string() + ": it holds " +
                               other.filename().string() + " of another model; remove it first");
    }
    if (shards.size() == 1) return write(single);

    // All shards are complete before the first replaces an older one.
    nlohmann::json weight_map = nlohmann::json::object();
    std::vector<std::unique_ptr<atomic_file>> files;
    for (std::size_t i = 0; i < shards.size(); ++i) {
      char file[64];
      std::snprintf(file, sizeof file, "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
      files.push_back(std::make_unique<atomic_file>(directory / file));
      fill(*files.back(), shards[i]);
      for (const entry* t : shards[i]) weight_map[t->name] = file;
    }
    const nlohmann::json parsed = {{"metadata", {{"total_size", data_bytes()}}},
                                   {"weight_map", std::move(weight_map)}};
    for (const auto& file : files) file->commit();
    write_text_file(index, parsed.dump(2) + "\n");
  }

 private:
  struct entry {
    std::string name;
    dtype type;
    std::vector<index_t> shape;
    index_t bytes;
    producer produce;
  };

  /// Fills shards in the order of add().
  std::vector<std::vector<const entry*>> split(index_t max_shard_bytes) const {
    std::vector<std::vector<const entry*>> shards(1);
    index_t used = 0;
    for (const entry& t : tensors_) {
      if (!shards.back().empty() && t.bytes > max_shard_bytes - used) {
        shards.emplace_back();
        used = 0;
      }
      shards.back().push_back(&t);
      used += t.bytes;
    }
    return shards;
  }

  /// The JSON header, padded with spaces so that the data starts at a multiple of 8.
  std::string header(const std::vector<const entry*>& tensors) const {
    nlohmann::ordered_json h = nlohmann::ordered_json::object();
    auto& object = h.get_ref<nlohmann::ordered_json::object_t&>();  // its operator[] is linear
    object.reserve(tensors.size() + 1);
    object.emplace_back("__metadata__", metadata_);
    index_t offset = 0;
    for (const entry* t : tensors) {
      object.emplace_back(t->name,
                          nlohmann::ordered_json{{"dtype", to_string(t->type)},
                                                 {"shape", t->shape},
                                                 {"data_offsets", {offset, offset + t->bytes}}});
      offset += t->bytes;
    }
    std::string text;
    try {
      text = h.dump();
    } catch (const nlohmann::json::exception& e) {
      fail(errc::invalid_argument,
           std::string("safetensors_writer: a name or metadata is not UTF-8: ") + e.what());
    }
    text.resize(static_cast<std::size_t>(round_up(static_cast<index_t>(text.size()), 8)), ' ');
    if (static_cast<index_t>(text.size()) > max_safetensors_header) {
      fail(errc::invalid_argument, "safetensors_writer: the header has " +
                                       std::to_string(text.size()) + " bytes, but at most " +
                                       std::to_string(max_safetensors_header) + " are allowed");
    }
    return text;
  }

  void fill(atomic_file& file, std::vector<const entry*> tensors) const {
    std::sort(tensors.begin(), tensors.end(), [](const entry* a, const entry* b) {
      const index_t left = size_of(a->type);
      const index_t right = size_of(b->type);
      return left != right ? left > right : a->name < b->name;
    });
    const std::string head = header(tensors);
    const auto length = static_cast<std::uint64_t>(head.size());
    file.write({reinterpret_cast<const std::byte*>(&length), 8});
    file.write(head);
    std::uint64_t checksum = 0;
    for (const entry* t : tensors) checksum += write_tensor(file, *t);
    // The checksum is known only now; its place in the header holds zeros. No other key can end
    // with its name (see set_metadata).
    const std::string mark = std::string(checksum_key) + "\":\"";
    file.overwrite(static_cast<long>(8 + head.find(mark) + mark.size()), to_hex(checksum));
  }

  static std::uint64_t write_tensor(atomic_file& file, const entry& t) {
    stream_hash hash;
    index_t size = 0;
    t.produce([&](span<const std::byte> bytes) {
      size += bytes.size();
      hash.update(bytes);
      file.write(bytes);
    });
    if (size != t.bytes) {
      fail(errc::invalid_argument, "safetensors_writer: the producer of '" + t.name + "' gave " +
                                       std::to_string(size) + " bytes instead of " +
                                       std::to_string(t.bytes));
    }
    return tensor_checksum(hash, t.name, to_string(t.type), t.shape);
  }

  metadata_map metadata_;
  std::vector<entry> tensors_;
  std::unordered_set<std::string> names_;
};

}  // namespace QEFT_TARGET
}  // namespace qeft::io
