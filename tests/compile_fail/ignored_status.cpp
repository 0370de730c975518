// SPDX-License-Identifier: Apache-2.0
// expect: nodiscard
#include "qeft/container/matrix_descriptor.hpp"

qeft::status checked(const qeft::matrix_descriptor& d) {
#if !VALID
  qeft::validate(d);
#endif
  return qeft::validate(d);
}
