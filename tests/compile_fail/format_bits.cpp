// SPDX-License-Identifier: Apache-2.0
// expect: qeft::quant_format: Bits must be 2, 3, 4 or 8
#include "qeft/format/quant_format.hpp"

qeft::quant_format<VALID ? 4 : 5> format;
