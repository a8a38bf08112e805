// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ops that are the device's own: factories, views, copies, resizing. All others fall back.
#pragma once

namespace capstan::test::fake {

void register_ops();

}  // namespace capstan::test::fake
