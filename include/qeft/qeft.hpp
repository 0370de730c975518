// SPDX-License-Identifier: Apache-2.0
// Everything that needs neither CUDA nor a third-party library. (solver/ needs Eigen and io/ needs
// nlohmann-json: include their headers by name.)
#pragma once

#include "qeft/container/matrix_descriptor.hpp"
#include "qeft/container/quantized_matrix.hpp"
#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/container/repack.hpp"
#include "qeft/core/config.hpp"
#include "qeft/core/half.hpp"
#include "qeft/core/math.hpp"
#include "qeft/core/memory.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/core/status.hpp"
#include "qeft/core/version.hpp"
#include "qeft/format/bit_planes.hpp"
#include "qeft/format/quant_format.hpp"
#include "qeft/format/weak_columns.hpp"
#include "qeft/layout/extent.hpp"
#include "qeft/layout/row_packed.hpp"
#include "qeft/layout/simd_tile.hpp"
#include "qeft/reorder/permutation.hpp"
#include "qeft/reorder/permute_matrix.hpp"
#include "qeft/reorder/reorder_plan.hpp"
#include "qeft/reorder/weak_selection.hpp"
