// SPDX-License-Identifier: Apache-2.0
// expect: qeft::bit_planes: Bits must be 2, 3, 4 or 8
#include "qeft/format/bit_planes.hpp"

auto words = qeft::packed_array<VALID ? 4 : 5>::words(7);
