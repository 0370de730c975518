// SPDX-License-Identifier: Apache-2.0
// What io/ needs to know about the operating system. The only file of io/ that looks at macros.
#pragma once

#include "qeft/core/config.hpp"

#if defined(__unix__) || defined(__APPLE__)
#define QEFT_HAS_POSIX_FILES 1
#endif
