#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# Runs clang-tidy by .clang-tidy, from a tree without precompiled headers: it cannot read those of g++. Ends with 1 if it finds anything.
#
#   tools/tidy.sh [FILE...]     without files: every source in src and tools
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
case "${1:-}" in -*) sed -n '5,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;; esac
"$root/tools/setup.sh" --groups "build lint" --no-build
cmake -S "$root" -B "$root/build/tidy" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON \
  -DCAPSTAN_BUILD_TESTS=OFF > /dev/null
[ $# -gt 0 ] || { cd "$root"; mapfile -t files < <(git ls-files 'src/*.cpp' 'tools/capstan/*.cpp' | grep -v '^src/cuda/'); set -- "${files[@]}"; }
printf '%s\0' "$@" | xargs -0 -n 1 -P "${CAPSTAN_JOBS:-$(nproc)}" clang-tidy-14 -p "$root/build/tidy" --quiet 2> /dev/null
