#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""The `tokenizers` package on the same work: peer.py CORPUS TOKENIZER_JSON. Prints one line of JSON.

Trains with the pieces of TOKENIZER_JSON, compares vocabulary and merges, then encodes the lines of the
corpus, first as one batch on all threads, then on one.
"""
import json
import sys
import time

import tokenizers


def main():
    text = open(sys.argv[1], encoding="utf-8", newline="").read()
    theirs = tokenizers.Tokenizer.from_file(sys.argv[2])
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = theirs.pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    start = time.time()
    trained.train_from_iterator(text.splitlines(keepends=True), trainer)
    train_lines = time.time() - start
    start = time.time()
    trained.train_from_iterator([text], trainer)
    train_whole = time.time() - start
    ours = json.load(open(sys.argv[2], encoding="utf-8"))["model"]
    model = json.loads(trained.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    same = model["vocab"] == ours["vocab"] and merges == ours["merges"]

    chunks = text.splitlines(keepends=True)
    chunks = ["".join(chunks[i : i + 200]) for i in range(0, len(chunks), 200)]
    start = time.time()
    theirs.encode_batch_fast(chunks, add_special_tokens=False)
    batch = time.time() - start
    sample = chunks[: len(chunks) // 10]
    size = sum(len(chunk.encode()) for chunk in sample)
    start = time.time()
    for chunk in sample:
        theirs.encode(chunk, add_special_tokens=False)
    one = time.time() - start
    print(
        json.dumps(
            {
                "train_s_by_lines": round(train_lines, 2),
                "train_s_as_one_text": round(train_whole, 2),
                "same_vocabulary_and_merges": same,
                "encode_mb_per_s_all_threads": round(len(text.encode()) / batch * 1e-6, 1),
                "encode_mb_per_s_one_thread": round(size / one * 1e-6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
