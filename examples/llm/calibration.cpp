// SPDX-License-Identifier: Apache-2.0
#include "calibration.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

#include "qeft/core/status.hpp"
#include "tokenizer.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

std::vector<std::vector<int>> calibration_windows(const tokenizer& tok, const std::string& file,
                                                  index_t count, index_t seq_len,
                                                  std::uint64_t seed) {
  std::ifstream in(file, std::ios::binary);
  if (!in) {
    fail(errc::io_error, "calibration file " + file + ": " + std::strerror(errno));
  }
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const std::vector<int> tokens = tok.encode(text, /*parse_special=*/false);
  const index_t available = static_cast<index_t>(tokens.size()) / seq_len;
  if (available < count) {
    fail(errc::invalid_argument, "calibration file " + file + " holds " +
                                     std::to_string(tokens.size()) + " tokens, but " +
                                     std::to_string(count) + " samples of " +
                                     std::to_string(seq_len) + " tokens need " +
                                     std::to_string(count * seq_len));
  }
  // Draw `count` of the windows that tile the text. std::shuffle is not the same everywhere, so the
  // draw is spelled out.
  std::vector<index_t> window(static_cast<std::size_t>(available));
  for (std::size_t i = 0; i < window.size(); ++i) window[i] = static_cast<index_t>(i);
  std::mt19937_64 rng(seed);
  std::vector<std::vector<int>> result;
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    std::swap(window[i], window[i + rng() % (window.size() - i)]);
    const auto first = tokens.begin() + window[i] * seq_len;
    result.emplace_back(first, first + seq_len);
  }
  return result;
}

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
    fail(errc::io_error, "cannot size the file for activations in " + directory + ": " +
                             std::strerror(cause));
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
