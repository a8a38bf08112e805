#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# Installs what is missing and builds: packages, LibTorch, configure, build. Used by tools/quickstart.sh and tools/test.sh.
#
#   tools/setup.sh [--groups "build test"] [--preset release] [--targets "capstan_cli capstan_run"]
#                  [--torch DIR] [--wheels DIR] [--no-build]
#
# Environment: CAPSTAN_JOBS (compile jobs), CAPSTAN_CACHE_DIR (default .cache), CAPSTAN_DEPS_DIR (default .deps),
# CAPSTAN_BUILD_DIR (default build/<preset>).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
groups="build"
preset="release"
targets=""
torch_dir=""
wheels_dir=""
build=1

say() { printf '[setup] %s\n' "$*" >&2; }
fail() {  # exit code, message
  printf '[setup] error: %s\n' "$2" >&2
  exit "$1"
}
usage() { sed -n '5,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
  case "$1" in
    --groups | --preset | --targets | --torch | --wheels)
      [ $# -ge 2 ] || fail 2 "$1 needs a value; see tools/setup.sh --help"
      case "$1" in
        --groups) groups=$2 ;;
        --preset) preset=$2 ;;
        --targets) targets=$2 ;;
        --torch) torch_dir=$2 ;;
        --wheels) wheels_dir=$2 ;;
      esac
      shift 2
      ;;
    --no-build) build=0; shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail 2 "unknown argument '$1'; see tools/setup.sh --help" ;;
  esac
done

deps=${CAPSTAN_DEPS_DIR:-$root/.deps}
cache=${CAPSTAN_CACHE_DIR:-$root/.cache}
build_dir=${CAPSTAN_BUILD_DIR:-$root/build/$preset}
deps=$(realpath -m "$deps") cache=$(realpath -m "$cache") build_dir=$(realpath -m "$build_dir")
torch_version=2.11.0
torch_wheels=("torch==$torch_version" "nvidia-cuda-runtime==13.0.96" "nvidia-cuda-cupti==13.0.85")
cuda_wheels=("cuda-toolkit[cublas,cufft,cufile,curand,cusolver,cusparse,nvjitlink]==13.0.2" "nvidia-cudnn-cu13==9.19.0.56"
  "nvidia-cusparselt-cu13==0.8.0" "nvidia-nccl-cu13==2.28.9" "nvidia-nvshmem-cu13==3.4.5")

is_debian_12() { [ -r /etc/os-release ] && (. /etc/os-release && [ "${ID:-}" = debian ] && [ "${VERSION_ID:-}" = 12 ]); }

packages_of() {  # groups -> package names, one a line
  local group
  for group in "$@"; do
    sed -n "s/^$group: //p" "$root/tools/packages.txt" | tr ' ' '\n'
  done
}

check_machine() {
  [ "$(uname -m)" = x86_64 ] || fail 2 "this machine is $(uname -m); Capstan is built and tested on x86_64 only"
  mkdir -p "$deps" "$cache" "$build_dir" 2>/dev/null ||
    fail 2 "cannot write to $root; use a writable checkout, or set CAPSTAN_DEPS_DIR, CAPSTAN_CACHE_DIR and CAPSTAN_BUILD_DIR"
}

check_disk() {  # only when something large is about to be written
  local free_kib
  free_kib=$(df -Pk "$deps" | awk 'NR == 2 { print $4 }')
  [ "$free_kib" -ge $((6 * 1024 * 1024)) ] ||
    fail 2 "only $((free_kib / 1024)) MiB are free in $deps, 6144 MiB are needed; free some, or set CAPSTAN_DEPS_DIR"
}

run_apt() {  # waits up to 300 s for the lock of another apt
  local deadline=$((SECONDS + 300)) log="$cache/apt.log"
  while true; do
    if LC_ALL=C "$@" > "$log" 2>&1; then return 0; fi
    if grep -q 'Could not get lock\|Unable to lock' "$log" && [ "$SECONDS" -lt "$deadline" ]; then
      say "another package manager holds the lock; waiting"
      sleep 3
    else
      tail -n 5 "$log" >&2
      return 1
    fi
  done
}

