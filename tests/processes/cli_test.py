#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""The program as a user meets it: from raw text to sample, resumed, stopped, killed, asked for nonsense.

usage: CAPSTAN=path/to/bin/capstan cli_test.py [unittest arguments]
"""
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import time
import unittest

from cli_program import CAPSTAN, FP64, LONG, RECIPE, Program


class FirstUse(Program):
    def test_no_recipe_lists_the_catalogue(self):
        done = self.run_capstan("train")
        self.assertEqual(done.returncode, 2)
        self.assertIn("quickstart", done.stderr)

    def test_wrong_words(self):
        for arguments, words in ((("trian",), "train"), (("serve",), "not in this build"), (("train", "quikstart"), "quickstart"),
                                 (("train", "tiny.yaml", "--nprok", "2"), "--nproc"), (("generate",), "--model")):
            done = self.run_capstan(*arguments)
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn(words, done.stderr)

    def test_help_has_examples(self):
        for verb in ("train", "plan", "eval", "generate", "doctor"):
            done = self.check(verb, "--help")
            self.assertIn("Example:", done.stdout)
        self.assertEqual(self.run_capstan().returncode, 0)

    def test_nonsense_recipe_is_refused_as_a_whole(self):
        (self.home / "bad.yaml").write_text(RECIPE.replace("lr: 1.0e-2", "lr: -1").replace("hidden_size: 32", "hiden_size: 32").replace("steps: 8", "steps: 010"))
        done = self.run_capstan("train", "bad.yaml", "--nproc", "2", "--set", "optimizer.name=muon")
        self.assertEqual(done.returncode, 2)
        for words in ("bad.yaml:2:", "010", "hiden_size", "hidden_size", "optimizer.lr", "muon", "problems; nothing was started"):
            self.assertIn(words, done.stderr)
        self.assertFalse((self.home / "runs" / "tiny").exists())

    def test_impossible_layout_is_refused(self):
        done = self.run_capstan("train", "tiny.yaml", "--nproc", "3")
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("batch.global_samples", done.stderr)

    def test_missing_data_and_tokenizer(self):
        done = self.run_capstan("train", "tiny.yaml", "--set", "data.tokenizer=nowhere")
        self.assertEqual(done.returncode, 2, done.stderr)
        done = self.run_capstan("train", "tiny.yaml", "--set", "run.name=nodata", "--set", "data.train=[{path: nowhere}]")
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("nowhere", done.stderr)

    def test_show_into_head_ends_quietly(self):
        done = subprocess.run(f"'{CAPSTAN}' recipe show quickstart | head -n 1; echo ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash",
                              cwd=self.home, text=True, capture_output=True)
        self.assertEqual(done.stderr, "")
        self.assertIn(done.stdout.splitlines()[-1], ("0", "141"))

    def test_from_raw_text_to_sample_in_another_folder(self):
        self.train("mine", "--set", "run.steps=30", "--nproc", "2")
        elsewhere = self.home / "else where"
        elsewhere.mkdir()
        done = self.check("generate", "--model", str(self.home / "runs" / "mine"), "--prompt", "let the", "--greedy", "--max-tokens", "20", cwd=elsewhere)
        self.assertTrue(done.stdout.startswith("let the"))
        again = self.check("generate", "--model", str(self.home / "runs" / "mine"), "--prompt", "let the", "--seed", "5", "--max-tokens", "9", "--json")
        same = self.check("generate", "--model", str(self.home / "runs" / "mine"), "--prompt", "let the", "--seed", "5", "--max-tokens", "9", "--json")
        self.assertEqual(again.stdout, same.stdout)
        losses = self.steps("mine")
        self.assertLess(losses[30]["loss"], losses[1]["loss"] - 1)
        self.evaluate("mine")

    def evaluate(self, name):
        run = str(self.home / "runs" / name)
        scores = self.home / "scores.jsonl"
        result = json.loads(self.check("eval", "--model", run, "--data", "data/held", "--unigram", "data/my", "--per-token", str(scores), "--json").stdout)
        self.assertGreater(result["gain"], 0.5)
        lines = [json.loads(line) for line in scores.read_text().splitlines()]
        known = [line["logprob"] for line in lines if line["logprob"] is not None]
        self.assertEqual(lines[0]["position"], 0)
        self.assertIsNone(lines[0]["logprob"])
        text = json.loads(self.check("eval", "--model", run, "--data", "held.txt", "--json").stdout)
        self.assertAlmostEqual(text["loss"], result["loss"], places=6)
        self.assertLess(abs(-sum(known) / len(known) - result["loss"]), 0.05)
        done = self.run_capstan("eval", "--model", run, "--data", "data/held", "--unigram", "data/my", "--minimum-gain", "99")
        self.assertEqual(done.returncode, 1)


class Resume(Program):
    def test_same_layout_is_bitwise(self):
        for nproc in ("1", "2"):
            whole, parts = "whole" + nproc, "parts" + nproc
            self.train(whole, "--nproc", nproc)
            self.train(parts, "--nproc", nproc, "--set", "run.steps=4")
            self.train(parts, "--nproc", nproc)
            self.assertEqual(self.weights(whole, 8), self.weights(parts, 8))
            self.assertEqual([r["loss"] for _, r in sorted(self.steps(whole).items())], [r["loss"] for _, r in sorted(self.steps(parts).items())])

    def test_another_rank_count_continues_the_curve(self):
        self.train("one", *FP64, "--set", "run.steps=24")
        for first, then in (("1", "2"), ("2", "4"), ("4", "1")):
            name = f"from{first}to{then}"
            self.train(name, *FP64, "--nproc", first, "--set", "run.steps=4")
            self.train(name, *FP64, "--nproc", then, "--set", "run.steps=24")
            for step, record in self.steps("one").items():
                other = self.steps(name)[step]["loss"]
                self.assertLessEqual(abs(other - record["loss"]), 1e-10 * abs(record["loss"]), f"{name} step {step}")

    def test_threads_equal_processes(self):
        self.train("threads", "--nproc", "2", "--ranks", "threads")
        self.train("processes", "--nproc", "2")
        self.assertEqual(self.weights("threads", 8), self.weights("processes", 8))

    def test_a_changed_recipe_is_refused_with_every_difference(self):
        self.train("changed", "--set", "run.steps=4")
        done = self.train("changed", "--set", "optimizer.lr=2.0e-2", "--set", "batch.global_samples=16", code=2)
        for words in ("optimizer.lr", "batch.global_samples", "--allow-change"):
            self.assertIn(words, done.stderr)
        self.train("changed", "--set", "optimizer.lr=2.0e-2", "--allow-change", "optimizer.lr")

    def test_a_finished_run_says_so(self):
        self.train("finished", "--set", "run.steps=2")
        self.assertIn("finished", self.train("finished", "--set", "run.steps=2").stderr)
        self.train("finished", "--set", "run.steps=2", "--resume", "none", code=2)
        self.train("finished", "--resume", str(self.home / "nothing"), code=2)

    def test_the_older_step_replaces_a_damaged_one(self):
        self.train("damaged")
        newest = self.home / "runs" / "damaged" / "checkpoints" / "step-00000008"
        shard = next(newest.glob("model-*.safetensors"))
        raw = bytearray(shard.read_bytes())
        raw[-5] ^= 1
        shard.write_bytes(raw)
        self.assertEqual(self.run_capstan("checkpoint", "verify", str(newest)).returncode, 94)
        done = self.train("damaged", "--set", "run.steps=10")
        self.assertIn("passed over", done.stderr)
        self.assertEqual(self.run_capstan("checkpoint", "verify", "runs/damaged").returncode, 0)


class Stop(Program):
    def stop_with(self, name, number, *arguments):
        process = self.start(name, *LONG, *arguments)
        self.wait_for_step(name, 3, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def test_signals_save_and_the_printed_command_goes_on(self):
        for number, nproc in ((signal.SIGINT, "1"), (signal.SIGTERM, "2"), (signal.SIGUSR1, "2")):
            name = f"stop{number.value}"
            code, _, err = self.stop_with(name, number, "--nproc", nproc)
            self.assertEqual(code, 90, err)
            step = int(re.search(r"saving step (\d+); Ctrl-C again stops at once", err).group(1))
            self.assertIn(f"capstan train tiny.yaml --set run.name={name}", err)
            report = json.loads((self.home / "runs" / name / "exit.json").read_text())
            self.assertEqual((report["code"], report["last_committed_step"]), (90, step))
            self.train(name, "--nproc", nproc, "--set", "checkpoint.interval_steps=none", "--set", f"run.steps={step + 1}")
            self.assert_no_rank_left(name)

    def test_a_killed_rank_ends_the_run_and_is_named(self):
        process = self.start("killed", *LONG, "--nproc", "2")
        self.wait_for_step("killed", 3, process)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "capstan-run"], text=True, capture_output=True).stdout.split()
        victim = next(p for p in ranks if b"RANK=1" in pathlib.Path(f"/proc/{p}/environ").read_bytes().split(b"\0"))
        os.kill(int(victim), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 91, err)
        self.assertIn("rank 1", err)
        self.assertEqual(json.loads((self.home / "runs" / "killed" / "exit.json").read_text())["rank"], 1)
        self.assert_no_rank_left("killed")

    def test_a_killed_launcher_leaves_no_rank(self):
        process = self.start("orphan", *LONG, "--nproc", "2")
        self.wait_for_step("orphan", 2, process)
        process.kill()
        process.communicate(timeout=30)
        self.assert_no_rank_left("orphan")

    def test_a_directory_in_use_is_refused(self):
        process = self.start("used", *LONG)
        self.wait_for_step("used", 1, process)
        for nproc in ("1", "2"):
            done = self.train("used", *LONG, "--nproc", nproc, code=2)
            self.assertIn("another run in it", done.stderr)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, 90)

    def count_steps(self, name):
        file = self.home / "runs" / name / "metrics.jsonl"
        return file.read_text().count('"kind":"step"') if file.exists() else 0

    def test_twenty_seeded_kills_lose_no_bit(self):
        options = ("--nproc", "2", "--set", "run.steps=1500", "--set", "checkpoint.interval_steps=")
        often, seldom = (*options[:-1], options[-1] + "5"), (*options[:-1], options[-1] + "500")
        self.train("clean", *seldom)
        pick = random.Random(20)
        for _ in range(20):  # each gets a few steps further; all together stay below the end of the run
            wanted = self.count_steps("hunted") + pick.randrange(15)
            process = self.start("hunted", *often)
            while self.count_steps("hunted") < wanted and process.poll() is None:
                time.sleep(0.002)
            time.sleep(pick.uniform(0, 0.02))
            ranks = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "capstan-run"], text=True, capture_output=True).stdout.split()
            self.assertIsNone(process.poll())
            os.kill(int(pick.choice(ranks)) if ranks and pick.random() < 0.5 else process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
            self.assert_no_rank_left("hunted")
            if list((self.home / "runs" / "hunted" / "checkpoints").glob("step-????????/manifest.json")):
                self.check("checkpoint", "verify", "runs/hunted")
        self.train("hunted", *seldom)
        self.assertEqual(self.weights("clean", 1500), self.weights("hunted", 1500))


if __name__ == "__main__":
    unittest.main(verbosity=1)
