#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# Loss of a small model trained in fp8 against bf16, each from several seeds, in each scaling, on the text of the quickstart
# (LibTorch's C++ headers). Prints the mean loss of the last 50 steps, its distance from bf16 of the same seed, that of bf16 with
# its sums in another order, the mean of the distances and the spread of the bf16 seeds; fails when a scaling is off by more than
# 0.5 % in the mean of the seeds or that mean lies outside of the spread.
#
#   tools/bench/fp8_loss.sh [--steps N] [--seeds "1 2 3"] [--scalings "tensor row delayed"] [--gradients e5m2] [--samples 16] [--work DIR]
#
# Model: vocabulary 4096, hidden 256, ffn 704, 4 layers, 4 heads, 2 KV heads, tied, sequence 128, cosine from 1e-3. Runs
# that are finished are not run again: another call with the same --work goes on.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
steps=500 seeds="1 2 3" scalings="tensor row delayed" gradients=e5m2 samples=16 work=
while [ $# -gt 0 ]; do
  case "$1" in
    --steps | --seeds | --scalings | --gradients | --samples | --work) declare "${1#--}=$2"; shift 2 ;;
    *) sed -n '5,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
  esac
done
capstan=${CAPSTAN_BUILD_DIR:-$root/build/release}/bin/capstan
work=${work:-$root/runs/fp8-loss}
torch=$(sed -n 's/^CAPSTAN_TORCH_DIR:[A-Z]*=//p' "$(dirname "$capstan")/../CMakeCache.txt")
export GOMP_SPINCOUNT=1000
mkdir -p "$work" && cd "$work"

corpus=(--input "$torch/include" --include '*.h' --include '*.hpp' --include '*.cuh' --exclude 'ATen/ops/**' --exclude 'google/**'
  --max-file-size 512KiB --deduplicate)
if [ ! -e data/done ]; then
  "$capstan" data tokenizer train "${corpus[@]}" --vocab-size 4096 --output data/tokenizer > data.log
  "$capstan" data prepare "${corpus[@]}" --tokenizer data/tokenizer --output data/train >> data.log
  touch data/done
fi
cat > recipe.yaml <<YAML
version: 1
run: {name: fp8-loss, steps: $steps, device: cpu}
model: {vocab_size: auto, hidden_size: 256, intermediate_size: 704, num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2,
  tie_word_embeddings: true}
data: {tokenizer: data/tokenizer, train: [{path: data/train}]}
batch: {global_samples: $samples, micro_samples: $samples, sequence_length: 128}
optimizer: {lr: 1.0e-3}
lr_schedule: {kind: cosine, warmup: 50}
precision: {compute: bf16}
checkpoint: {interval_steps: none}
metrics: {interval_steps: 1, tensorboard: false}
YAML

train() { # NAME SET...
  local name=$1 sets=() pair
  shift
  for pair in "$@"; do sets+=(--set "$pair"); done
  echo "$name" >&2
  "$capstan" train recipe.yaml --set "run.name=$name" "${sets[@]}" > "$name.log" 2>&1 || { tail -n 5 "$name.log" >&2; exit 1; }
}
for seed in $seeds; do train "bf16-$seed" "run.seed=$seed"; done
first=${seeds%% *}
train bf16-order "run.seed=$first" "batch.micro_samples=$((samples / 4))"
for scaling in $scalings; do
  for seed in $seeds; do
    train "$scaling-$gradients-$seed" "run.seed=$seed" "precision.fp8.scaling=$scaling" "precision.fp8.gradients=$gradients"
  done
done
python3 - "$first" "$gradients" "$seeds" "$scalings" <<'PY'
import json
import sys

first, gradients, seeds, scalings = sys.argv[1], sys.argv[2], sys.argv[3].split(), sys.argv[4].split()
LAST, BAR = 50, 0.5


def steps_of(name):
    with open(f"runs/{name}/metrics.jsonl") as lines:
        steps = [x for x in map(json.loads, lines) if x["kind"] == "step"]
    last = steps[-LAST:]
    times = sorted(x["step_ms"] for x in steps)
    return sum(x["loss"] for x in last) / len(last), times[len(times) // 2], sum(x["skipped"] is not None for x in steps)


bf16 = {seed: steps_of(f"bf16-{seed}") for seed in seeds}
low, high = min(x[0] for x in bf16.values()), max(x[0] for x in bf16.values())
base = bf16[first][0]
print(f"| Run | mean loss of the last {LAST} steps | against bf16 of the seed | median ms/step | skipped |\n|---|---|---|---|---|")
for seed, (loss, ms, skipped) in bf16.items():
    print(f"| bf16, seed {seed} | {loss:.4f} | | {ms:.0f} | {skipped} |")
loss, ms, skipped = steps_of("bf16-order")
print(f"| bf16, seed {first}, 4 micro-batches | {loss:.4f} | {100 * (loss / base - 1):+.2f} % | {ms:.0f} | {skipped} |")
failed = False
means = []
for scaling in scalings:
    losses, distances = [], []
    for seed in seeds:
        loss, ms, skipped = steps_of(f"{scaling}-{gradients}-{seed}")
        losses.append(loss)
        distances.append(100 * (loss / bf16[seed][0] - 1))
        print(f"| fp8 {scaling}, gradients {gradients}, seed {seed} | {loss:.4f} | {distances[-1]:+.2f} % | {ms:.0f} | {skipped} |")
    loss, off = sum(losses) / len(losses), sum(distances) / len(distances)
    means.append(f"fp8 {scaling}, mean of {len(seeds)} seeds: {loss:.4f}, {off:+.2f} % of bf16")
    failed |= abs(off) > BAR or not low <= loss <= high
print("\n" + "\n".join(means))
print(f"Spread of the bf16 seeds: {low:.4f} to {high:.4f} ({100 * (high / low - 1):.2f} %). Bar: {BAR} % of bf16 and within the spread.")
sys.exit(failed)
PY
