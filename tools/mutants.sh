#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# Shows that the equivalence tests can fail: applies every fault of tests/mutants to a copy of the sources, one at a
# time, and expects the tests to notice. Ends with 1 if one survives or no longer applies.
#
#   tools/mutants.sh [NAME...] [--keep] [--write-docs] [--list]
#
# NAME        a fault, or how its name begins (default: all)
# --keep      keep the output of the tests in build/mutants/log/NAME.txt
# --write-docs  write the table to docs/mutants.md; only with all faults
# --list      print the names and what is broken, run nothing
#
# A fault counts as caught when a test program reports a failure by itself. Ranks that wait for each other are
# reported by their deadlines; a program that dies or has to be killed counts as survived. What the pairwise layouts
# do not notice meets all 300 before it is called a survivor.
# Environment: CAPSTAN_JOBS (compile jobs), CAPSTAN_CACHE_DIR (default .cache), CAPSTAN_DEPS_DIR (default .deps).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
work=$root/build/mutants
src=$work/src build=$work/src/build/mutants log=$work/log
jobs=${CAPSTAN_JOBS:-$(nproc)}
quick_s=1800 full_s=7200 # a busy machine takes long; ranks that hang report themselves after a minute
modules="base;recipe;plan;device;comm;mesh;param;ops;nn;parallel;optim;checkpoint;engine"

say() { printf '[mutants] %s\n' "$*" >&2; }
fail() { # exit code, message
  printf '[mutants] error: %s\n' "$2" >&2
  exit "$1"
}

keep=0 write_docs=0 list=0 names=()
while [ $# -gt 0 ]; do
  case "$1" in
    --keep) keep=1 ;;
    --write-docs) write_docs=1 ;;
    --list) list=1 ;;
    -h | --help) sed -n '5,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) fail 2 "unknown argument '$1'; see tools/mutants.sh --help" ;;
    *) names+=("$1") ;;
  esac
  shift
done

# Every patch begins with a comment line: what is broken, and why one would write it. A line `# Test: PROGRAM` names
# another program than the equivalence test.
mutants=()
for patch in "$root"/tests/mutants/*.patch; do
  name=$(basename "$patch" .patch)
  [ "${#names[@]}" -gt 0 ] || mutants+=("$name")
  for wanted in "${names[@]}"; do
    case "$name" in "$wanted"*) mutants+=("$name"); break ;; esac
  done
done
[ "${#mutants[@]}" -gt 0 ] || fail 2 "no fault in tests/mutants is called ${names[*]}"
[ "$write_docs" -eq 0 ] || [ "${#names[@]}" -eq 0 ] || fail 2 "--write-docs needs all faults, so no names"

patch_of() { printf '%s/tests/mutants/%s.patch' "$root" "$1"; }
fault_of() { sed -n '1s/^# *//p' "$(patch_of "$1")"; }
test_of() {
  local named
  named=$(sed -n 's/^# Test: *//p' "$(patch_of "$1")")
  printf '%s' "${named:-capstan_equivalence_test}"
}
if [ "$list" -eq 1 ]; then
  for name in "${mutants[@]}"; do printf '%-44s %s\n' "$name" "$(fault_of "$name")"; done
  exit 0
fi

# Everything git knows or would add, as it stands now. What is the same keeps its time and is not built again; what
# differs is new, even where an interrupted run left a fault.
copy_sources() {
  local file
  mkdir -p "$src"
  find "$src" -path "$src/build" -prune -o -type f -print0 | while IFS= read -r -d '' file; do
    [ -f "$root/${file#"$src"/}" ] || rm -f "$file"
  done
  git -C "$root" ls-files -z -co --exclude-standard | while IFS= read -r -d '' file; do
    if [ ! -f "$root/$file" ] || cmp -s "$root/$file" "$src/$file"; then continue; fi
    mkdir -p "$src/$(dirname "$file")"
    cp --preserve=mode "$root/$file" "$src/$file"
  done
  ln -sfn "$(realpath -m "${CAPSTAN_DEPS_DIR:-$root/.deps}")" "$src/.deps"
}

# The same flags and depth as the other build folders, so that ccache knows most objects.
build_tests() { # jobs, target...
  local jobs=$1
  shift
  nice -n 10 cmake --build "$build" --parallel "$jobs" --target "$@"
}
prepare() {
  cmake -S "$src" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O2 -g1" \
    -DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCAPSTAN_BUILD_TOOLS=OFF -DCAPSTAN_BUILD_EXAMPLES=OFF \
    "-DCAPSTAN_MODULES=$modules" > "$log/build.txt" &&
    build_tests "$jobs" "${programs[@]}" >> "$log/build.txt" 2>&1
}

# Exit code of a test program on this many layouts; output in $log/run.txt.
run_test() { # program, layouts, limit in seconds
  local filter='*' code=0
  [ "$1" != capstan_equivalence_test ] || filter='Equivalence.RandomLayouts*'
  [ "$1" != capstan_reshard_test ] || set -- "$1" $(($2 > 1 ? 40 : 12)) "$3" # that test has no pairwise set
  CAPSTAN_LAYOUTS=$2 CAPSTAN_LAYOUT_FAILURES=1 GOMP_SPINCOUNT=1000 nice -n 10 timeout -k 5 "$3" \
    "$build/test-bin/$1" "--gtest_filter=$filter" > "$log/run.txt" 2>&1 || code=$?
  return "$code"
}

