// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// manifest.json: what a committed step contains, and the proof that it is whole. The last line of
// the file is
// `#xxh3:<32 digits>`, the hash of everything before it. No torch.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "capstan/base/dtype.h"
#include "capstan/base/file.h"
#include "capstan/plan/layout.h"

namespace capstan::checkpoint {

inline constexpr int kManifestVersion = 1;

// One stored box of a global tensor.
struct StoredTensor {
  std::string model;      // "policy"
  std::string kind;       // "model", "optimizer.exp_avg", ...
  std::string name;       // canonical parameter name
  std::string stored_as;  // tensor name in its file
  std::string file;
  DType dtype = DType::kFp32;
  plan::Shape global_shape;
  plan::Box box;
};
struct StoredFile {
  std::string name;  // plain file name inside the step folder
  int64_t bytes = 0;
  std::string xxh3;
};
struct Manifest {
  int version = kManifestVersion;
  int64_t step = 0;
  std::string program;          // "capstan 0.1.0"
  std::string created;          // UTC
  std::string recipe_identity;  // recipe::identity_hash
  std::map<std::string, std::string>
      layout;  // world size, axes, device, threads, instruction set, ...
  std::vector<StoredFile> files;
  std::vector<StoredTensor> tensors;
};
[[nodiscard]] std::string to_text(const Manifest& manifest);
// Throws DataError: damaged text, wrong hash, unknown version, duplicate or unsafe names, boxes
// outside their tensors.
[[nodiscard]] Manifest parse_manifest(const std::string& text, const std::string& origin);

}  // namespace capstan::checkpoint
