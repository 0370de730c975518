// SPDX-License-Identifier: Apache-2.0
#include "utf8.hpp"

#include <utf8proc.h>

#include <cstdlib>
#include <memory>

#include "qeft/core/status.hpp"

namespace qeft_llm {

int character_length(std::string_view s) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first < 0xc2 || first > 0xf4) return -1;
  const int length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  // The second byte has a narrower range after these: no overlong forms, surrogates or > U+10FFFF.
  unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  for (int i = 1; i < length; ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (at >= s.size() || byte(at) < low || byte(at) > high) return -i;
    low = 0x80;
    high = 0xbf;
  }
  return length;
}

std::string well_formed(std::string_view s) {
  std::string out;
  out.reserve(s.size());
  while (!s.empty()) {
    const int length = character_length(s);
    const auto bytes = static_cast<std::size_t>(std::abs(length));
    out.append(length > 0 ? s.substr(0, bytes) : std::string_view("\xef\xbf\xbd"));
    s.remove_prefix(bytes);
  }
  return out;
}

std::uint32_t code_point_at(std::string_view s, std::size_t at) {
  utf8proc_int32_t code = 0;
  utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(s.data() + at),
                   static_cast<utf8proc_ssize_t>(s.size() - at), &code);
  return static_cast<std::uint32_t>(code);
}

std::size_t previous_character(std::string_view s, std::size_t at) {
  do {
    --at;
  } while (at > 0 && (static_cast<unsigned char>(s[at]) & 0xc0U) == 0x80U);
  return at;
}

bool is_space(std::uint32_t c) {
  return (c >= 0x9 && c <= 0xd) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

bool is_word(std::uint32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:  // joiners, and the circled and squared letters, which are symbols by category
      return c == 0x200c || c == 0x200d || (c >= 0x24b6 && c <= 0x24e9) ||
             (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
             (c >= 0x1f170 && c <= 0x1f189);
  }
}

std::string normalized(std::string_view s, normal_form form) {
  const bool compose = form == normal_form::nfc || form == normal_form::nfkc;
  const bool compatible = form == normal_form::nfkc || form == normal_form::nfkd;
  const auto options = static_cast<utf8proc_option_t>(
      UTF8PROC_STABLE | (compose ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) |
      (compatible ? UTF8PROC_COMPAT : 0));
  utf8proc_uint8_t* mapped = nullptr;
  const utf8proc_ssize_t length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(s.data()),
                   static_cast<utf8proc_ssize_t>(s.size()), &mapped, options);
  if (length < 0) {
    qeft::fail(qeft::errc::invalid_argument,
               std::string("tokenizer: Unicode normalisation: ") + utf8proc_errmsg(length));
  }
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(mapped, std::free);
  return std::string(reinterpret_cast<const char*>(mapped), static_cast<std::size_t>(length));
}

}  // namespace qeft_llm
