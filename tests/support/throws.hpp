// SPDX-License-Identifier: Apache-2.0
// Checking what an error says, with any Catch2.
#pragma once

#include <cstdio>
#include <initializer_list>
#include <string>

#include "qeft/core/status.hpp"

namespace qeft_test {

/// Whether `text` holds every fragment; prints what is missing.
inline bool mentions(const std::string& text, std::initializer_list<const char*> fragments) {
  bool all = true;
  for (const char* fragment : fragments) {
    if (text.find(fragment) == std::string::npos) {
      std::printf("'%s' is missing in: %s\n", fragment, text.c_str());
      all = false;
    }
  }
  return all;
}

/// Whether body() throws a qeft::error of this code whose text holds every fragment.
template <class Body>
bool throws_with(qeft::errc code, std::initializer_list<const char*> fragments, const Body& body) {
  try {
    body();
  } catch (const qeft::error& e) {
    if (e.code() != code) std::printf("unexpected error code for: %s\n", e.what());
    return e.code() == code && mentions(e.what(), fragments);
  }
  std::printf("no error, expected one with '%s'\n", *fragments.begin());
  return false;
}

}  // namespace qeft_test
