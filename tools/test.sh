#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# Sets up what is missing, builds and runs the tests; ends with ctest's closing line and exit code.
#
#   tools/test.sh [--preset P] [--label L] [-R REGEX] [--torch DIR] [--wheels DIR]
#
# Without --label every test runs but those labelled slow, gpu or bench; benchmarks run with --label bench alone.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
preset=release
setup=()
selection=(-LE 'slow|gpu|bench')
while [ $# -gt 0 ]; do
  case "$1" in
    --preset | --label | -R | --torch | --wheels)
      [ $# -ge 2 ] || { echo "[test] error: $1 needs a value" >&2; exit 2; }
      case "$1" in
        --preset) preset=$2 ;;
        --label)
          selection=(-L "^($2)\$")
          [ "$2" = bench ] || selection+=(-LE '^bench$')
          ;;
        -R) selection+=(-R "$2") ;;
        *) setup+=("$1" "$2") ;;
      esac
      shift 2
      ;;
    -h | --help) sed -n '5,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "[test] error: unknown argument '$1'; see tools/test.sh --help" >&2; exit 2 ;;
  esac
done

"$root/tools/setup.sh" --groups "build test" --preset "$preset" "${setup[@]}"

build_dir=$(realpath -m "${CAPSTAN_BUILD_DIR:-$root/build/$preset}")
case "$preset" in
  asan)  # tests ask for more memory than there is, and want an exception for it
    export ASAN_OPTIONS=detect_odr_violation=0:detect_leaks=0:allocator_may_return_null=1
    export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
    ;;
  tsan) export TSAN_OPTIONS="suppressions=$root/tests/tsan.supp:ignore_noninstrumented_modules=1" ;;
esac
cd "$build_dir"
exec ctest --output-on-failure --no-tests=error -j "$(nproc)" "${selection[@]}"
