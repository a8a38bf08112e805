#!/usr/bin/env bash
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
#
# bin/capstan must start without torch: neither it nor what it links may need a torch library, and --version is quick.
set -euo pipefail
build=$1
needed() { readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'; }
for file in "$build/bin/capstan" "$build/lib/libcapstan_base.so"; do
  if needed "$file" | grep -E 'torch|c10|libcapstan\.so'; then
    echo "$file needs a torch library" >&2
    exit 1
  fi
done
"$build/bin/capstan" --version
