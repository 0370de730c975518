// SPDX-License-Identifier: Apache-2.0
// Reads safetensors files: an 8-byte header length, a JSON header, and the bytes of the tensors.
// https://github.com/huggingface/safetensors describes the format. Nothing in a file is trusted.
#pragma once

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "qeft/io/checksum.hpp"
#include "qeft/io/json.hpp"
#include "qeft/io/mapped_file.hpp"
#include "qeft/io/notice.hpp"
#include "qeft/io/tensor.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// Longest header the format allows.
inline constexpr index_t max_safetensors_header = 100'000'000;
/// Metadata key of the checksum our writer stores.
inline constexpr const char* checksum_key = "qeft.checksum";

/// A tensor of a type newer than this reader; `type` as the file spells it.
struct unreadable_tensor {
  std::string type;
  std::vector<index_t> shape;
  span<const std::byte> data;
};

/// One open file. Movable; tensors stay valid while it, or what it was moved to, lives.
class safetensors_file {
 public:
  using tensor_map = std::map<std::string, tensor_view, std::less<>>;

  /// Maps the file and checks the whole header: throws errc::io_error when it cannot be read and
  /// errc::corrupt_file, naming file, tensor and rule, when it breaks the format. Tensor bytes must
  /// cover the rest of the file without holes or overlaps. A type that tensor.hpp does not know is
  /// no error: such tensors are in unreadable(). Takes time proportional to n log n for n tensors.
  explicit safetensors_file(const std::filesystem::path& path)
      : where_(path.string()), file_(path) {
    const span<const std::byte> bytes = file_.bytes();
    if (bytes.size() < 8) {
      fail_corrupt(where_, "has " + std::to_string(bytes.size()) +
                               " bytes, but a safetensors file starts with an 8-byte length");
    }
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), 8);
    if (length > static_cast<std::uint64_t>(max_safetensors_header)) {
      fail_corrupt(where_, "header length is " + std::to_string(length) + ", but must be at most " +
                               std::to_string(max_safetensors_header));
    }
    const auto header = static_cast<index_t>(length);
    if (header > bytes.size() - 8) {
      fail_corrupt(where_, "truncated: the header has " + std::to_string(header) +
                               " bytes, but only " + std::to_string(bytes.size() - 8) +
                               " are left");
    }
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8,
                                static_cast<std::size_t>(header));
    if (text.empty() || text.front() != '{') fail_corrupt(where_, "header must start with '{'");
    read_header(parse_json(text, where_), {bytes.data() + 8 + header, bytes.size() - 8 - header});
  }

  /// The path, for messages.
  const std::string& where() const noexcept { return where_; }
  const tensor_map& tensors() const noexcept { return tensors_; }
  /// Tensors of types this reader does not know.
  const std::map<std::string, unreadable_tensor, std::less<>>& unreadable() const noexcept {
    return unreadable_;
  }
  const std::map<std::string, std::string>& metadata() const noexcept { return metadata_; }

  /// Checksum of all tensors (see checksum.hpp); reads every byte.
  std::uint64_t checksum() const {
    std::uint64_t sum = 0;
    const auto add = [&](const std::string& name, const std::string& type, const auto& t) {
      stream_hash hash;
      hash.update(t.data);
      sum += tensor_checksum(hash, name, type, t.shape);
      forget_pages(t.data);
    };
    for (const auto& [name, t] : tensors_) add(name, to_string(t.type), t);
    for (const auto& [name, t] : unreadable_) add(name, t.type, t);
    return sum;
  }
  /// Throws errc::corrupt_file when the checksum differs from the one in the metadata.
  /// @return false when there is none, as in files of other programs; then nothing is read
  bool verify_checksum() const {
    const auto stored = metadata_.find(checksum_key);
    if (stored == metadata_.end()) return false;
    const std::string found = to_hex(checksum());
    if (found != stored->second) {
      fail_corrupt(where_, "the tensors have checksum " + found + ", but " + checksum_key +
                               " says " + stored->second + ": the file is damaged");
    }
    return true;
  }

 private:
  using json = nlohmann::json;

  void read_header(const json& header, span<const std::byte> data) {
    struct range {
      index_t begin;
      index_t end;
      const std::string* name;
    };
    std::vector<range> by_offset;
    for (const auto& member : header.items()) {
      if (member.key() == "__metadata__") {
        read_metadata(member.value());
        continue;
      }
      const span<const std::byte> bytes = read_tensor(member.key(), member.value(), data);
      const index_t begin = bytes.data() - data.data();
      by_offset.push_back({begin, begin + bytes.size(), nullptr});
      const auto known = tensors_.find(member.key());
      by_offset.back().name =
          known != tensors_.end() ? &known->first : &unreadable_.find(member.key())->first;
    }
    std::sort(by_offset.begin(), by_offset.end(), [](const range& a, const range& b) {
      return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    index_t end = 0;
    for (const range& r : by_offset) {
      if (r.begin != end) {
        fail_corrupt(where_, "tensor '" + *r.name + "' starts at byte " + std::to_string(r.begin) +
                                 (r.begin < end ? ", inside its predecessor, which ends at "
                                                : ", leaving a hole after byte ") +
                                 std::to_string(end));
      }
      end = r.end;
    }
    if (end != data.size()) {
      fail_corrupt(where_, "tensors end at byte " + std::to_string(end) + " of the data, but " +
                               std::to_string(data.size()) + " bytes follow the header");
    }
  }

  void read_metadata(const json& entry) {
    if (entry.is_null()) return;  // as in some published shards
    if (!entry.is_object()) fail_corrupt(where_, "__metadata__ must be an object");
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) {
        fail_corrupt(where_, "__metadata__ '" + key + "' must be a string");
      }
      metadata_.emplace(key, value.get<std::string>());
    }
  }

  /// Adds a tensor; returns its bytes.
  span<const std::byte> read_tensor(const std::string& name, const json& entry,
                                    span<const std::byte> data) {
    const auto broken = [&](const std::string& rule) {
      fail_corrupt(where_, "tensor '" + name + "': " + rule);
    };
    const auto field = [&](const char* key, json::value_t type,
                           const char* type_name) -> const json& {
      const auto found = entry.find(key);
      if (found == entry.end() || found->type() != type) {
        broken(std::string(key) + " must be " + type_name);
      }
      return *found;
    };
    if (!entry.is_object()) broken("must be described by an object");
    const auto type_name = field("dtype", json::value_t::string, "a string").get<std::string>();
    std::vector<index_t> shape;
    for (const json& n : field("shape", json::value_t::array, "an array")) {
      shape.push_back(to_index(n));
      if (shape.back() < 0) broken("shape holds " + dump_json(n) + ", not a size");
    }
    const json& offsets = field("data_offsets", json::value_t::array, "an array");
    const index_t begin = offsets.size() == 2 ? to_index(offsets[0]) : -1;
    const index_t end = offsets.size() == 2 ? to_index(offsets[1]) : -1;
    if (begin < 0 || end < begin || end > data.size()) {
      broken("data_offsets are " + dump_json(offsets) +
             ", but must be [begin, end] with begin <= end <= " + std::to_string(data.size()));
    }
    const span<const std::byte> bytes = {data.data() + begin, end - begin};
    const std::optional<dtype> type = dtype_from_string(type_name);
    if (!type) {
      unreadable_.emplace(name, unreadable_tensor{type_name, std::move(shape), bytes});
      return bytes;
    }
    const std::optional<index_t> expected = byte_size(*type, shape);
    if (!expected) broken("shape " + to_string(shape) + " overflows 64 bits");
    if (*expected != end - begin) {
      broken("data_offsets span " + std::to_string(end - begin) + " bytes, but " + type_name + " " +
             to_string(shape) + " needs " + std::to_string(*expected));
    }
    tensors_.emplace(name, tensor_view{name, *type, std::move(shape), bytes});
    return bytes;
  }

  /// The value of a non-negative integer, or -1.
  static index_t to_index(const json& value) {
    if (!value.is_number_unsigned()) return -1;
    const auto n = value.get<std::uint64_t>();
    return n > static_cast<std::uint64_t>(std::numeric_limits<index_t>::max())
               ? -1
               : static_cast<index_t>(n);
  }

  std::string where_;
  mapped_file file_;
  tensor_map tensors_;
  std::map<std::string, unreadable_tensor, std::less<>> unreadable_;
  std::map<std::string, std::string> metadata_;
};

