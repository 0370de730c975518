// SPDX-License-Identifier: Apache-2.0
// expect: no match for|invalid operands
#include "qeft/core/half.hpp"

// Storage types have no arithmetic: a silent conversion would hide where precision is lost.
float sum(qeft::half_bits a, qeft::half_bits b) {
#if VALID
  return to_float(a) + to_float(b);
#else
  return a + b;
#endif
}
