#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""Writes src/text/unicode_tables.cpp: the classes that tokenizer patterns ask for, as code point ranges.

Usage: tools/unicode/make_categories.py OUTPUT.cpp
Needs a Python whose unicodedata is Unicode 14.0 (Python 3.11), the version of Oniguruma 6.9.8.
"""
import sys
import unicodedata

VERSION = "14.0.0"
LETTER, NUMBER, SPACE, WORD = 1, 2, 4, 8
WHITE_SPACE = set(range(0x9, 0xE)) | {0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
WHITE_SPACE |= set(range(0x2000, 0x200B))
# Symbols that are Alphabetic (Other_Alphabetic outside L, M and N), and the join controls.
ALPHABETIC = set(range(0x24B6, 0x24EA)) | set(range(0x1F130, 0x1F14A))
ALPHABETIC |= set(range(0x1F150, 0x1F16A)) | set(range(0x1F170, 0x1F18A)) | {0x200C, 0x200D}


def classes(code_point):
    category = unicodedata.category(chr(code_point))
    bits = 0
    if category[0] == "L":
        bits |= LETTER
    if category[0] == "N":
        bits |= NUMBER
    if code_point in WHITE_SPACE:
        bits |= SPACE
    if category[0] in "LM" or category in ("Nd", "Nl", "Pc") or code_point in ALPHABETIC:
        bits |= WORD
    return bits


def ranges():
    start, bits = 0, classes(0)
    for code_point in range(1, 0x110001):
        now = classes(code_point) if code_point < 0x110000 else -1
        if now != bits:
            if bits:
                yield start, code_point - 1, bits
            start, bits = code_point, now


def main():
    if unicodedata.unidata_version != VERSION:
        sys.exit(f"needs Unicode {VERSION}, this Python has {unicodedata.unidata_version}")
    lines, line = [], "   "
    for first, last, bits in ranges():
        item = f" {{0x{first:x}, 0x{last:x}, {bits}}},"
        if len(line) + len(item) > 100:
            lines.append(line)
            line = "   "
        line += item
    lines.append(line)
    with open(sys.argv[1], "w", encoding="ascii") as out:
        out.write(
            "// SPDX-FileCopyrightText: Capstan contributors\n"
            "// SPDX-License-Identifier: Apache-2.0\n"
            f"// Made by tools/unicode/make_categories.py from Unicode {VERSION}; do not edit.\n"
            '#include "text/unicode.h"\n\nnamespace capstan::text {\n\n// clang-format off\n'
            "static constexpr ClassRange kRanges[] = {\n"
            + "\n".join(lines)
            + "\n};\n// clang-format on\n\n"
            "std::span<const ClassRange> class_ranges() { return kRanges; }\n\n"
            "}  // namespace capstan::text\n"
        )


if __name__ == "__main__":
    main()
