// SPDX-License-Identifier: Apache-2.0
// expect: qeft: compile without -ffast-math
// flags: -ffast-math | -Ofast | -ffinite-math-only | -O3 -ffast-math -march=native
#include "qeft/core/half.hpp"