install_packages() {
  local wanted missing sudo=()
  # shellcheck disable=SC2086
  wanted=$(packages_of $groups)
  if ! is_debian_12; then
    say "this is not Debian 12: going on with what is installed. Needed: $(echo "$wanted" | tr '\n' ' ')"
    return
  fi
  # shellcheck disable=SC2086
  missing=$(comm -23 <(echo "$wanted" | sort -u) \
    <(dpkg-query -W -f='${db:Status-Abbrev} ${Package}\n' $wanted 2>/dev/null | awk '$1 == "ii" { print $2 }' | sort -u))
  [ -n "$missing" ] || return 0
  # shellcheck disable=SC2086
  set -- $missing
  if [ "$(id -u)" -ne 0 ]; then
    if sudo -n true 2>/dev/null; then
      sudo=(sudo -n)
    else
      fail 2 "packages are missing and need root: sudo apt-get update && sudo apt-get install -y --no-install-recommends $*"
    fi
  fi
  say "installing packages: $*"
  run_apt "${sudo[@]}" apt-get update || fail 1 "apt-get update failed (log: $cache/apt.log)"
  run_apt "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" ||
    fail 1 "apt-get install failed (log: $cache/apt.log)"
}

torch_inputs() { printf '%s\n' "${torch_wheels[@]}" | sha256sum | cut -d' ' -f1; }

torch_is_complete() {  # folder: what an install leaves, and the hash of what it was asked for
  local base=$1
  [ -f "$base/torch/lib/libtorch_cpu.so" ] && [ -f "$base/torch/lib/libc10.so" ] && [ -f "$base/torch/include/ATen/ATen.h" ] &&
    [ -f "$base/nvidia/cu13/lib/libcudart.so.13" ] && [ -f "$base/nvidia/cu13/lib/libcupti.so.13" ] &&
    [ "$(cat "$base/inputs.sha256" 2>/dev/null)" = "$(torch_inputs)" ]
}

unpack_wheels() {  # from, to
  local pattern file
  [ -d "$1" ] || fail 2 "--wheels $1: no such folder"
  for pattern in "torch-$torch_version" nvidia_cuda_runtime-13.0.96 nvidia_cuda_cupti-13.0.85; do
    file=$(find "$1" -maxdepth 1 -name "$pattern*.whl" | head -n 1)
    [ -n "$file" ] || fail 2 "no $pattern*.whl in $1; download it with: python3 -m pip download --no-deps ${torch_wheels[*]}"
    python3 -m zipfile -e "$file" "$2" || fail 1 "cannot unpack $file"
  done
}

install_torch() {
  if [ -n "$torch_dir" ]; then
    [ -f "$torch_dir/lib/libtorch_cpu.so" ] || fail 2 "--torch $torch_dir: no lib/libtorch_cpu.so there"
    torch_dir=$(cd "$torch_dir" && pwd -P)
    return
  fi
  local target="$deps/torch-$torch_version" partial="$deps/torch-$torch_version.partial"
  torch_dir="$target/torch"
  if torch_is_complete "$target"; then return; fi
  check_disk
  rm -rf "$partial" "$target"
  mkdir -p "$partial"
  if [ -n "$wheels_dir" ]; then
    say "unpacking LibTorch $torch_version from $wheels_dir"
    unpack_wheels "$wheels_dir" "$partial"
  else
    say "downloading LibTorch $torch_version (530 MB)"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile \
      --target "$partial" "${torch_wheels[@]}" > "$cache/pip.log" 2>&1 ||
      { tail -n 5 "$cache/pip.log" >&2; fail 1 "pip could not install ${torch_wheels[*]} (log: $cache/pip.log)"; }
  fi
  torch_inputs > "$partial/inputs.sha256"
  mv "$partial" "$target"
  torch_is_complete "$target" || fail 1 "LibTorch in $target is not complete; remove the folder and try again"
}

# The CUDA preset: what LibTorch's CUDA half loads, in the versions it names, beside it.
install_cuda_libraries() {
  local base="$deps/torch-$torch_version" wanted
  [ "$preset" = cuda ] && [ "$torch_dir" = "$base/torch" ] || return 0
  command -v nvcc > /dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
    fail 2 "the cuda preset needs nvcc 13.0: install the CUDA toolkit 13.0 and put its bin folder into PATH"
  wanted=$(printf '%s\n' "${cuda_wheels[@]}" | sha256sum | cut -d ' ' -f 1)
  [ "$(cat "$base/cuda.sha256" 2>/dev/null)" != "$wanted" ] || return 0
  local source=()
  if [ -n "$wheels_dir" ]; then
    say "unpacking the CUDA libraries of LibTorch $torch_version from $wheels_dir"
    source=(--no-index --find-links "$wheels_dir")
  else
    say "downloading the CUDA libraries of LibTorch $torch_version (1.8 GB)"
  fi
  rm -rf "$base/cuda.partial"
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-compile \
    --target "$base/cuda.partial" "${source[@]}" "${cuda_wheels[@]}" >> "$cache/pip.log" 2>&1 || {
    tail -n 5 "$cache/pip.log" >&2
    [ -z "$wheels_dir" ] || fail 2 "the CUDA libraries are not all in $wheels_dir; download them with: python3 -m pip download -d DIR ${cuda_wheels[*]}"
    fail 1 "pip could not install the CUDA libraries (log: $cache/pip.log)"
  }
  cp -an "$base/cuda.partial/nvidia/." "$base/nvidia/"
  rm -rf "$base/cuda.partial"
  printf '%s\n' "$wanted" > "$base/cuda.sha256"
}

