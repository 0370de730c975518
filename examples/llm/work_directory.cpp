// SPDX-License-Identifier: Apache-2.0
#include "work_directory.hpp"

#include <cstdio>
#include <map>
#include <vector>

#include "qeft/io/checkpoint.hpp"
#include "qeft/io/json.hpp"

namespace qeft_llm {

namespace fs = std::filesystem;
namespace io = qeft::io;
using nlohmann::json;

work_directory::work_directory(const fs::path& parent, const json& fingerprint)
    : path_(parent / "work") {
  try {
    const std::optional<json> earlier = load("fingerprint");
    resumed_ = earlier && *earlier == fingerprint;
  } catch (const qeft::error& e) {
    if (e.code() != qeft::errc::corrupt_file) throw;
    // What is damaged is not ours to continue.
  }
  if (!resumed_ && !fs::is_empty(parent)) {
    std::fprintf(stderr, "removing %s: it is of a quantisation with other options or input\n",
                 parent.c_str());
  }
  const std::vector<fs::path> entries(fs::directory_iterator(parent), fs::directory_iterator{});
  for (const fs::path& entry : entries) {
    if (!resumed_ || entry != path_) fs::remove_all(entry);
  }
  fs::create_directories(path_);
  if (!resumed_) store("fingerprint", fingerprint);
}

void work_directory::store(const std::string& name, const json& value) const {
  io::write_text_file(path_ / (name + ".json"),
                      value.dump(-1, ' ', false, json::error_handler_t::replace));
}

std::optional<json> work_directory::load(const std::string& name) const {
  const fs::path file = path_ / (name + ".json");
  if (!fs::exists(file)) return std::nullopt;
  return checked([&] { return io::load_json(file); });
}

fs::path work_directory::file_of(const std::string& linear) const {
  return path_ / (linear + ".safetensors");
}

void work_directory::store_linear(const std::string& name, const finished_linear& linear) const {
  io::quantization_config description;
  description.layers[name] = description.defaults = linear.matrix.descriptor();
  description.provenance = linear.report;
  io::safetensors_writer writer(
      std::map<std::string, std::string>{{"description", io::to_json(description).dump()},
                                         {"order", json(linear.order.source()).dump()}});
  const auto weak = linear.matrix.weak_index();
  io::add_linear(writer, name, linear.matrix, {weak.begin(), weak.end()});
  writer.write(file_of(name));
}

bool work_directory::has_linear(const std::string& name) const { return fs::exists(file_of(name)); }

finished_linear work_directory::load_linear(const std::string& name) const {
  return checked([&] {
    const io::safetensors_reader reader(file_of(name));
    reader.verify_checksum();
    const auto stored = [&](const char* what) {
      return io::parse_json(reader.files().front().metadata().at(what), reader.where());
    };
    io::quantization_config config =
        io::quantization_config_from_json(stored("description"), reader.where());
    return finished_linear{io::read_linear(reader, name, config).matrix,
                           qeft::permutation(stored("order").get<std::vector<std::int32_t>>()),
                           std::move(config.provenance)};
  });
}

void work_directory::fail_damaged(const std::string& what) const {
  qeft::fail(
      qeft::errc::corrupt_file,
      what + (resumed_ ? "; remove " + path_.parent_path().string() + " to quantise from the start"
                       : std::string()));
}

void work_directory::remove() const { fs::remove_all(path_); }

}  // namespace qeft_llm
