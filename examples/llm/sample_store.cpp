// SPDX-License-Identifier: Apache-2.0
#include "sample_store.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "qeft/core/status.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

sample_store::sample_store(const std::string& directory, index_t samples, index_t sample_size)
    : samples_(samples), sample_size_(sample_size), file_(-1) {
  std::string name = directory + "/.activations.XXXXXX";
  file_ = ::mkstemp(name.data());
  if (file_ < 0) {
    fail(errc::io_error,
         "cannot create a file for activations in " + directory + ": " + std::strerror(errno));
  }
  ::unlink(name.c_str());
  if (::ftruncate(file_, static_cast<off_t>(samples * sample_size) * 4) != 0) {
    const int cause = errno;
    ::close(file_);
    fail(errc::io_error,
         "cannot size the file for activations in " + directory + ": " + std::strerror(cause));
  }
}

sample_store::~sample_store() { ::close(file_); }

void sample_store::read(index_t sample, std::vector<float>& x) const {
  x.resize(static_cast<std::size_t>(sample_size_));
  auto* data = reinterpret_cast<char*>(x.data());
  auto left = static_cast<std::size_t>(sample_size_) * sizeof(float);
  auto at = static_cast<off_t>(sample * sample_size_) * 4;
  while (left > 0) {
    const ssize_t got = ::pread(file_, data, left, at);
    if (got <= 0) {
      fail(errc::io_error, std::string("cannot read stored activations: ") +
                               (got == 0 ? "unexpected end of file" : std::strerror(errno)));
    }
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
    if (put < 0) {
      fail(errc::io_error, std::string("cannot store activations: ") + std::strerror(errno));
    }
    data += put;
    at += put;
    left -= static_cast<std::size_t>(put);
  }
}

}  // namespace qeft_llm
