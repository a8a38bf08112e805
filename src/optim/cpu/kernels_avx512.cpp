// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#define CAPSTAN_ISA_NAMESPACE avx512
#include "optim/cpu/loops.inc"
