// SPDX-License-Identifier: Apache-2.0
// The version of the library and of its checkpoint format. CMake parses this file; it includes
// nothing.
#pragma once

#define QEFT_VERSION_MAJOR 0
#define QEFT_VERSION_MINOR 1
#define QEFT_VERSION_PATCH 0

namespace qeft {

/// Version of the checkpoint format (io/checkpoint.hpp); raised when older readers would misread a
/// file.
inline constexpr int checkpoint_format_version = 1;

}  // namespace qeft
