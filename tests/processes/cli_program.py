# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of the program share: a prepared folder, and ways to run, watch and read a tiny training."""
import json
import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import tempfile
import time
import unittest

CAPSTAN = os.environ["CAPSTAN"]
SOURCE = pathlib.Path(__file__).resolve().parents[2]
WORDS = "let the model read what was written and write what may be read next in a row of words and numbers 0 1 2 3".split()


def corpus(lines=4000):
    """Text with something to learn: the same phrases again and again."""
    pick = random.Random(7)
    return "\n".join(" ".join(pick.choice(WORDS) for _ in range(3)) + " then " + " ".join(WORDS[:6]) for _ in range(lines)) + "\n"


LONG = ("--set", "run.steps=100000", "--set", "checkpoint.interval_steps=none")


class Program(unittest.TestCase):
    """A folder whose path has a space, with a prepared corpus."""

    @classmethod
    def setUpClass(cls):
        cls.home = pathlib.Path(tempfile.mkdtemp(prefix="capstan cli "))
        (cls.home / "my.txt").write_text(corpus())
        (cls.home / "held.txt").write_text(corpus(200))
        cls.check("data", "tokenizer", "train", "--input", "my.txt", "--vocab-size", "300", "--output", "data/tokenizer")
        for name in ("my", "held"):
            cls.check("data", "prepare", "--input", name + ".txt", "--tokenizer", "data/tokenizer", "--output", "data/" + name)
        (cls.home / "tiny.yaml").write_text(RECIPE)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.home, ignore_errors=True)

    @classmethod
    def run_capstan(cls, *arguments, cwd=None, timeout=120, **options):
        return subprocess.run([CAPSTAN, *arguments], cwd=cwd or cls.home, text=True, capture_output=True, timeout=timeout, **options)

    @classmethod
    def check(cls, *arguments, **options):
        done = cls.run_capstan(*arguments, **options)
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def train(self, name, *arguments, code=0, **options):
        done = self.run_capstan("train", "tiny.yaml", "--set", f"run.name={name}", *arguments, **options)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done

    def start(self, name, *arguments):
        return subprocess.Popen([CAPSTAN, "train", "tiny.yaml", "--set", f"run.name={name}", *arguments], cwd=self.home, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def steps(self, name):
        best = {}
        for line in (self.home / "runs" / name / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "step":
                best[record["step"]] = record
        return best

    def weights(self, name, step):
        """Tensor name -> bytes, read as the safetensors format says."""
        tensors = {}
        for file in (self.home / "runs" / name / "checkpoints" / f"step-{step:08}").glob("model-*.safetensors"):
            raw = file.read_bytes()
            length = struct.unpack("<Q", raw[:8])[0]
            for key, entry in json.loads(raw[8:8 + length]).items():
                if key != "__metadata__":
                    begin, end = entry["data_offsets"]
                    tensors[key] = raw[8 + length + begin:8 + length + end]
        return tensors

    def wait_for_step(self, name, step, process, deadline=60):
        end = time.monotonic() + deadline
        file = self.home / "runs" / name / "metrics.jsonl"
        while time.monotonic() < end and process.poll() is None:
            if file.exists() and re.search(r'"kind":"step",.*"step":%d,' % step, file.read_text()):
                return
            time.sleep(0.02)
        self.fail(f"step {step} was not reached: {process.communicate()[1] if process.poll() is not None else 'deadline'}")

    def assert_no_rank_left(self, name):
        end = time.monotonic() + 5
        left = "?"
        while left and time.monotonic() < end:
            left = subprocess.run(["pgrep", "-f", f"capstan-run.*run.name={name}|train tiny.yaml --set run.name={name}"],
                                  text=True, capture_output=True).stdout
        self.assertEqual(left, "")


RECIPE = """\
version: 1
run: {name: tiny, steps: 8, threads: 1}
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}
data:
  tokenizer: data/tokenizer
  train: [{path: data/my}]
  validation: [{name: held, path: data/held}]
batch: {global_samples: 8, micro_samples: 2, sequence_length: 32}
optimizer: {lr: 1.0e-2}
lr_schedule: {kind: constant, warmup: 2}
precision: {compute: fp32}
checkpoint: {interval_steps: 4, keep_last: 3}
eval: {interval_steps: none, samples: 8}
metrics: {interval_steps: 1}
"""
FP64 = ("--set", "precision={compute: fp64, residual: fp64, master: fp64, gradients: fp64}")
