// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `--set a.b[0].c=VALUE`: one value put into the tree that was read from files.
#pragma once
#include <string>

#include "recipe/yaml_tree_internal.h"

namespace capstan::recipe {

// Maps merge entry by entry; everything else is replaced, place included.
void merge_into(Node& base, Node top);

// `number` counts from 1 and names the override in errors: `--set:2:1`.
void apply_override(Node& root, const std::string& text, int number, Reading& reading);

}  // namespace capstan::recipe
