// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Conversions to narrow floating-point formats, bit for bit as GPUs make them.
#pragma once
#include <cstdint>

namespace capstan::kernels {

[[nodiscard]] uint16_t bf16_bits(float x);  // to nearest even; NaN: 0x7fff as on the device
// Of numbers, not of NaN; to nearest even, what is too large becomes the largest number.
[[nodiscard]] uint8_t e4m3_bits(float x);
[[nodiscard]] uint8_t e5m2_bits(float x);

}  // namespace capstan::kernels
