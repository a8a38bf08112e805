#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# One optimizer step of the same model in Capstan, PyTorch eager and torch.compile, in turn on one GPU: tokens/s, MFU, memory.
#
#   tools/bench/gpu_step.sh [--model NAME] [--dtype bf16|fp8] [--graphs] [--micro-batches 4,8,16,32] [--tokens 524288]
#     [--peers eager,compile|none] [--states fp32|low] [--moments auto|bf16|int8] [--gemm auto|libtorch|cublaslt]
#     [--recompute none|block] [--rounds N] [--steps N] [--device cuda|cpu] [--trace] [--out DIR] [--no-build]
#
# --help lists the models and says what is measured. --no-build uses the program as it is in CAPSTAN_BUILD_DIR (default
# build/cuda, with --device cpu build/release). Peers run in CAPSTAN_BENCH_PYTHON, default a virtual environment made here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
preset=cuda builds=1 peers=eager,compile
arguments=("$@")
for ((i = 0; i < $#; ++i)); do
  case "${arguments[i]}" in
    --device) [ "${arguments[i + 1]:-}" != cpu ] || preset=release ;;
    --peers) peers=${arguments[i + 1]:-} ;;
    --no-build) builds=0; unset 'arguments[i]' ;;
    -h | --help) exec python3 "$root/tools/bench/gpu_step.py" --help ;;
  esac
done
build=${CAPSTAN_BUILD_DIR:-$root/build/$preset}
cache=${CAPSTAN_CACHE_DIR:-$root/.cache}
if [ "$builds" = 1 ]; then
  cmake -S "$root" -B "$build" -DCAPSTAN_BUILD_BENCH=ON > "$cache/bench.log"
  cmake --build "$build" --target gpu_step >> "$cache/bench.log"
fi
# The peer has its own virtual environment with the full PyTorch package of the same version (about 3 GB).
python=${CAPSTAN_BENCH_PYTHON:-$cache/bench-venv/bin/python}
if [ "$peers" != none ] && ! "$python" -c 'import torch, transformers' 2> "$cache/bench-venv.log"; then
  if [ -n "${CAPSTAN_BENCH_PYTHON:-}" ]; then
    echo "gpu_step.sh: CAPSTAN_BENCH_PYTHON: got $python, which has no torch and transformers; need both, or --peers none" >&2
    exit 2
  fi
  python3 -m venv "$cache/bench-venv"
  "$cache/bench-venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy transformers
fi
export GOMP_SPINCOUNT=1000
exec python3 "$root/tools/bench/gpu_step.py" --program "$build/tools/bench/gpu_step" --python "$python" "${arguments[@]}"
