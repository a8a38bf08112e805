// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// `capstan checkpoint inspect|verify`.
#include <fmt/format.h>

#include <map>

#include "capstan/base/bytes.h"
#include "capstan/base/json.h"
#include "capstan/checkpoint/load.h"
#include "verbs.h"

namespace capstan::cli {
namespace {

struct CheckpointArguments {
  std::string directory;
  bool json = false;
};

// A step folder itself, or the newest step of a run, good or not.
checkpoint::FoundStep open_unverified(const std::string& directory) {
  Path path = directory;
  const std::vector<checkpoint::CommittedStep> steps = checkpoint::list_steps(path / "checkpoints");
  if (!steps.empty()) path = steps.front().path;
  if (std::filesystem::exists(path / "manifest.json"))
    return {path, checkpoint::parse_manifest(read_file(path / "manifest.json"),
                                             (path / "manifest.json").string())};
  return checkpoint::open_model_directory(path, checkpoint::Verify::kFast);
}

void print_json(const checkpoint::FoundStep& step) {
  const std::string text = checkpoint::to_text(step.manifest);
  fmt::print("{}", text.substr(0, text.rfind("#xxh3:")));
}

void inspect(const CheckpointArguments& arguments) {
  const checkpoint::FoundStep step = open_unverified(arguments.directory);
  if (arguments.json) return print_json(step);
  const checkpoint::Manifest& m = step.manifest;
  fmt::print("{}\n  step {}, written {}\n  recipe identity {}\n", step.path.string(), m.step,
             m.created, m.recipe_identity);
  for (const auto& [key, value] : m.layout) fmt::print("  {}: {}\n", key, value);
  fmt::print("files\n");
  for (const checkpoint::StoredFile& f : m.files)
    fmt::print("  {:<40} {:>12}  {}\n", f.name, format_bytes(f.bytes), f.xxh3);
  std::map<std::string, std::pair<int64_t, int64_t>> kinds;  // tensors, elements
  for (const checkpoint::StoredTensor& t : m.tensors) {
    ++kinds[t.kind].first;
    kinds[t.kind].second += t.box.numel();
  }
  fmt::print("state\n");
  for (const auto& [kind, counts] : kinds)
    fmt::print("  {:<24} {:>5} tensors, {} elements\n", kind, counts.first,
               format_count(counts.second));
  fmt::print("model tensors\n");
  for (const checkpoint::StoredTensor& t : m.tensors)
    if (t.kind == "model")
      fmt::print("  {:<52} {:<5} [{}]  {}\n", t.stored_as, name_of(t.dtype),
                 fmt::join(t.box.extent, ", "), t.file);
}

void verify(const CheckpointArguments& arguments) {
  const checkpoint::FoundStep step = open_unverified(arguments.directory);
  checkpoint::SoloGroup solo;
  const checkpoint::Manifest manifest =
      checkpoint::verify_step(step.path, checkpoint::Verify::kFull, solo);
  int64_t bytes = 0;
  for (const checkpoint::StoredFile& f : manifest.files) bytes += f.bytes;
  fmt::print("{}: {} files, {}, all hashes match\n", step.path.string(), manifest.files.size(),
             format_bytes(bytes));
}

}  // namespace

void add_checkpoint(CLI::App& app) {
  CLI::App* verb = app.add_subcommand("checkpoint", "look into checkpoints and verify them");
  verb->require_subcommand(1);
  auto arguments = std::make_shared<CheckpointArguments>();
  CLI::App* inspect_verb = verb->add_subcommand("inspect", "step, layout, files and tensors");
  CLI::App* verify_verb = verb->add_subcommand(
      "verify", "read everything and compare all hashes; exit code 94 when damaged");
  for (CLI::App* sub : {inspect_verb, verify_verb})
    sub->add_option("DIR", arguments->directory, "a run directory (newest step) or a step-* folder")
        ->required();
  inspect_verb->add_flag("--json", arguments->json, "the manifest as JSON");
  inspect_verb->footer("Example:\n  capstan checkpoint inspect runs/quickstart");
  verify_verb->footer(
      "Example:\n  capstan checkpoint verify runs/quickstart/checkpoints/step-00000300");
  inspect_verb->callback([arguments] { inspect(*arguments); });
  verify_verb->callback([arguments] { verify(*arguments); });
}

}  // namespace capstan::cli
