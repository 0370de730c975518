// SPDX-License-Identifier: Apache-2.0
// Activations of all calibration samples, kept outside of memory.
#pragma once

#include <filesystem>
#include <vector>

#include "qeft/core/on_host.hpp"

namespace qeft_llm {

/// Activations of all calibration samples, in a file, so that only the sample at work is resident
/// (the paper's Table 11). All samples have the same size. The file stays when the object goes:
/// what an earlier run of the same quantisation stored can be read again.
class sample_store {
 public:
  /// Opens or creates `file`. @param sample_size floats per sample
  sample_store(std::filesystem::path file, qeft::index_t samples, qeft::index_t sample_size);
  ~sample_store();
  sample_store(const sample_store&) = delete;
  sample_store& operator=(const sample_store&) = delete;

  qeft::index_t samples() const noexcept { return samples_; }
  qeft::index_t sample_size() const noexcept { return sample_size_; }

  /// The floats of a sample; a sample never written is zero.
  void read(const qeft::on_host& exec, qeft::index_t sample, std::vector<float>& x) const;
  /// @pre x has sample_size floats; a full disk throws qeft::error
  void write(const qeft::on_host& exec, qeft::index_t sample, const std::vector<float>& x);
  /// Returns when everything written is on the disk.
  void sync();

 private:
  void read_bytes(qeft::index_t at, qeft::index_t bytes, char* to) const;
  void write_bytes(qeft::index_t at, qeft::index_t bytes, const char* from);
  [[noreturn]] void fail_io(const char* what, int cause) const;

  std::filesystem::path path_;
  qeft::index_t samples_;
  qeft::index_t sample_size_;
  int file_;
};

}  // namespace qeft_llm
