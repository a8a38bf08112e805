#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# Installs the build tree into a fresh prefix (its path has a space), builds the consumer against it and runs both.
# usage: package_test.sh BUILD_DIR SOURCE_DIR
set -euo pipefail
build=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix="$work/an install"
cmake --install "$build" --prefix "$prefix" > "$work/install.log"
"$prefix/bin/capstan" --version
"$prefix/bin/capstan" recipe list | grep -q quickstart
cmake -S "$source/tests/package/consumer" -B "$work/consumer" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release > "$work/configure.log" ||
  { tail -n 20 "$work/configure.log"; exit 1; }
cmake --build "$work/consumer" > "$work/build.log" || { tail -n 30 "$work/build.log"; exit 1; }
"$work/consumer/consumer"
