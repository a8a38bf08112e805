#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# What layouts cost on this machine: two ranks with half of the threads each against one rank with all of them, the same global
# step, in turn; and what the engine adds to the blocks' own work. Prints tokens/s, the median of the pairs' ratios and its bar.
#
#   tools/bench/layouts.sh [--threads N] [--rounds N] [--steps N] [--ranks threads|processes|both] [--cases "dp2 zero3 tp2 pp2 overhead"]
#
# Model: vocabulary 4096, hidden 512, ffn 1408, 6 layers, 8 heads, 4 KV heads, untied, sequence 256, 8 samples a step, fp32.
# pp2 runs 8 micro-batches by 1f1b; its bar is a part of what the simulated schedule allows. Overhead: a tiny model, one thread.
# Leave the machine alone meanwhile.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
threads=$(nproc) rounds=5 steps=3 ranks=threads cases="dp2 zero3 tp2 pp2 overhead"
while [ $# -gt 0 ]; do
  case "$1" in
    --threads | --rounds | --steps | --ranks | --cases) declare "${1#--}=$2"; shift 2 ;;
    *) sed -n '5,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
  esac
done
build=${CAPSTAN_BUILD_DIR:-$root/build/release}
cache=${CAPSTAN_CACHE_DIR:-$root/.cache}
cmake -S "$root" -B "$build" -DCAPSTAN_BUILD_BENCH=ON > "$cache/bench.log" && cmake --build "$build" --target layouts >> "$cache/bench.log"
program="$build/tools/bench/layouts"
export GOMP_SPINCOUNT=1000

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
run_processes() {
  local port peer
  port=$(free_port)
  export WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT="$port"
  RANK=1 LOCAL_RANK=1 "$program" processes "$@" &
  peer=$!
  RANK=0 LOCAL_RANK=0 "$program" processes "$@"
  wait "$peer"
}

results=$(mktemp)
trap 'rm -f "$results"' EXIT
for name in $cases; do
  for kind in threads processes; do
    if [ "$ranks" != both ] && [ "$ranks" != "$kind" ] && [ "$name" != overhead ]; then continue; fi
    if [ "$name" = overhead ] && [ "$kind" = processes ]; then continue; fi # it has one rank
    echo "$name, ranks as $kind" >&2
    if [ "$name" = overhead ]; then
      "$program" threads overhead "$rounds" 20 1 >> "$results"
    elif [ "$kind" = threads ]; then
      "$program" threads "$name" "$rounds" "$steps" "$threads" >> "$results"
    else
      run_processes "$name" "$rounds" "$steps" "$threads" >> "$results"
    fi
  done
done
python3 - "$results" "$threads" "$rounds" "$steps" <<'PY'
import json
import statistics
import sys

BARS = {"dp2": 0.90, "zero3": 0.90, "tp2": 0.80, "pp2": 0.85}
OVERHEAD_MS = 0.3
print(f"{sys.argv[2]} threads in all, {sys.argv[3]} rounds of {sys.argv[4]} steps, medians")
print(f"{'case':10}{'ranks':12}{'one rank tok/s':>16}{'two ranks tok/s':>17}{'ratio':>8}{'spread':>14}{'bar':>7}")
for row in map(json.loads, open(sys.argv[1])):
    if row["case"] == "overhead":
        added = [a - b for a, b in zip(row["engine_ms"], row["hand_ms"])]
        q = statistics.quantiles(added, n=4) if len(added) > 1 else added * 3
        print(f"engine adds {statistics.median(added):.3f} ms a micro-batch (quartiles {q[0]:.3f} to {q[2]:.3f}, bar {OVERHEAD_MS}) to "
              f"{statistics.median(row['hand_ms']):.3f} ms of the blocks")
        continue
    ratios = [a / b for a, b in zip(row["base_ms"], row["ms"])]
    speed = [row["tokens"] / statistics.median(row[side]) * 1e3 for side in ("base_ms", "ms")]
    bar = BARS[row["case"]] * row["ideal"]
    note = f"  ({BARS[row['case']]:.2f} of {row['ideal']:.3f}, the schedule's ideal)" if row["ideal"] < 0.9999 else ""
    print(f"{row['case']:10}{row['ranks']:12}{speed[0]:16.0f}{speed[1]:17.0f}{statistics.median(ratios):8.3f}"
          f"{min(ratios):8.2f} -{max(ratios):5.2f}{bar:7.3f}{note}")
PY
