#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""Writes a seeded corpus: headers of /usr/include and words of mixed scripts, by default 50 MB.

Usage: tools/bench/tokenizer/make_corpus.py OUTPUT.txt [MEGABYTES]
"""
import os
import random
import sys

SCRIPTS = {
    "latin": (0x61, 0x7A), "accented": (0xE0, 0xF6), "greek": (0x3B1, 0x3C9), "cyrillic": (0x430, 0x44F),
    "hebrew": (0x5D0, 0x5EA), "arabic": (0x627, 0x64A), "devanagari": (0x905, 0x939), "thai": (0xE01, 0xE2E),
    "hangul": (0xAC00, 0xB300), "han": (0x4E00, 0x5600), "kana": (0x3041, 0x3096), "emoji": (0x1F600, 0x1F64F),
}
SEPARATORS = [" "] * 12 + [", ", ". ", "\n", "\n\n", "  ", " - ", "; "]


def headers(rng, root="/usr/include"):
    """Texts of the headers, in a seeded order, each once."""
    paths = []
    for folder, _, names in os.walk(root):
        paths += [os.path.join(folder, name) for name in names if name.endswith((".h", ".hpp", ".hxx"))]
    paths.sort()
    rng.shuffle(paths)
    for path in paths:
        with open(path, "rb") as file:
            yield file.read().decode("utf-8", "ignore").replace("\0", "")


def prose(rng, lexicon, words):
    """Words drawn with a long tail, numbers now and then."""
    parts = []
    for _ in range(words):
        if rng.random() < 0.05:
            parts.append(str(rng.randrange(10 ** rng.randrange(1, 9))))
        else:
            parts.append(lexicon[min(int(rng.paretovariate(0.7)), len(lexicon)) - 1])
        parts.append(rng.choice(SEPARATORS))
    return "".join(parts) + "\n"


def make_lexicon(rng, low, high, size=4000):
    return ["".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 9))) for _ in range(size)]


def main():
    target = int(float(sys.argv[2] if len(sys.argv) > 2 else 50) * 1e6)
    rng = random.Random(20)
    lexicons = [make_lexicon(rng, low, high) for low, high in SCRIPTS.values()]
    source, written = headers(rng), 0
    with open(sys.argv[1], "wb") as out:
        while written < target:
            text = next(source, "") if rng.random() < 0.7 else prose(rng, rng.choice(lexicons), 2000)
            data = text.encode("utf-8")
            data = data[: target - written].decode("utf-8", "ignore").encode("utf-8")
            written += max(len(data), 1)
            out.write(data)


if __name__ == "__main__":
    main()
