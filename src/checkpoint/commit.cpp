// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/checkpoint/commit.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <random>

#include "capstan/base/check.h"
#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/log.h"
#include "capstan/base/trace.h"
#include "capstan/checkpoint/safetensors.h"

namespace capstan::checkpoint {
namespace {

// What a rank tells rank 0 about its shards; `error` is its veto.
struct RankPart {
  std::string error;
  std::vector<StoredFile> files;
  std::vector<StoredTensor> tensors;
};

std::string to_message(const RankPart& part) {
  Manifest carrier;
  carrier.files = part.files;
  carrier.tensors = part.tensors;
  return part.error.empty() ? "+" + to_text(carrier) : "-" + part.error;
}

RankPart from_message(const std::string& message, int rank) {
  CAPSTAN_CHECK(!message.empty(), "empty message from rank {}", rank);
  RankPart part;
  if (message[0] == '-') {
    part.error = message.substr(1);
    return part;
  }
  Manifest carrier = parse_manifest(message.substr(1), fmt::format("the shards of rank {}", rank));
  part.files = std::move(carrier.files);
  part.tensors = std::move(carrier.tensors);
  return part;
}

std::string make_uuid() {
  std::random_device device;
  return fmt::format("{:08x}{:08x}{:08x}", device(), device(),
                     static_cast<uint32_t>(monotonic_ns()));
}

// The first bytes of the file must come back from the disk, not from the page cache.
void check_readback(const Path& path, int64_t size) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0)
    throw EnvError({.module = "checkpoint",
                    .what = "reading back " + path.string(),
                    .why = std::strerror(errno)});
  ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
  const off_t end = ::lseek(descriptor, 0, SEEK_END);
  uint64_t length = 0;
  const ssize_t got = ::pread(descriptor, &length, sizeof length, 0);
  ::close(descriptor);
  if (end != size || got != sizeof length || length > static_cast<uint64_t>(size))
    throw EnvError({.module = "checkpoint",
                    .what = "reading back " + path.string(),
                    .got = fmt::format("{} bytes", static_cast<int64_t>(end)),
                    .need = fmt::format("the {} bytes just written", size)});
}

std::string file_group(const std::string& kind) {
  return kind.substr(0, kind.find('.'));
}  // "model", "optimizer"

// Whole tensors keep their canonical name; parts say which rows and columns they are.
std::string stored_name(const StateBlob& blob) {
  const size_t dot = blob.kind.find('.');
  std::string name =
      dot == std::string::npos ? blob.name : blob.kind.substr(dot + 1) + "." + blob.name;
  if (blob.box == plan::whole_box(blob.global_shape)) return name;
  name += "@";
  for (size_t d = 0; d < blob.box.begin.size(); ++d)
    name += fmt::format("{}{}:{}", d == 0 ? "" : ",", blob.box.begin[d],
                        blob.box.begin[d] + blob.box.extent[d]);
  return name;
}

void write_group(const SaveRequest& request, const std::string& group_name, const Path& folder,
                 const CommitGroup& group, RankPart& part) {
  const std::string file =
      fmt::format("{}-{:05}-of-{:05}.safetensors", group_name, group.rank() + 1, group.size());
  std::vector<TensorView> tensors;
  for (const StateBlob& blob : request.state) {
    if (!blob.writes || file_group(blob.kind) != group_name) continue;
    const std::string name = stored_name(blob);
    tensors.push_back({name, blob.dtype, blob.box.extent, blob.bytes});
    part.tensors.push_back(
        {blob.model, blob.kind, blob.name, name, file, blob.dtype, blob.global_shape, blob.box});
  }
  if (tensors.empty()) return;
  const WrittenFile written =
      write_safetensors(folder / file, std::move(tensors), {{"format", "pt"}});
  check_readback(folder / file, written.bytes);
  part.files.push_back({file, written.bytes, written.xxh3});
}

RankPart write_shards(const SaveRequest& request, const Path& folder, const CommitGroup& group) {
  RankPart part;
  try {
    std::vector<std::string> groups;
    for (const StateBlob& blob : request.state)
      if (std::find(groups.begin(), groups.end(), file_group(blob.kind)) == groups.end())
        groups.push_back(file_group(blob.kind));
    for (const std::string& name : groups) write_group(request, name, folder, group, part);
    if (group.rank() == 0) {
      for (const auto& [name, content] : request.files) {
        FileWriter writer(folder / name);
        writer.write(content);
        part.files.push_back({name, static_cast<int64_t>(content.size()), writer.close()});
      }
    }
    fsync_directory(folder);
  } catch (const std::exception& error) {
    part.error = fmt::format("rank {}: {}", group.rank(), error.what());
  }
  return part;
}

Manifest merge_parts(const SaveRequest& request, const std::vector<std::string>& messages) {
  Manifest manifest;
  manifest.step = request.step;
  manifest.program = "capstan";
  manifest.created = utc_now();
  manifest.recipe_identity = request.recipe_identity;
  manifest.layout = request.layout;
  for (size_t rank = 0; rank < messages.size(); ++rank) {
    RankPart part = from_message(messages[rank], static_cast<int>(rank));
    if (!part.error.empty())
      throw EnvError({.module = "checkpoint",
                      .what = fmt::format("saving step {}", request.step),
                      .why = part.error,
                      .fix = "Older checkpoints are untouched; the next interval tries again"});
    manifest.files.insert(manifest.files.end(), part.files.begin(), part.files.end());
    manifest.tensors.insert(manifest.tensors.end(), part.tensors.begin(), part.tensors.end());
  }
  return manifest;
}

