#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# Makes a folder to carry to machines that have a PyTorch 2.11 (or LibTorch) and none of our packages: programs, libraries,
# recipes, the CUDA plug-in if the build has it.
#
#   tools/bundle.sh [--build DIR] [--tests] OUT
#
# --build   the build tree (default $CAPSTAN_BUILD_DIR, or build/release)
# --tests   with the tests that need a GPU and the programs of tools/bench, in OUT/test-bin and OUT/bench
#
# There: source OUT/env.sh, then capstan doctor. env.sh takes LibTorch from CAPSTAN_TORCH (the folder that holds lib), else that of
# python3's torch.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
usage() { sed -n '5,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit "$1"; }
build=${CAPSTAN_BUILD_DIR:-$root/build/release} with_tests=0 out=
while [ $# -gt 0 ]; do
  case "$1" in
    --build) [ $# -ge 2 ] || usage 2; build=$2; shift 2 ;;
    --tests) with_tests=1; shift ;;
    -h | --help) usage 0 ;;
    -*) usage 2 ;;
    *) [ -z "$out" ] || usage 2; out=$1; shift ;;
  esac
done
[ -n "$out" ] || usage 2
[ -x "$build/bin/capstan" ] || { echo "bundle.sh: --build: got $build without bin/capstan, need a build tree. Run tools/setup.sh" >&2; exit 2; }
[ ! -e "$out" ] || { echo "bundle.sh: $out exists, need a new folder. Remove it or name another one" >&2; exit 2; }

cmake --install "$build" --prefix "$out" > /dev/null
rm -rf "$out/include" "$out/lib/cmake"
if [ "$with_tests" = 1 ]; then
  mkdir "$out/test-bin" "$out/bench"
  for program in "$build"/test-bin/capstan_{*_gpu,process_layouts,comm_ranks}_test; do
    [ ! -x "$program" ] || cp "$program" "$out/test-bin/"
  done
  for program in "$build"/tools/bench/{gpu_step,products,cpu_step,cpu_products,capstan_kernels_bench}; do
    [ ! -x "$program" ] || cp "$program" "$out/bench/"
  done
fi
programs() { find "$out" -type f \( -perm -u+x -o -name '*.so*' \) ! -name '*.yaml' ! -name '*.sh'; }
# What packages of Debian brought: everything that is found but the C and C++ run time and what lies beside LibTorch.
programs | LD_LIBRARY_PATH="$out/lib" xargs -d '\n' ldd 2> /dev/null |
  awk '$3 ~ /^\/(usr\/)?lib\// && $1 !~ /^(ld-linux|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp|cuda|nvidia-ml)\.)/ {print $3}' | sort -u |
  while read -r library; do cp -L "$library" "$out/lib/"; done
programs | xargs -d '\n' strip --strip-unneeded
cat > "$out/env.sh" << 'ENV'
# Source this: capstan finds its libraries and LibTorch.
_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
_torch=${CAPSTAN_TORCH:-$(python3 -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])' 2> /dev/null)}
if [ ! -e "$_torch/lib/libtorch_cpu.so" ]; then
  echo "env.sh: no LibTorch in '$_torch'. Set CAPSTAN_TORCH to the folder of PyTorch 2.11 that holds lib" >&2
  return 1
fi
# Before what is there already: the driver of a GPU may be found by that.
export LD_LIBRARY_PATH=$_here/lib:$_torch/lib:$_torch/../nvidia/cu13/lib:$_torch/../nvidia/nccl/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PATH=$_here/bin:$PATH CAPSTAN=$_here/bin/capstan
unset _here _torch
ENV
echo "$out: $(du -sh "$out" | cut -f1). There: source $(basename "$out")/env.sh && capstan doctor"
