#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# Fuzzes a parser with libFuzzer, AddressSanitizer and UBSan. Inputs that were found lie in build/fuzz/found/<parser>.
#
#   tools/fuzz.sh recipe|idx|tokenizer|safetensors MINUTES
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
parser=${1:-} minutes=${2:-}
case "$parser" in recipe | idx | tokenizer | safetensors) ;; *) sed -n '5,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;; esac
case "$minutes" in '' | *[!0-9]* | 0*) echo "[fuzz] error: MINUTES: got '$minutes', need a number from 1" >&2; exit 2 ;; esac
"$root/tools/setup.sh" --groups "build fuzz" --no-build
build=$root/build/fuzz
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=clang++-14 -DCMAKE_C_COMPILER=clang-14 \
  -DCAPSTAN_BUILD_FUZZERS=ON -DCAPSTAN_BUILD_TESTS=ON -DCAPSTAN_BUILD_TOOLS=OFF -DCAPSTAN_BUILD_EXAMPLES=OFF -DCAPSTAN_SANITIZE=fuzzer-no-link,address,undefined \
  "-DCAPSTAN_MODULES=base;text;recipe;plan;data" > /dev/null
cmake --build "$build" --parallel "${CAPSTAN_JOBS:-$(nproc)}" --target "${parser}_fuzzer"
found=$build/found/$parser
mkdir -p "$found"
exec "$build/fuzz/${parser}_fuzzer" -max_total_time=$((minutes * 60)) -artifact_prefix="$found/" -timeout=10 -rss_limit_mb=4096 -max_len=65536 "$found"