/// The tensors of a file, or of a Hugging Face style directory: model.safetensors, or the shards
/// that model.safetensors.index.json lists. Movable.
///
/// The index need not fit exactly. Where it lists a tensor in a shard that does not hold it,
/// another shard's is taken; where several shards hold it, that of the listed shard, or else of the
/// first shard by name. What the index lists and no shard holds, and shards that are missing, are
/// errors only when somebody asks for what should be there; a notice tells of them.
class safetensors_reader {
 public:
  /// Opens everything at once. Throws errc::io_error or errc::corrupt_file naming the file and, in
  /// it, the tensor.
  explicit safetensors_reader(const std::filesystem::path& path) : where_(path.string()) {
    const std::filesystem::path single = path / "model.safetensors";
    const std::filesystem::path index = path / "model.safetensors.index.json";
    std::error_code unknown;  // then opening says why
    if (!std::filesystem::is_directory(path, unknown)) {
      open_file(path);
    } else if (std::filesystem::exists(single, unknown)) {
      open_file(single);
    } else if (std::filesystem::exists(index, unknown)) {
      open_shards(path, index);
    } else {
      fail(errc::io_error,
           where_ + ": holds neither model.safetensors nor model.safetensors.index.json");
    }
  }

  const std::string& where() const noexcept { return where_; }
  const std::vector<safetensors_file>& files() const noexcept { return files_; }

