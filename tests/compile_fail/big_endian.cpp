// SPDX-License-Identifier: Apache-2.0
// expect: qeft: only little-endian machines are supported
// flags: -U__BYTE_ORDER__ -D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__
#include "qeft/core/config.hpp"
