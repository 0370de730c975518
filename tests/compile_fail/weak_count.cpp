// SPDX-License-Identifier: Apache-2.0
// expect: qeft: the number of weak columns K must be >= 0 or qeft::dynamic
#include "qeft/format/weak_columns.hpp"

qeft::weak_tail<VALID ? 1 : -1> weak;