# How a failed run failed, for the table: `caught by` and `error`, on two lines. Fails if it did not report by itself.
explain() { # exit code
  local out=$log/run.txt by error
  if [ "$1" -eq 124 ] || [ "$1" -eq 137 ]; then printf 'nobody: killed by the time limit\n-\n'; return 1; fi
  if [ "$1" -gt 128 ]; then printf 'nobody: died by signal %d\n-\n' $(($1 - 128)); return 1; fi
  if grep -q '^run_ranks: not through' "$out"; then
    printf 'deadline of the ranks\n%s\n' "$(sed -n 's/^run_ranks: //p' "$out" | head -n 1)"
    return
  fi
  by=$(grep -m 1 -A 2 'Failure$' "$out" | grep -v -e 'Failure$' -e '^Failed$' -e '^--$' | head -n 1 || true)
  error=$(grep -m 1 '^  loss .*, state .* in ' "$out" || true)
  error=$(sed 's/^  loss //; s/, norm\|, evaluation\|, state//g; s/ in \([^ ]*\)$/ \1/' <<< "$error")
  if grep -q -- '  ->  ' "$out"; then
    by=$(grep -m 1 -o -- '[^:]*  ->  .*' "$out" | sed 's/^ *//; s/  ->  / -> /')
    error=$(grep -m 1 -A 2 -- 'Failure$' "$out" | tail -n +2 | paste -sd ' ' | tr -s ' ')
  elif grep -q 'thrown in the test body' "$out"; then
    by="making the plan"
    error=$(grep -m 1 -o 'C++ exception.*' "$out" | cut -d '"' -f 2)
  elif sed -n '/^  loss .* in /{n;p;q}' "$out" | grep -qv '^  *$\|reproduce:'; then
    error=$(sed -n '/^  loss .* in /{n;s/^ *//;p;q}' "$out")
    ! grep -q 'no arrival of\|wait for each other\|but no end within' "$out" || by="$by (deadline of the ranks)"
  elif [ -n "$error" ]; then
    error=$(awk '{ n = split("loss norm evaluation state", what); worst = 1
      for (i = 2; i <= n; ++i) if ($i == "inf" || ($i + 0 > $worst + 0 && $worst != "inf")) worst = i
      printf "%s %.1e%s", what[worst], $worst, worst == 4 ? " in " $5 : "" }' <<< "$error")
  fi
  printf '%s\n%s\n' "$by" "$(cut -c 1-120 <<< "$error")"
}

touched() { sed -n 's/^+++ b\///p' "$(patch_of "$1")"; }
restore() { # fault
  local file
  for file in $(touched "$1"); do
    cp "$work/original/$file" "$src/$file" # newer than what was built of the fault
  done
}
apply() { # fault
  local file
  rm -rf "$work/original"
  for file in $(touched "$1"); do
    [ -f "$src/$file" ] || return 1
    mkdir -p "$work/original/$(dirname "$file")"
    cp "$src/$file" "$work/original/$file"
  done
  patch --silent --batch --forward --no-backup-if-mismatch -r - -F 1 -p 1 -d "$src" < "$(patch_of "$1")" > /dev/null
}

rows=() survivors=0
report() { # fault, caught by, error, seconds
  rows+=("| $1 | $(fault_of "$1") | $2 | $3 | $4 |")
  printf '| %s | %s | %s | %s |\n' "$1" "$2" "$3" "$4"
}
judge() { # fault
  local program code=0 begin=$SECONDS text verdict=0
  program=$(test_of "$1")
  if ! apply "$1"; then
    survivors=$((survivors + 1))
    report "$1" "nobody: no longer applies" - 0
    return
  fi
  if ! build_tests 1 "$program" > "$log/build.txt" 2>&1; then
    text=$(printf 'nobody: does not compile\n%s\n' "$(grep -m 1 -o 'error: .*' "$log/build.txt" || true)")
    verdict=1
  else
    run_test "$program" 1 "$quick_s" || code=$?
    if [ "$code" -eq 0 ]; then run_test "$program" 300 "$full_s" || code=$?; fi
    text=$(explain "$code") || verdict=1
    if [ "$code" -eq 0 ]; then text=$'nobody\n-' verdict=1; fi
    [ "$keep" -eq 0 ] || cp "$log/run.txt" "$log/$1.txt"
  fi
  restore "$1"
  [ "$verdict" -eq 0 ] || survivors=$((survivors + 1))
  report "$1" "$(sed -n 1p <<< "$text")" "$(sed -n 2p <<< "$text" | tr '|' '/')" $((SECONDS - begin))
}

export CCACHE_DIR=${CAPSTAN_CACHE_DIR:-$root/.cache}/ccache CCACHE_BASEDIR=$src CCACHE_NOHASHDIR=1
export CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
mkdir -p "$log"
mapfile -t programs < <(for name in "${mutants[@]}"; do test_of "$name"; echo; done | sort -u)
say "copying and building ${programs[*]}"
copy_sources
prepare || fail 2 "the sources do not build; see $log/build.txt"
for program in "${programs[@]}"; do
  run_test "$program" 1 "$quick_s" || fail 2 "$program fails without any fault; see $log/run.txt"
done

printf '| fault | caught by | error | seconds |\n|---|---|---|---|\n'
for name in "${mutants[@]}"; do judge "$name"; done
say "${#mutants[@]} faults, $survivors survived"
if [ "$write_docs" -eq 1 ]; then
  {
    printf '# Faults that the equivalence tests notice\n\n'
    printf 'Each line is a small fault of tests/mutants, the first layout whose run it changes, and how: the largest\n'
    printf 'relative error against one rank (the bar is 1e-9), or what a rank reported. Written by\n'
    printf 'tools/mutants.sh --write-docs; seconds include building.\n\n'
    printf '| fault | what is broken | caught by | error | seconds |\n|---|---|---|---|---|\n'
    printf '%s\n' "${rows[@]}"
    printf '\n%d faults, %d survived.\n' "${#mutants[@]}" "$survivors"
  } > "$root/docs/mutants.md"
fi
[ "$survivors" -eq 0 ]
