#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# One optimizer step of the same Llama in Capstan and in PyTorch eager, in turn on the same threads; prints tokens/s, the
# ratio of medians, the median of the ratios of the rounds, and what share of the rate of matrix products, measured between our
# steps, a step reaches (its FLOPs by the causal count).
#
#   tools/bench/cpu_step.sh [--dtype fp32|bf16] [--model 32m|124m] [--threads N] [--rounds N] [--steps N]
#
# 32m: vocabulary 8192, hidden 512, ffn 1408, 8 layers, 8 heads, 4 KV heads, untied, sequence 512, batch 4.
# 124m, of the size of GPT-2: vocabulary 50304, hidden 768, ffn 2048, 12 layers, 12 heads, 12 KV heads, untied, sequence 1024, batch 1.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
dtype=fp32 model=32m threads=$(nproc) rounds=3 steps=4
while [ $# -gt 0 ]; do
  case "$1" in
    --dtype | --model | --threads | --rounds | --steps) declare "${1#--}=$2"; shift 2 ;;
    *) sed -n '5,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
  esac
done
case "$model" in # hidden ffn layers heads kv_heads vocabulary sequence batch
  32m) shape="512 1408 8 8 4 8192 512 4" ;;
  124m) shape="768 2048 12 12 12 50304 1024 1" ;;
  *) echo "cpu_step.sh: --model: got '$model', need 32m or 124m" >&2; exit 2 ;;
esac
build=${CAPSTAN_BUILD_DIR:-$root/build/release}
cache=${CAPSTAN_CACHE_DIR:-$root/.cache}
cmake -S "$root" -B "$build" -DCAPSTAN_BUILD_BENCH=ON > "$cache/bench.log" && cmake --build "$build" --target cpu_step >> "$cache/bench.log"

# The peer has its own virtual environment with the full PyTorch package of the same version (about 3 GB).
venv="$cache/bench-venv"
if ! "$venv/bin/python" -c 'import torch, transformers' 2> "$cache/bench-venv.log"; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy transformers
fi
export GOMP_SPINCOUNT=1000 OMP_NUM_THREADS=$threads
# shellcheck disable=SC2086  # shape: one word per number
ours() { "$build/tools/bench/cpu_step" "$dtype" "$threads" "$steps" $shape; }
# shellcheck disable=SC2086
peer() { "$venv/bin/python" "$root/tools/bench/cpu_step_peer.py" "$dtype" "$threads" "$steps" $shape; }

results=$(mktemp)
trap 'rm -f "$results"' EXIT
for round in $(seq "$rounds"); do
  echo "round $round of $rounds" >&2
  { printf 'ours '; ours; printf 'peer '; peer; } >> "$results"
done
python3 - "$results" "$dtype" "$threads" "$model" <<'PY'
import json
import statistics
import sys

rows = {"ours": [], "peer": []}
for line in open(sys.argv[1]):
    who, text = line.split(" ", 1)
    rows[who].append(json.loads(text))
print(f"{sys.argv[4]}, {sys.argv[2]}, {sys.argv[3]} threads, {len(rows['ours'])} rounds in turn")
print(f"{'':14}{'tokens/s':>10}{'best':>9}{'first step s':>14}{'peak RSS MB':>13}")
figures = {}
for who, runs in rows.items():
    tokens = runs[0]["tokens_per_step"]
    speed = [tokens / statistics.median(r["step_ms"]) * 1e3 for r in runs]
    best = max(tokens / min(r["step_ms"]) * 1e3 for r in runs)
    figures[who] = (statistics.median(speed), statistics.median(r["first_step_s"] for r in runs), max(r["peak_rss_mb"] for r in runs))
    print(f"{'capstan' if who == 'ours' else 'pytorch eager':14}{figures[who][0]:10.0f}{best:9.0f}{figures[who][1]:14.2f}{figures[who][2]:13.0f}")
a, b = figures["ours"], figures["peer"]
print(f"{'ratio':14}{a[0] / b[0]:10.2f}{'':9}{a[1] / b[1]:14.2f}{a[2] / b[2]:13.2f}")
paired = [statistics.median(q["step_ms"]) / statistics.median(p["step_ms"]) for p, q in zip(rows["ours"], rows["peer"])]
print(f"{'by rounds':14}{statistics.median(paired):10.2f}   ({', '.join(f'{r:.2f}' for r in paired)})")
for name, text in (("own_gflops", "products of this model's shapes"), ("square_gflops", "products of 2048 x 2048 matrices")):
    share = [r["gflop_per_step"] / statistics.median(r["step_ms"]) * 1e3 / statistics.median(r[name]) for r in rows["ours"]]
    rate = statistics.median(x for r in rows["ours"] for x in r[name])
    best = max(r["gflop_per_step"] / min(r["step_ms"]) * 1e3 for r in rows["ours"]) / max(x for r in rows["ours"] for x in r[name])
    print(f"capstan reaches {100 * statistics.median(share):.0f} % of {text} ({rate:.0f} GFLOP/s), best step against best product {100 * best:.0f} %")
PY
