#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# From a fresh Debian 12 to a trained language model: installs what is missing, builds, then runs only capstan commands.
# Corpus: LibTorch's own C++ headers, which the build needs anyway.
#
#   tools/quickstart.sh [--torch DIR] [--wheels DIR]
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
case "${1:-}" in -h | --help) sed -n '5,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
"$root/tools/setup.sh" --groups build --targets "capstan_cli capstan_run" "$@"

build_dir=$(realpath -m "${CAPSTAN_BUILD_DIR:-$root/build/release}")
work=${CAPSTAN_WORK_DIR:-$root}
mkdir -p "$work" && cd "$work"
capstan="$build_dir/bin/capstan"
torch=$(sed -n 's/^CAPSTAN_TORCH_ROOT:INTERNAL=//p' "$build_dir/CMakeCache.txt")

run() {
  printf '\n$ capstan %s\n' "$(printf '%q ' "$@")"
  "$capstan" "$@" || { code=$?; printf "[quickstart] error: 'capstan %s' ended with code %s\n" "$1" "$code" >&2; exit "$code"; }
}

# The first free run: runs/quickstart, runs/quickstart-2, ...
name=quickstart
number=1
while [ -e "runs/$name" ]; do
  number=$((number + 1))
  name=quickstart-$number
done

corpus=(--input "$torch/include" --include '*.h' --include '*.hpp' --include '*.cuh' --exclude 'ATen/ops/**' --exclude 'google/**'
  --max-file-size 512KiB --deduplicate)
run data tokenizer train "${corpus[@]}" --vocab-size 8192 --output data/quickstart/tokenizer
run data prepare "${corpus[@]}" --tokenizer data/quickstart/tokenizer --output data/quickstart/train \
  --validation-output data/quickstart/validation --validation-fraction 0.02
run train quickstart --nproc 2 --set "run.name=$name"
run eval --model "runs/$name" --data data/quickstart/validation --unigram data/quickstart/train --minimum-gain 0.8
run generate --model "runs/$name" --prompt "#include <vector>" --max-tokens 80 --temperature 0.8 --top-p 0.95 --seed 1

cat <<TEXT

Done.
  checkpoint   $PWD/runs/$name/checkpoints
  metrics      $PWD/runs/$name/metrics.jsonl  (tensorboard --logdir "$PWD/runs/$name/tensorboard")
  tokenizer    $PWD/data/quickstart/tokenizer

To have the command at hand:
  export PATH="$(dirname "$capstan"):\$PATH"

Try next:
  capstan plan quickstart                               what one rank computes and needs
  capstan recipe show quickstart | head                 every setting and where it comes from
  capstan generate --model runs/$name --prompt "namespace "
  docs/quickstart.md                                    your own text, from raw file to sample in four commands
TEXT
