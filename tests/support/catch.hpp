// SPDX-License-Identifier: Apache-2.0
// Catch2 2 and 3 under one name.
#pragma once

#if defined(QEFT_CATCH2_V2)
#include <catch2/catch.hpp>
#else
#include <catch2/catch_all.hpp>
#endif
