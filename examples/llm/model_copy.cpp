// SPDX-License-Identifier: Apache-2.0
#include "model_copy.hpp"

#include <algorithm>
#include <string_view>

#include "qeft/io/adapter.hpp"
#include "qeft/io/atomic_file.hpp"
#include "quantize_check.hpp"

namespace qeft_llm {

namespace fs = std::filesystem;
namespace io = qeft::io;
using qeft::index_t;

namespace {

/// Copies a file. Only the tensors that change, and the checksum where there is one, are other
/// bytes.
void copy_changed(const io::safetensors_reader& reader, const io::safetensors_file& file,
                  const fs::path& to, const tensor_changes& changes) {
  struct part {
    std::string name;
    std::string type;
    std::vector<index_t> shape;
    qeft::span<const std::byte> data;
  };
  std::vector<part> parts;
  index_t left = 0;
  for (const auto& [name, t] : file.tensors()) {
    parts.push_back({name, to_string(t.type), t.shape, t.data});
  }
  for (const auto& [name, t] : file.unreadable()) parts.push_back({name, t.type, t.shape, t.data});
  for (const part& p : parts) left += p.data.size();
  std::sort(parts.begin(), parts.end(),
            [](const part& a, const part& b) { return a.data.end() < b.data.end(); });

  const io::mapped_file source(file.where());
  const qeft::span<const std::byte> header(source.bytes().data(), source.bytes().size() - left);
  io::atomic_file out(to);
  out.write(header);
  std::uint64_t checksum = 0;
  for (const part& p : parts) {
    std::optional<std::vector<std::byte>> changed;
    // Another shard may hold a tensor of that name too, which nobody reads.
    if (reader.contains(p.name) && reader.at(p.name).data.data() == p.data.data()) {
      changed = changes(reader.at(p.name));
    }
    const qeft::span<const std::byte> bytes = changed ? *changed : p.data;
    io::stream_hash hash;
    hash.update(bytes);
    out.write(bytes);
    checksum += io::tensor_checksum(hash, p.name, p.type, p.shape);
    io::forget_pages(p.data);
  }
  if (file.metadata().count(io::checksum_key) != 0) {
    const std::string_view text(reinterpret_cast<const char*>(header.data()),
                                static_cast<std::size_t>(header.size()));
    const std::string mark = std::string(io::checksum_key) + "\":\"";
    const std::size_t at = text.find(mark);
    if (at == std::string_view::npos) {
      io::fail_corrupt(file.where(), std::string(io::checksum_key) +
                                         " must stand in the header as "
                                         "qeft writes it");
    }
    out.overwrite(static_cast<long>(at + mark.size()), io::to_hex(checksum));
  }
  out.commit();
}

}  // namespace

std::string copy_model(const fs::path& model, const io::safetensors_reader& reader,
                       const fs::path& to, const tensor_changes& changes) {
  for (const io::safetensors_file& file : reader.files()) {
    copy_changed(reader, file, to / fs::path(file.where()).filename(), changes);
  }
  if (!fs::exists(model / "model.safetensors")) {
    const char* index = "model.safetensors.index.json";
    io::copy_file(model / index, to / index);
  }
  for (const fs::path& file : side_files(model)) {
    const fs::path copy = to / file.lexically_relative(model);
    fs::create_directories(copy.parent_path());
    io::copy_file(file, copy);
  }
  const io::safetensors_reader written(to);
  written.verify_checksum();
  return io::weights_fingerprint(written);
}

}  // namespace qeft_llm
