#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient norm of every step of tiny runs, against tests/golden/<case>.txt ("step loss grad_norm" at full precision).

usage: CAPSTAN=path/to/bin/capstan golden_test.py [--regenerate]
A change of these numbers is a change of the mathematics: regenerate, and let the diff be reviewed.
"""
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

CAPSTAN = os.environ["CAPSTAN"]
HERE = pathlib.Path(__file__).resolve().parent

BASE = """\
version: 1
run: {name: golden, steps: 12, threads: 1}
model: {hidden_size: 32, intermediate_size: 72, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}
data: {tokenizer: tokenizer, train: [{path: train}]}
batch: {global_samples: 8, micro_samples: 2, sequence_length: 32}
optimizer: {lr: 1.0e-2}
lr_schedule: {kind: cosine, warmup: 3}
checkpoint: {interval_steps: none}
metrics: {interval_steps: 1, tensorboard: false}
"""
FP64 = "precision={compute: fp64, residual: fp64, master: fp64, gradients: fp64}"
# Relative tolerance: fp64 differs in the last digits between instruction sets, fp32 in the order of sums, bf16 in roundings.
CASES = {
    "llama_fp64": ([FP64], 1, 1e-9),
    "llama_fp64_two_ranks_separate": ([FP64, "data.documents=separate"], 2, 1e-9),
    "llama_fp64_untied_window_bias": ([FP64, "model.tie_word_embeddings=false", "model.sliding_window=9", "model.attention_bias=true"], 1, 1e-9),
    "llama_fp32_wsd": (["precision.compute=fp32", "lr_schedule={kind: wsd, warmup: 3, decay: 4}"], 1, 2e-4),
    "llama_bf16": (["precision.compute=bf16"], 1, 3e-2),
    "gpt2_fp64": ([FP64, "model.family=gpt2", "model.num_key_value_heads=auto"], 1, 1e-9),
    "gpt2_bf16_two_ranks_separate": (["precision.compute=bf16", "model.family=gpt2", "model.num_key_value_heads=auto", "model.hidden_act=gelu",
                                      "data.documents=separate"], 2, 3e-2),
    "llama_fp64_lion": ([FP64, "optimizer={name: lion, lr: 1.0e-3, weight_decay: 0.5}"], 1, 1e-9),
    "llama_fp32_moments_bf16": (["precision.compute=fp32", "optimizer.moments=bf16"], 1, 3e-3),
    "llama_fp32_moments_int8": (["precision.compute=fp32", "optimizer={moments: int8, lr: 1.0e-3}", "model.hidden_size=256", "model.intermediate_size=256"], 1, 3e-3),
}


def run(*arguments, cwd):
    done = subprocess.run([CAPSTAN, *arguments], cwd=cwd, text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}")


def prepare(folder):
    pick = random.Random(11)
    words = "one two three four five six seven eight nine ten and so on until the end of all that counts".split()
    for i in range(60):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{i:02}.txt").write_text(" ".join(pick.choice(words) for _ in range(pick.randrange(5, 120))) + "\n")
    run("data", "tokenizer", "train", "--input", "text", "--vocab-size", "320", "--output", "tokenizer", cwd=folder)
    run("data", "prepare", "--input", "text", "--tokenizer", "tokenizer", "--output", "train", cwd=folder)
    (folder / "golden.yaml").write_text(BASE)


def curve(folder, name):
    changes, ranks, _ = CASES[name]
    settings = [word for change in [f"run.name={name}", *changes] for word in ("--set", change)]
    run("train", "golden.yaml", "--nproc", str(ranks), *settings, cwd=folder)
    rows = []
    for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            rows.append((record["step"], record["loss"], record["grad_norm"]))
    return rows


def compare(name, rows):
    expected = [line.split() for line in (HERE / f"{name}.txt").read_text().splitlines()]
    tolerance = CASES[name][2]
    if len(expected) != len(rows):
        return [f"{name}: {len(rows)} steps, expected {len(expected)}"]
    problems = []
    for (step, *got), (_, *want) in zip(rows, expected):
        for what, a, b in zip(("loss", "grad_norm"), got, map(float, want)):
            if abs(a - b) > tolerance * abs(b):
                problems.append(f"{name} step {step}: {what} {a!r}, expected {b!r} within {tolerance}")
    return problems


def main():
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        prepare(folder)
        for name in CASES:
            rows = curve(folder, name)
            if sys.argv[1:] == ["--regenerate"]:
                (HERE / f"{name}.txt").write_text("".join(f"{s} {l!r} {g!r}\n" for s, l, g in rows))
            else:
                problems += compare(name, rows)
    print("\n".join(problems) or f"{len(CASES)} curves")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
