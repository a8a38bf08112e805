// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "../api_table.h"

namespace capstan::kernels {

const Api& cuda_api() { return kLinkedApi; }

}  // namespace capstan::kernels
