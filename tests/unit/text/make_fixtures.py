#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""Records what the `tokenizers` package gives: tests/fixtures/text/peer.json.gz.

Usage: python3 tests/unit/text/make_fixtures.py tests/fixtures/text/peer.json.gz
Needs `pip install tokenizers`. 5,000 seeded strings, several tokenizers, and for each pair the low 16 bits
of the CRC-32 of the ids as little-endian int32 (one hexadecimal text), so that the file stays small.
"""
import gzip
import json
import random
import struct
import sys
import unicodedata
import zlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACES = [" ", " ", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u180e", "\u0085", "\u2028", "\u200b", "\x1c", "\v"]
CONTRACTIONS = ["'s", "'S", "'t", "'re", "'RE", "'ve", "'m", "'ll", "'Ll", "'d", "'x", "'\u017f", "\u2019s", "''s", "' s"]
WORDS = "the of const int return size_t vector template class Hello World naïve über straße don I we they it can HTML x".split()
CODE = ["for (int i = 0; i < n; ++i) {", "#include <vector>\n", "a->b->c();", "x += 1;  // note", "\tif (!p) return -1;\n", "std::map<int, std::string>", "/* ***** */", "0x7fff'ffff", "@@ -1,2 +3,4 @@", "\\n\\t"]
SPECIAL = ["<|endoftext|>", "<|begin|>", "<tool>", "  <tool>  ", "<s p>", "word<w>word", " <w> ", "é́<n>", "e\u0301te", "<|endoftext", "<left> ", "\n<left>", "<right>  \n", "<|begin|><|begin|>", "_<w>", "<w>-"]
DIGITS = ["7", "42", "123", "1234", "3.14159", "1,000,000", "\u0661\u0662\u0663\u0664", "\u00b2\u00b3", "\u2167", "\u00bd", "2026-01-31"]
BLOCKS = [(0x20, 0x7E), (0xA1, 0x24F), (0x250, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x2F800, 0x2FA1D)]
MARKS = ["\u0301", "\u0308", "\u0327", "\u0323", "\u3099", "\u1161", "\u11a8", "\u200d", "\ufe0f"]


def character(rng):
    low, high = rng.choice(BLOCKS)
    while True:
        c = chr(rng.randint(low, high))
        if unicodedata.category(c) not in ("Cn", "Cs"):
            return c


def word(rng):
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(WORDS)
    if kind < 0.6:
        low, high = rng.choice(BLOCKS)
        letters = [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))]
        return "".join(c for c in letters if unicodedata.category(c) not in ("Cn", "Cs"))
    if kind < 0.7:
        return character(rng) + rng.choice(MARKS)
    return "".join(character(rng) for _ in range(rng.randint(1, 3)))


def string(rng):
    parts = []
    for _ in range(rng.randint(0, 7)):
        kind = rng.random()
        parts.append(
            word(rng) if kind < 0.5
            else rng.choice(CONTRACTIONS) if kind < 0.58
            else rng.choice(CODE) if kind < 0.66
            else rng.choice(DIGITS) if kind < 0.76
            else rng.choice(SPECIAL) if kind < 0.84
            else rng.choice("!?.,;:()[]{}<>=+-*/#_\"'")
        )
        if rng.random() < 0.6:
            parts.append(rng.choice(SPACES))
    return "".join(parts)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(**options):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False, **options})


def train(strings, pre_tokenizer, normalizer=None, vocabulary=600, special=("<|endoftext|>",)):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(strings, trainer)
    return tokenizer


def make_tokenizers(strings):
    own = train(strings, pre_tokenizers.Sequence([split(LLAMA3), byte_level()]))
    yield "llama3", own, {}
    gpt2 = train(strings, byte_level(use_regex=True), special=("<|endoftext|>", "<|begin|>"))
    yield "gpt2", gpt2, {}
    prefix = train(strings, pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True))
    prefix.add_tokens([AddedToken("<tool>")])
    yield "gpt2_prefix_space", prefix, {}

    template = Tokenizer.from_str(own.to_str())
    template.add_special_tokens([AddedToken("<|begin|>", normalized=False)])
    template.add_tokens([AddedToken("<w>", single_word=True), AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True)])
    template.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False), AddedToken("<s p>")])
    begin = template.token_to_id("<|begin|>")
    template.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A <|endoftext|>", special_tokens=[("<|begin|>", begin), ("<|endoftext|>", 0)]),
        ]
    )
    yield "added_tokens", template, {"add_special": True}
    plain = Tokenizer.from_str(template.to_str())
    yield "special_as_text", plain, {"parse_special": False}

    # Some merges are unreachable in order, so that looking up whole pieces first makes a difference.
    whole = json.loads(own.to_str())
    whole["model"]["ignore_merges"] = True
    whole["model"]["merges"] = [m for i, m in enumerate(whole["model"]["merges"]) if i % 3]
    yield "ignore_merges", Tokenizer.from_str(json.dumps(whole)), {}

    nfc = train(strings, pre_tokenizers.Sequence([split(QWEN2), byte_level()]), normalizers.NFC())
    nfc.add_tokens([AddedToken("e\u0301te", normalized=True), AddedToken("<n>", normalized=False)])
    yield "qwen2_nfc", nfc, {}
    nfkd = train(strings, pre_tokenizers.Sequence([split(QWEN2), byte_level()]), normalizers.Sequence([normalizers.NFKD(), normalizers.NFC()]))
    yield "nfkd_then_nfc", nfkd, {}
    yield "o200k", train(strings, pre_tokenizers.Sequence([split(O200K), byte_level()])), {}
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)])
    yield "digits", train(strings, digits), {}
    steps = pre_tokenizers.Sequence(
        [split(r"\p{N}{1,2}+"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(r"[!-/:-~]?[A-Za-z]+|[^\S\n]+|\h{2}|[^\s]"), byte_level()]
    )
    yield "three_splits", train(strings, steps), {}


def crc(ids):
    return f"{zlib.crc32(struct.pack(f'<{len(ids)}i', *ids)) & 0xFFFF:04x}"


def main():
    rng = random.Random(14)
    strings = ["", " ", "'", "\n"] + [string(rng) for _ in range(4996)]
    cases = []
    for name, tokenizer, options in make_tokenizers(strings):
        if options.get("parse_special") is False:
            tokenizer.encode_special_tokens = True
        add = options.get("add_special", False)
        crcs = [crc(tokenizer.encode(text, add_special_tokens=add).ids) for text in strings]
        cases.append({"name": name, "options": options, "json": tokenizer.to_str(), "crc": "".join(crcs)})
        print(name, tokenizer.get_vocab_size())
    text = json.dumps({"strings": strings, "tokenizers": cases}, ensure_ascii=False, separators=(",", ":"))
    with open(sys.argv[1], "wb") as out:
        out.write(gzip.compress(text.encode("utf-8"), 9, mtime=0))


if __name__ == "__main__":
    main()
