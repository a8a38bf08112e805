#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
# Usage: tools/bench/tokenizer/run.sh BENCH_TOKENIZER [PYTHON] [MEGABYTES]
# Trains 8192 tokens on a seeded corpus and encodes it, with the program given and with the `tokenizers`
# package of PYTHON, and prints both beside each other.
set -euo pipefail
bench=${1:?usage: run.sh BENCH_TOKENIZER [PYTHON] [MEGABYTES]}
python=${2:-python3}
megabytes=${3:-50}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 "$here/make_corpus.py" "$work/corpus.txt" "$megabytes"
ours_train=$("$bench" train "$work/corpus.txt" 8192 2 "$work/tokenizer")
ours_encode=$("$bench" encode "$work/corpus.txt" "$work/tokenizer")
echo "capstan:    $ours_train $ours_encode"
if "$python" -c 'import tokenizers' 2>/dev/null; then
  theirs=$(RAYON_NUM_THREADS=2 "$python" "$here/peer.py" "$work/corpus.txt" "$work/tokenizer/tokenizer.json")
  echo "tokenizers: $theirs"
else
  echo "tokenizers: not installed for $python (pip install tokenizers)"
fi
