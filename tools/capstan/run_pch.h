// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Precompiled for the sources of capstan-run that name tensors: narrower than the one of the
// modules, which holds all of ATen.
#pragma once
#include <ATen/core/Tensor.h>

#include "cli_pch.h"
