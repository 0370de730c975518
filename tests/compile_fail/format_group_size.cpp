// SPDX-License-Identifier: Apache-2.0
// expect: qeft::quant_format: GroupSize must be a positive multiple of 32
#include "qeft/format/quant_format.hpp"

qeft::quant_format<4, VALID ? 64 : 48> format;