// Rank 0: describe, rename, make durable. The text that comes back is empty, or the reason of the
// failure.
std::string describe_and_rename(const Manifest& manifest, const Path& folder, const Path& target) {
  try {
    FileWriter writer(folder / "manifest.json");
    writer.write(to_text(manifest));
    (void)writer.close();
    fsync_directory(folder);
    if (!rename_no_replace(folder, target)) return "rank 0: " + target.string() + " exists already";
    fsync_directory(target.parent_path());
  } catch (const std::exception& error) {
    return fmt::format("rank 0: {}", error.what());
  }
  // From here on the step is committed: what follows only tidies up.
  try {
    std::error_code ignored;
    std::filesystem::remove(folder.parent_path(), ignored);  // the empty .partial folder
    write_file_atomic(target.parent_path() / "latest", target.filename().string() + "\n");
  } catch (const std::exception& error) {
    log::warning("checkpoint", "step {} is committed, but the `latest` hint was not updated: {}",
                 manifest.step, error.what());
  }
  return {};
}

Path make_partial_folder(const SaveRequest& request, CommitGroup& group) {
  std::string mine;
  if (group.rank() == 0) {
    try {
      const Path folder =
          request.directory / (step_folder_name(request.step) + ".partial") / make_uuid();
      create_directories_durable(folder);
      mine = "+" + folder.string();
    } catch (const std::exception& error) {
      mine = fmt::format("-rank 0: {}", error.what());
    }
  }
  const std::string answer = group.gather(mine).front();
  if (answer.front() == '-')
    throw EnvError({.module = "checkpoint",
                    .what = fmt::format("saving step {}", request.step),
                    .why = answer.substr(1),
                    .fix = "Older checkpoints are untouched; the next interval tries again"});
  return answer.substr(1);
}

// Before a save: "free", "committed", or what stands in the way.
std::string state_of(const Path& target) {
  std::error_code error;
  if (!std::filesystem::exists(target, error) && !error) return "free";
  try {
    (void)parse_manifest(read_file(target / "manifest.json"), target.string());
    return "committed";
  } catch (const std::exception& reason) {
    return fmt::format("{} without a good manifest ({})", target.string(), reason.what());
  }
}

}  // namespace

SaveResult save_step(const SaveRequest& request, CommitGroup& group) {
  const trace::Span span("checkpoint", "save");
  const Path target = request.directory / step_folder_name(request.step);
  const std::string state = group.gather(group.rank() == 0 ? state_of(target) : "").front();
  if (state == "committed") return {target, 0};
  if (state != "free")
    throw EnvError({.module = "checkpoint",
                    .what = fmt::format("saving step {}", request.step),
                    .got = state,
                    .need = "no such folder, or a committed step",
                    .fix = "Move the folder away"});

  const Path folder = make_partial_folder(request, group);
  const std::vector<std::string> messages =
      group.gather(to_message(write_shards(request, folder, group)));
  const Manifest manifest = merge_parts(request, messages);  // throws the same on every rank
  const std::string failure =
      group.gather(group.rank() == 0 ? describe_and_rename(manifest, folder, target) : "").front();
  if (!failure.empty())
    throw EnvError({.module = "checkpoint",
                    .what = fmt::format("committing step {}", request.step),
                    .why = failure,
                    .fix = "Older checkpoints are untouched; the next interval tries again"});
  SaveResult result{target, 0};
  for (const StoredFile& file : manifest.files) result.bytes += file.bytes;
  return result;
}

std::string step_folder_name(int64_t step) { return fmt::format("step-{:08}", step); }

std::optional<int64_t> step_of_folder(const std::string& name) {
  constexpr std::string_view kPrefix = "step-";
  if (name.rfind(kPrefix, 0) != 0) return std::nullopt;
  int64_t step = 0;
  const char* begin = name.data() + kPrefix.size();
  const char* end = name.data() + name.size();
  const auto [rest, error] = std::from_chars(begin, end, step);
  const bool digits = end - begin >= 8 && *begin >= '0' && *begin <= '9';
  return error == std::errc() && rest == end && digits ? std::optional(step) : std::nullopt;
}

std::vector<CommittedStep> list_steps(const Path& directory) {
  std::vector<CommittedStep> steps;
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator(directory, missing)) {
    const auto step = step_of_folder(entry.path().filename().string());
    std::error_code ignored;
    if (step && std::filesystem::is_regular_file(entry.path() / "manifest.json", ignored))
      steps.push_back({*step, entry.path()});
  }
  std::sort(steps.begin(), steps.end(),
            [](const auto& a, const auto& b) { return a.step > b.step; });
  return steps;
}

void apply_retention(const Path& directory, const KeepRules& rules) {
  const std::vector<CommittedStep> steps = list_steps(directory);
  const auto keep_last = static_cast<size_t>(std::max<int64_t>(1, rules.keep_last));
  for (size_t i = keep_last; i < steps.size(); ++i) {
    if (rules.keep_every_steps && steps[i].step % *rules.keep_every_steps == 0) continue;
    // The manifest goes first, so that a half-removed folder is never taken for a committed step.
    std::error_code error;
    std::filesystem::remove(steps[i].path / "manifest.json", error);
    std::filesystem::remove_all(steps[i].path, error);
    if (error)
      log::warning("checkpoint", "cannot remove {}: {}", steps[i].path.string(), error.message());
  }
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename().string();
    const bool partial = name.size() > 8 && name.ends_with(".partial");
    const bool headless =
        step_of_folder(name) && !std::filesystem::exists(entry.path() / "manifest.json");
    std::error_code ignored;
    if (partial || headless) std::filesystem::remove_all(entry.path(), ignored);
  }
}

}  // namespace capstan::checkpoint
