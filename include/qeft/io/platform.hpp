// SPDX-License-Identifier: Apache-2.0
// What io/ needs to know about the operating system. The only file of io/ that looks at macros.
#pragma once

#include "qeft/core/config.hpp"

#if defined(__unix__) || defined(__APPLE__)
#define QEFT_HAS_POSIX_FILES 1
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "qeft/io: files are little-endian and are used in place; this machine is big-endian"
#endif
