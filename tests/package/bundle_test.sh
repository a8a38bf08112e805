#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# A bundle runs from another folder, with the libraries that it carries, and says what is missing.
# usage: bundle_test.sh BUILD_DIR SOURCE_DIR TORCH_DIR
set -euo pipefail
build=$1 source=$2 torch=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "$*" >&2; exit 1; }
bundle="$work/a bundle"
"$source/tools/bundle.sh" --build "$build" --tests "$work/made"
mv "$work/made" "$bundle"
cat > "$work/there.sh" << 'THERE'
. "$1/env.sh" || exit 9
shift
"$@"
THERE
there() { env -i PATH=/usr/bin:/bin HOME="$work" CAPSTAN_TORCH="$1" bash "$work/there.sh" "$bundle" "${@:2}"; }

[ "$(there "$torch" capstan --version)" = "$("$build/bin/capstan" --version)" ] || fail "another version"
there "$torch" capstan recipe list | grep -q quickstart || fail "no recipes"
there "$torch" capstan prove debug/tiny > "$work/prove.log" 2>&1 || { cat "$work/prove.log"; fail "prove"; }
used=$(there "$torch" ldd "$bundle/lib/libcapstan.so.0")
for library in libspdlog libyaml-cpp libfmt; do
  grep "$library" <<< "$used" | grep -q "a bundle/lib" || fail "not the $library that it carries: $used"
done
[ -x "$bundle/test-bin/capstan_process_layouts_test" ] || fail "no tests"

there "$work" capstan --version 2> "$work/message" && fail "LibTorch from nowhere"
grep -q "Set CAPSTAN_TORCH" "$work/message" || fail "$(cat "$work/message")"
"$source/tools/bundle.sh" --build "$build" "$bundle" 2> "$work/message" && fail "wrote into a folder that is there"
grep -q "need a new folder" "$work/message" || fail "$(cat "$work/message")"
