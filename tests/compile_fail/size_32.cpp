// SPDX-License-Identifier: Apache-2.0
// expect: qeft: only 64-bit machines are supported
// flags: -U__SIZEOF_SIZE_T__ -D__SIZEOF_SIZE_T__=4
#include "qeft/core/config.hpp"
