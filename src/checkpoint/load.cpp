// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/checkpoint/load.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/base/text.h"
#include "capstan/base/trace.h"
#include "capstan/checkpoint/safetensors.h"

namespace capstan::checkpoint {
namespace {

// A regular file of that name inside the folder; a link could lead out of it.
Path confined(const Path& folder, const std::string& name) {
  Path path = folder / name;
  std::error_code error;
  const auto status = std::filesystem::symlink_status(path, error);
  if (error || !std::filesystem::is_regular_file(status))
    throw DataError({.module = "checkpoint",
                     .what = "opening " + path.string(),
                     .got = error ? "no such file" : "something that is no regular file",
                     .need = "the file that the manifest lists",
                     .fix = "Use another step"});
  return path;
}

void verify_file(const Path& folder, const StoredFile& file, Verify verify) {
  const Path path = confined(folder, file.name);
  const auto size = static_cast<int64_t>(std::filesystem::file_size(path));
  if (size != file.bytes)
    throw DataError({.module = "checkpoint",
                     .what = "verifying " + path.string(),
                     .got = fmt::format("{} bytes", size),
                     .need = fmt::format("{}", file.bytes),
                     .fix = "Use another step"});
  if (verify == Verify::kFast) return;
  const MappedFile content(path);
  const std::string hash = xxh3_128_hex(content.bytes());
  if (hash != file.xxh3)
    throw DataError({.module = "checkpoint",
                     .what = "verifying " + path.string(),
                     .got = "content with hash " + hash,
                     .need = file.xxh3,
                     .fix = "Use another step"});
}

std::string verify_share(const Path& folder, const Manifest& manifest, Verify verify,
                         const CommitGroup& group) {
  try {
    for (size_t i = static_cast<size_t>(group.rank()); i < manifest.files.size();
         i += static_cast<size_t>(group.size()))
      verify_file(folder, manifest.files[i], verify);
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

int64_t offset_in(const plan::Box& box, const std::vector<int64_t>& at) {
  int64_t offset = 0;
  for (size_t d = 0; d < at.size(); ++d) offset = offset * box.extent[d] + (at[d] - box.begin[d]);
  return offset;
}

// Copies the common box from one row-major box to another, run by run along the last dimension.
void copy_box(const plan::Box& common, const plan::Box& from, const std::byte* source,
              const plan::Box& to, std::byte* target, size_t item) {
  std::vector<int64_t> at = common.begin;
  const int64_t run = common.extent.empty() ? 1 : common.extent.back();
  while (true) {
    std::memcpy(target + static_cast<size_t>(offset_in(to, at)) * item,
                source + static_cast<size_t>(offset_in(from, at)) * item,
                static_cast<size_t>(run) * item);
    int d = static_cast<int>(at.size()) - 2;
    for (; d >= 0; --d) {
      if (++at[d] < common.begin[d] + common.extent[d]) break;
      at[d] = common.begin[d];
    }
    if (d < 0) return;
  }
}

using Key =
    std::pair<std::string, std::string>;  // kind, name; models are told apart by the caller's blobs

class Loader {
 public:
  explicit Loader(const FoundStep& step) : step_(step) {
    for (const StoredTensor& t : step.manifest.tensors)
      stored_[{t.model + "/" + t.kind, t.name}].push_back(&t);
  }

  void fill(StateBlob& blob) {
    const auto found = stored_.find({blob.model + "/" + blob.kind, blob.name});
    if (found == stored_.end()) {
      problems_.push_back(fmt::format("{} {} is not in the checkpoint", blob.kind, blob.name));
      ++absent_;
      return;
    }
    if (!matches(blob, *found->second.front())) return;
    int64_t covered = 0;
    for (const StoredTensor* t : found->second) covered += copy_from(*t, blob);
    if (covered != blob.box.numel())
      problems_.push_back(fmt::format("{} {}: {} of {} elements are stored", blob.kind, blob.name,
                                      covered, blob.box.numel()));
  }

  [[nodiscard]] const std::vector<std::string>& problems() const { return problems_; }
  [[nodiscard]] int64_t absent() const { return absent_; }
  [[nodiscard]] int64_t bytes_read() const { return bytes_read_; }

 private:
  bool matches(const StateBlob& blob, const StoredTensor& t) {
    if (t.global_shape != blob.global_shape) {
      problems_.push_back(fmt::format("{} {}: stored with shape [{}], need [{}]", blob.kind,
                                      blob.name, fmt::join(t.global_shape, ", "),
                                      fmt::join(blob.global_shape, ", ")));
      return false;
    }
    if (t.dtype != blob.dtype) {
      problems_.push_back(fmt::format("{} {}: stored as {}, need {}", blob.kind, blob.name,
                                      name_of(t.dtype), name_of(blob.dtype)));
      return false;
    }
    return true;
  }

  int64_t copy_from(const StoredTensor& t, StateBlob& blob) {
    const plan::Box common = plan::intersect(t.box, blob.box);
    const int64_t count = common.numel();
    if (count == 0) return 0;
    const TensorView view = file(t.file).tensor(t.stored_as);
    const size_t item = size_of(t.dtype);
    if (view.dtype != t.dtype || view.shape != t.box.extent)
      throw DataError({.module = "checkpoint",
                       .what = fmt::format("reading {} from {}", quote(t.stored_as), t.file),
                       .got = "another shape or dtype than the manifest's",
                       .need = "the tensor that was saved",
                       .fix = "Use another step"});
    copy_box(common, t.box, view.bytes.data(), blob.box, blob.bytes.data(), item);
    bytes_read_ += count * static_cast<int64_t>(item);
    return count;
  }

  const SafetensorsFile& file(const std::string& name) {
    auto found = files_.find(name);
    if (found == files_.end())
      found = files_.emplace(name, SafetensorsFile(confined(step_.path, name))).first;
    return found->second;
  }

  const FoundStep& step_;
  std::map<Key, std::vector<const StoredTensor*>> stored_;
  std::map<std::string, SafetensorsFile> files_;
  std::vector<std::string> problems_;
  int64_t absent_ = 0, bytes_read_ = 0;
};

[[noreturn]] void throw_problems(const FoundStep& step, const Loader& loader, size_t blobs) {
  constexpr size_t kShown = 20;
  std::string list;
  for (size_t i = 0; i < std::min(kShown, loader.problems().size()); ++i)
    list += "\n  " + loader.problems()[i];
  if (loader.problems().size() > kShown)
    list += fmt::format("\n  and {} more", loader.problems().size() - kShown);
  const ErrorText text{.module = "checkpoint",
                       .what = fmt::format("loading {}", step.path.string()),
                       .got = fmt::format("{} tensors that do not fit", loader.problems().size()),
                       .need = "the state of this model",
                       .fix = "Load it with the recipe it was trained with:" + list};
  if (static_cast<size_t>(loader.absent()) == blobs) throw ConfigError(text);
  throw DataError(text);
}

}  // namespace

Verify parse_verify(const std::string& name) {
  if (name == "full") return Verify::kFull;
  if (name == "fast") return Verify::kFast;
  throw ConfigError({.module = "checkpoint",
                     .what = "checkpoint.verify",
                     .got = quote(name),
                     .need = "full or fast"});
}

Manifest verify_step(const Path& step_folder, Verify verify, CommitGroup& group) {
  std::string failure;
  Manifest manifest;
  try {
    const Path path = confined(step_folder, "manifest.json");
    manifest = parse_manifest(read_file(path), path.string());
    const auto step = step_of_folder(step_folder.filename().string());
    if (step && *step != manifest.step)
      throw DataError({.module = "checkpoint",
                       .what = "verifying " + step_folder.string(),
                       .got = fmt::format("a manifest of step {}", manifest.step),
                       .need = "that of its own step",
                       .fix = "Use another step"});
    failure = verify_share(step_folder, manifest, verify, group);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  for (const std::string& text : group.gather(failure))
    if (!text.empty()) throw DataError(text);
  return manifest;
}

std::optional<FoundStep> find_newest_good_step(const Path& directory, Verify verify,
                                               CommitGroup& group) {
  // Rank 0's view of the folder decides, so that all ranks try the same steps.
  std::string mine;
  if (group.rank() == 0)
    for (const CommittedStep& step : list_steps(directory))
      mine += step.path.filename().string() + "\n";
  const std::string names = group.gather(mine).front();
  std::string first_reason;
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = names.find('\n', begin);
    const Path path = directory / names.substr(begin, end - begin);
    begin = end + 1;
    try {
      return FoundStep{path, verify_step(path, verify, group)};
    } catch (const DataError& error) {
      if (first_reason.empty()) first_reason = error.what();
      if (group.rank() == 0)
        log::error("checkpoint", "{} is passed over: {}", path.string(), error.what());
    }
  }
  if (names.empty()) return std::nullopt;
  throw DataError({.module = "checkpoint",
                   .what = "looking for a good step in " + directory.string(),
                   .got = "none that passes verification",
                   .need = "one",
                   .why = first_reason,
                   .fix = "Start anew with another run.name, or restore the folder from a copy"});
}

int64_t load_state(const FoundStep& step, std::vector<StateBlob>& state) {
  const trace::Span span("checkpoint", "load");
  Loader loader(step);
  for (StateBlob& blob : state) loader.fill(blob);
  if (!loader.problems().empty()) throw_problems(step, loader, state.size());
  return loader.bytes_read();
}

std::string read_step_file(const Path& step_folder, const std::string& name) {
  return read_file(confined(step_folder, name));
}

FoundStep open_model_directory(const Path& directory, Verify verify) {
  SoloGroup solo;
  std::error_code ignored;
  if (std::filesystem::is_regular_file(directory / "manifest.json", ignored))
    return {directory, verify_step(directory, verify, solo)};
  if (std::filesystem::is_directory(directory / "checkpoints", ignored)) {
    if (auto found = find_newest_good_step(directory / "checkpoints", verify, solo)) return *found;
    throw ConfigError({.module = "checkpoint",
                       .what = "opening " + directory.string(),
                       .got = "a run without a committed step",
                       .need = "at least one",
                       .fix = "Train until checkpoint.interval_steps, or stop the run with Ctrl-C "
                              "so that it saves"});
  }
  const bool exists = std::filesystem::exists(directory, ignored);
  throw ConfigError({.module = "checkpoint",
                     .what = "opening " + directory.string(),
                     .got = exists ? "a folder without checkpoints" : "no such folder",
                     .need = "a run directory (runs/NAME) or one of its step folders"});
}

}  // namespace capstan::checkpoint
