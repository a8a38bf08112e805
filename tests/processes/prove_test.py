#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""`capstan prove` as a user meets it: what it prints, and its exit codes.

usage: CAPSTAN=path/to/bin/capstan prove_test.py [unittest arguments]
"""
import os
import re
import subprocess
import tempfile
import unittest


class Prove(unittest.TestCase):
    def prove(self, *arguments, code=0):
        with tempfile.TemporaryDirectory(prefix="capstan prove ") as folder:  # no data, no tokenizer
            done = subprocess.run([os.environ["CAPSTAN"], "prove", *arguments], cwd=folder, text=True, capture_output=True, timeout=120)
            self.assertEqual(os.listdir(folder), [])
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done

    def test_a_layout_is_proven(self):
        done = self.prove("quickstart", "--set", "parallel.tensor=2", "--set", "parallel.zero.stage=3", "--nproc", "4")
        self.assertEqual(done.stderr, "")
        for words in ("model.hidden_size", "256 -> ", "loss", "gradient norm", "evaluation", "optimizer.exp_avg_sq"):
            self.assertIn(words, done.stdout)
        verdict = done.stdout.splitlines()[-1]
        found = re.fullmatch(r"proven: tensor 2, data 2 \(ZeRO 3, 2 shards\) on 4 ranks computes the run of one rank \(largest error (\S+), bar 1e-09\)", verdict)
        self.assertTrue(found, verdict)
        self.assertLess(float(found[1]), 1e-9)

    def test_large_recipes_are_proven_without_their_machines(self):
        done = self.prove("llama3/70b-64gpu", "--steps", "2", "--seed", "7")
        self.assertIn("proven: tensor 8 with sequence, data 8 (ZeRO 3, 8 shards), recompute of blocks on 64 ranks", done.stdout)

    def test_what_differs_is_named(self):
        done = self.prove("debug/zero3", "--bar", "0", code=1)
        self.assertNotIn("proven", done.stdout)
        self.assertRegex(done.stderr, r"^error: data 2 \(ZeRO 3, 2 shards\) on 2 ranks does not compute the run of one rank\. step 1: .* on rank [01] differs")

    def test_an_illegal_layout_is_refused(self):
        done = self.prove("quickstart", "--set", "parallel.tensor=3", code=2)
        self.assertIn("model.num_attention_heads", done.stderr)
        done = self.prove("quickstart", "--nproc", "3", code=2)
        self.assertIn("batch.global_samples", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
