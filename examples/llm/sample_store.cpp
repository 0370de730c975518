// SPDX-License-Identifier: Apache-2.0
#include "sample_store.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
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

namespace {

/// body(first byte, bytes) for pieces of a sample. Copies from and to the page cache are worth
/// sharing out: activations are read more often than they are computed.
template <class Body>
void for_pieces(const qeft::on_host& exec, index_t bytes, const Body& body) {
  constexpr index_t piece = 1 << 18;
  exec.parallel_for(qeft::ceil_div(bytes, piece), 1, [&](index_t begin, index_t end) {
    body(begin * piece, std::min(end * piece, bytes) - begin * piece);
  });
}

}  // namespace

void sample_store::read(const qeft::on_host& exec, index_t sample, std::vector<float>& x) const {
  x.resize(static_cast<std::size_t>(sample_size_));
  for_pieces(exec, sample_size_ * 4, [&](index_t at, index_t bytes) {
    read_bytes(sample * sample_size_ * 4 + at, bytes, reinterpret_cast<char*>(x.data()) + at);
  });
}

void sample_store::write(const qeft::on_host& exec, index_t sample, const std::vector<float>& x) {
  if (static_cast<index_t>(x.size()) != sample_size_) {
    fail(errc::invalid_argument, "sample_store::write: x has " + std::to_string(x.size()) +
                                     " floats, but a sample has " + std::to_string(sample_size_));
  }
  for_pieces(exec, sample_size_ * 4, [&](index_t at, index_t bytes) {
    write_bytes(sample * sample_size_ * 4 + at, bytes,
                reinterpret_cast<const char*>(x.data()) + at);
  });
}

void sample_store::read_bytes(index_t at, index_t bytes, char* to) const {
  while (bytes > 0) {
    const ssize_t got = ::pread(file_, to, static_cast<std::size_t>(bytes), at);
    if (got <= 0) fail_io("read", got == 0 ? 0 : errno);
    to += got;
    at += got;
    bytes -= got;
  }
}

void sample_store::write_bytes(index_t at, index_t bytes, const char* from) {
  while (bytes > 0) {
    const ssize_t put = ::pwrite(file_, from, static_cast<std::size_t>(bytes), at);
    if (put < 0) fail_io("write", errno);
    from += put;
    at += put;
    bytes -= put;
  }
}

void sample_store::sync() {
  if (::fsync(file_) != 0) fail_io("write", errno);
}

}  // namespace qeft_llm
