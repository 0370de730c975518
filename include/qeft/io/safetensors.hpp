// SPDX-License-Identifier: Apache-2.0
// Reading and writing safetensors files.
#pragma once

#include "qeft/io/convert.hpp"
#include "qeft/io/safetensors_reader.hpp"
#include "qeft/io/safetensors_writer.hpp"
