#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# The installed program in a folder that nobody may write: from text to sample it writes only to the working directory.
# usage: read_only_test.sh BUILD_DIR
set -euo pipefail
build=$1
root=$(mktemp -d)
trap 'chmod -R u+w "$root"; rm -rf "$root"' EXIT
prefix="$root/read only" work="$root/work" home="$root/home" tmp="$root/tmp"
mkdir "$work" "$home" "$tmp"
cmake --install "$build" --prefix "$prefix" > "$root/install.log"
chmod -R a-w "$prefix"
list() { find "$@" -printf '%p %s %T@ %m\n' | sort; }
before=$(list "$prefix" "$home" "$tmp")

cd "$work"
export HOME=$home TMPDIR=$tmp
capstan="$prefix/bin/capstan"
for line in $(seq 1 600); do echo "what was read may be written again, row $((line % 7))"; done > my.txt
"$capstan" data tokenizer train --input my.txt --vocab-size 300 --output data/quickstart/tokenizer > /dev/null
"$capstan" data prepare --input my.txt --tokenizer data/quickstart/tokenizer --output data/quickstart/train > /dev/null
cp data/quickstart/train.bin data/quickstart/validation.bin
cp data/quickstart/train.idx data/quickstart/validation.idx
# The recipe of the installed tree, made small.
"$capstan" train "$prefix/share/capstan/configs/quickstart.yaml" --nproc 2 --set run.steps=3 --set lr_schedule.warmup=1 \
  --set model.hidden_size=32 --set model.intermediate_size=32 \
  --set model.num_hidden_layers=1 --set batch.sequence_length=16 --set eval.samples=2 > train.log 2>&1 || { cat train.log; exit 1; }
"$capstan" generate --model runs/quickstart --prompt "what was" --max-tokens 4 > sample.txt
[ -s sample.txt ] && [ -f runs/quickstart/checkpoints/step-00000003/manifest.json ]

after=$(list "$prefix" "$home" "$tmp")
if [ "$before" != "$after" ]; then
  echo "written outside the working directory:"
  diff <(echo "$before") <(echo "$after") || true
  exit 1
fi
echo "$(find "$work" -type f | wc -l) files, all in the working directory"
