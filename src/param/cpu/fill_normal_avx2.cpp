// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#define CAPSTAN_ISA_NAMESPACE avx2
#include "param/cpu/fill_normal.inc"
