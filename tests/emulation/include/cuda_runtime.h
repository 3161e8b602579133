// SPDX-License-Identifier: Apache-2.0
// Found before the real <cuda_runtime.h>.
#pragma once
#include "../cuda_emulation.h"
