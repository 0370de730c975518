// SPDX-License-Identifier: Apache-2.0
// Everything of qeft.hpp in CUDA C++, with the CUDA runtime that device code is launched through;
// but for device/selection.cuh, which brings CUB and Thrust along.
#pragma once

#include <cuda_runtime.h>

#include "qeft/core/device_memory.cuh"
#include "qeft/core/stream_memory.cuh"
#include "qeft/device/backward.cuh"
#include "qeft/device/copy.cuh"
#include "qeft/device/dequantize.cuh"
#include "qeft/device/gather.cuh"
#include "qeft/device/gemm.cuh"
#include "qeft/device/gemm_layers.cuh"
#include "qeft/device/repack.cuh"
#include "qeft/qeft.hpp"