count_jobs() {  # min(cores, memory / 2 GiB), at least 1
  local cores memory_gib jobs
  cores=$(nproc)
  memory_gib=$(awk '/MemTotal/ { print int($2 / 1048576) }' /proc/meminfo)
  jobs=$((memory_gib / 2))
  [ "$jobs" -lt "$cores" ] || jobs=$cores
  [ "$jobs" -ge 1 ] || jobs=1
  echo "${CAPSTAN_JOBS:-$jobs}"
}

# Tests also compile and link the plug-in for GPUs where nvcc 13.0, NCCL and cuBLASLt are; programs do not find it there.
checks_plugin() {
  case "$preset" in release | ci) ;; *) return 1 ;; esac
  command -v nvcc > /dev/null && nvcc --version | grep -q 'release 13\.0' || return 1
  local toolkit
  toolkit=$(dirname "$(dirname "$(realpath "$(command -v nvcc)")")")/include
  [ -f "$torch_dir/../nvidia/nccl/include/nccl.h" ] || [ -f "$toolkit/nccl.h" ] || return 1
  [ -f "$torch_dir/../nvidia/cu13/include/cublasLt.h" ] || [ -f "$toolkit/cublasLt.h" ]
}

build_tree() {
  export CCACHE_DIR="$cache/ccache" CCACHE_BASEDIR="$root" CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE=5G
  export CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
  local log="$cache/build-$preset.log" jobs
  jobs=$(count_jobs)
  case "$jobs" in '' | *[!0-9]* | 0) fail 2 "CAPSTAN_JOBS: got '$jobs', need a number from 1" ;; esac
  local options=("-DCAPSTAN_TORCH_DIR=$torch_dir")
  case " $groups " in *" test "*)
    options+=(-DCAPSTAN_BUILD_TESTS=ON)
    if checks_plugin; then options+=(-DCAPSTAN_WITH_CUDA=CHECK); fi ;;
  esac
  # Configure when there is no tree yet or when what it was configured for has changed; ninja itself notices changed CMake files.
  local wanted="$preset ${options[*]}"
  if [ ! -f "$build_dir/build.ninja" ] || [ "$(cat "$build_dir/configured-for" 2>/dev/null)" != "$wanted" ]; then
    say "configuring $build_dir"
    local fresh=()
    if [ ! -f "$build_dir/build.ninja" ]; then
      fresh=(-DCAPSTAN_UNITY=ON)
      case " $groups " in *" test "*) ;; *) fresh+=(-DCAPSTAN_BUILD_TESTS=OFF) ;; esac
    fi
    (cd "$root" && cmake --preset "$preset" -B "$build_dir" "${options[@]}" "${fresh[@]}") > "$log" 2>&1 ||
      { grep -A 8 'CMake Error' "$log" >&2 || tail -n 15 "$log" >&2; fail 1 "configuring failed (log: $log)"; }
    echo "$wanted" > "$build_dir/configured-for"
  fi
  local started=$SECONDS
  # shellcheck disable=SC2086
  cmake --build "$build_dir" --parallel "$jobs" ${targets:+--target $targets} > "$log" 2>&1 ||
    { grep -m 3 -A 12 'error:\|FAILED:' "$log" >&2 || tail -n 15 "$log" >&2; fail 1 "the build failed (log: $log)"; }
  if grep -q 'no work to do' "$log"; then return; fi
  say "built $build_dir with $jobs jobs in $((SECONDS - started)) s"
}

check_machine
install_packages
if [ "$build" = 1 ]; then
  install_torch
  install_cuda_libraries
  build_tree
fi
