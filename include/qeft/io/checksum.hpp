// SPDX-License-Identifier: Apache-2.0
// The checksum of a set of tensors, as stored in the metadata of the files we write.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "qeft/io/tensor.hpp"

namespace qeft::io {
inline namespace QEFT_TARGET {

/// 64-bit hash of a stream of bytes, taken as little-endian 64-bit words, the last one padded with
/// zeros, followed by the length: h = (h xor word) * 0x9E3779B97F4A7C15; h = h xor (h >> 32). Each
/// step is a bijection, so a change confined to one word never goes unnoticed.
class stream_hash {
 public:
  void update(span<const std::byte> bytes) noexcept {
    const std::byte* p = bytes.data();
    index_t left = bytes.size();
    length_ += static_cast<std::uint64_t>(left);
    while (pending_size_ != 0 && left > 0) {  // complete the word of the previous call
      append(*p++);
      --left;
    }
    for (; left >= 8; left -= 8, p += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, p, 8);
      mix(word);
    }
    for (; left > 0; --left) append(*p++);
  }
  void update(std::string_view text) noexcept {
    update({reinterpret_cast<const std::byte*>(text.data()), static_cast<index_t>(text.size())});
  }
  std::uint64_t finish() const noexcept {
    stream_hash h = *this;
    if (h.pending_size_ != 0) h.mix(h.pending_);
    h.mix(length_);
    return h.state_;
  }

 private:
  void mix(std::uint64_t word) noexcept {
    state_ = (state_ ^ word) * 0x9E3779B97F4A7C15U;
    state_ ^= state_ >> 32U;
  }
  void append(std::byte b) noexcept {
    pending_ |= static_cast<std::uint64_t>(b) << (8U * pending_size_);
    if (++pending_size_ == 8) {
      mix(pending_);
      pending_ = 0;
      pending_size_ = 0;
    }
  }

  std::uint64_t state_ = 0xCBF29CE484222325U;
  std::uint64_t length_ = 0;
  std::uint64_t pending_ = 0;
  unsigned pending_size_ = 0;
};

/// Hash of one tensor: of its bytes, then of its name, type and shape. A file's checksum is the sum
/// over its tensors modulo 2^64, so the order in which tensors are stored does not matter.
/// @param type as the file spells it
inline std::uint64_t tensor_checksum(stream_hash data, const std::string& name,
                                     const std::string& type, const std::vector<index_t>& shape) {
  data.update(name + " " + type + " " + to_string(shape));
  return data.finish();
}

/// 16 hexadecimal digits.
inline std::string to_hex(std::uint64_t value) {
  std::string text(16, '0');
  for (std::size_t i = 16; i-- > 0; value >>= 4U) text[i] = "0123456789abcdef"[value & 15U];
  return text;
}

}  // namespace QEFT_TARGET
}  // namespace qeft::io
