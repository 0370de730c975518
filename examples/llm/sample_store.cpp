// SPDX-License-Identifier: Apache-2.0
#include "sample_store.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "qeft/core/status.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

sample_store::sample_store(std::filesystem::path file, index_t samples, index_t sample_size)
    : path_(std::move(file)),
      samples_(samples),
      sample_size_(sample_size),
      file_(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
  if (file_ < 0) fail_io("create", errno);
  if (::ftruncate(file_, static_cast<off_t>(samples * sample_size) * 4) != 0) {
    const int cause = errno;
    ::close(file_);
    fail_io("size", cause);
  }
}

sample_store::~sample_store() { ::close(file_); }

void sample_store::fail_io(const char* what, int cause) const {
  fail(errc::io_error, std::string("cannot ") + what + " the file of activations " +
                           path_.string() + ": " +
                           (cause == 0 ? "unexpected end of file" : std::strerror(cause)));
}

void sample_store::read(index_t sample, std::vector<float>& x) const {
  x.resize(static_cast<std::size_t>(sample_size_));
  auto* data = reinterpret_cast<char*>(x.data());
  auto left = static_cast<std::size_t>(sample_size_) * sizeof(float);
  auto at = static_cast<off_t>(sample * sample_size_) * 4;
  while (left > 0) {
    const ssize_t got = ::pread(file_, data, left, at);
    if (got <= 0) fail_io("read", got == 0 ? 0 : errno);
    data += got;
    at += got;
    left -= static_cast<std::size_t>(got);
  }
}

void sample_store::write(index_t sample, const std::vector<float>& x) {
  if (static_cast<index_t>(x.size()) != sample_size_) {
    fail(errc::invalid_argument, "sample_store::write: x has " + std::to_string(x.size()) +
                                     " floats, but a sample has " + std::to_string(sample_size_));
  }
  const auto* data = reinterpret_cast<const char*>(x.data());
  auto left = x.size() * sizeof(float);
  auto at = static_cast<off_t>(sample * sample_size_) * 4;
  while (left > 0) {
    const ssize_t put = ::pwrite(file_, data, left, at);
    if (put < 0) fail_io("write", errno);
    data += put;
    at += put;
    left -= static_cast<std::size_t>(put);
  }
}

void sample_store::sync() {
  if (::fsync(file_) != 0) fail_io("write", errno);
}

}  // namespace qeft_llm