  /// All names, ascending.
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& [name, t] : tensors_) all.push_back(name);
    return all;
  }
  bool contains(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }

  /// Why a tensor that is not contained is not: "is missing", and what the index says of it.
  std::string absence(std::string_view name) const {
    const auto listed = listed_.find(name);
    if (listed == listed_.end()) return "is missing";
    const bool missing = missing_shards_.count(listed->second) != 0;
    return "is missing: the index lists it in " + listed->second +
           (missing ? ", which is not there" : ", which does not hold it");
  }

  /// Throws errc::corrupt_file naming the tensor when there is none of that name, or when its type
  /// is one this reader does not know.
  const tensor_view& at(std::string_view name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      fail_corrupt(where_, "tensor '" + std::string(name) + "' " + absence(name));
    }
    if (found->second == nullptr) {
      fail_corrupt(where_, "tensor '" + std::string(name) + "' is " + unreadable_type(name) +
                               ", a type that this program does not know");
    }
    return *found->second;
  }
  /// As above, and its type and shape must be these.
  const tensor_view& at(std::string_view name, dtype type,
                        const std::vector<index_t>& shape) const {
    const tensor_view& t = at(name);
    if (t.type != type || t.shape != shape) {
      fail_corrupt(where_, "tensor '" + t.name + "' is " + to_string(t.type) + " " +
                               to_string(t.shape) + ", but must be " + to_string(type) + " " +
                               to_string(shape));
    }
    return t;
  }

  /// safetensors_file::verify_checksum on every file; false when a file has none.
  bool verify_checksum() const {
    bool all = true;
    for (const safetensors_file& file : files_) all = file.verify_checksum() && all;
    return all;
  }

 private:
  void open_file(const std::filesystem::path& path) {
    files_.emplace_back(path);
    add_tensors(files_.back());
  }

  /// What is known already stays.
  void add_tensors(const safetensors_file& file) {
    for (const auto& [name, t] : file.tensors()) tensors_.emplace(name, &t);
    for (const auto& [name, t] : file.unreadable()) tensors_.emplace(name, nullptr);
  }

  std::string unreadable_type(std::string_view name) const {
    for (const safetensors_file& file : files_) {
      const auto found = file.unreadable().find(name);
      if (found != file.unreadable().end()) return found->second.type;
    }
    return {};
  }

  void open_shards(const std::filesystem::path& directory, const std::filesystem::path& index) {
    const nlohmann::json parsed = load_json(index);
    const auto weight_map = parsed.find("weight_map");
    if (weight_map == parsed.end() || !weight_map->is_object() || weight_map->empty()) {
      fail_corrupt(index.string(), "weight_map must be an object that lists tensors");
    }
    std::map<std::string, std::vector<std::string>> by_shard;
    for (const auto& [name, shard] : weight_map->items()) {
      const std::string file = shard.is_string() ? shard.get<std::string>() : "";
      // A name with directories could read any file of the machine.
      if (file.empty() || file == "." || file == ".." ||
          file.find_first_of("/\\") != std::string::npos) {
        fail_corrupt(index.string(), "weight_map: shard of '" + name + "' is " + dump_json(shard) +
                                         ", but must be the name of a file in this directory");
      }
      by_shard[file].push_back(name);
      listed_.emplace(name, file);
    }
    files_.reserve(by_shard.size());  // tensors_ points into the files
    for (const auto& [shard, names] : by_shard) {
      std::error_code unknown;  // then opening says why
      if (std::filesystem::exists(directory / shard, unknown) || unknown) {
        files_.emplace_back(directory / shard);
        for (const std::string& name : names) add_listed(files_.back(), name);
      } else {
        missing_shards_.insert(shard);
        notice(index.string() + ": shard " + shard + ", which should hold '" + names.front() +
               "', is missing");
      }
    }
    if (files_.empty()) {
      fail(errc::io_error,
           index.string() + ": none of its shards is there, not even " + *missing_shards_.begin());
    }
    for (const safetensors_file& file : files_) add_tensors(file);
    std::string first;
    index_t stale = 0;
    for (const auto& [name, shard] : listed_) {
      if (contains(name) || missing_shards_.count(shard) != 0) continue;
      if (stale++ == 0) first = name;
    }
    if (stale > 0) {
      notice(index.string() + ": lists '" + first + "'" +
             (stale > 1 ? " and " + std::to_string(stale - 1) + " others" : "") +
             ", but no shard holds it");
    }
  }

  void add_listed(const safetensors_file& file, const std::string& name) {
    const auto found = file.tensors().find(name);
    if (found != file.tensors().end()) {
      tensors_.emplace(name, &found->second);
    } else if (file.unreadable().count(name) != 0) {
      tensors_.emplace(name, nullptr);
    }
  }

  std::string where_;
  std::vector<safetensors_file> files_;
  /// Null for a type that this reader does not know.
  std::map<std::string, const tensor_view*, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> listed_;  // shards by tensor, as the index says
  std::set<std::string> missing_shards_;
};

}  // namespace QEFT_TARGET
}  // namespace qeft::io
