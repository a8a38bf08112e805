# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""What a user reads who asks for a GPU on a machine without one, or without the plug-in. The driver is one made for tests."""
import os
import re
import unittest

from cli_program import SOURCE, Program

DRIVER = os.environ["FAKE_DRIVER"]


class Device(Program):
    def run_with_driver(self, *arguments, gpus="2", **more):
        return self.run_capstan(*arguments, env={**os.environ, "LD_LIBRARY_PATH": DRIVER, "FAKE_GPUS": gpus, **more})

    def test_doctor_lists_gpus_and_what_is_missing(self):
        done = self.run_with_driver("doctor")
        for words in ("for CUDA up to 13.0", "GPU 0", "GPU 1", "NVIDIA Imagined, 80.0 GiB, compute capability 9.0, 132", "CUDA plug-in"):
            self.assertIn(words, done.stdout)
        self.assertNotIn("GPU 2", done.stdout)

    def test_doctor_warns_of_gpus_without_kernels(self):
        words = "the CUDA plug-in has kernels for 8.x and 9.x"
        self.assertIn(words, self.run_with_driver("doctor", FAKE_MAJOR="12").stdout)
        self.assertNotIn(words, self.run_with_driver("doctor").stdout)

    def test_doctor_says_why_there_is_no_gpu(self):
        self.assertIn("shows no GPU (see CUDA_VISIBLE_DEVICES)", self.run_with_driver("doctor", gpus="0").stdout)
        self.assertIn("does not start: unknown error", self.run_with_driver("doctor", gpus="broken").stdout)

    def test_cuda_without_a_gpu_is_refused_before_anything_starts(self):
        for gpus, why in (("1", "libcapstan_cuda.so: this build computes on CPUs"), ("0", "shows no GPU (see CUDA_VISIBLE_DEVICES)"), ("broken", "does not start: unknown error")):
            done = self.run_with_driver("train", "tiny.yaml", "--nproc", "2", "--set", "run.device=cuda", gpus=gpus)
            self.assertEqual(done.returncode, 2)
            for words in ("run.device", "cuda", "need cpu", why, "capstan doctor shows what is here"):
                self.assertIn(words, done.stderr)
        self.assertFalse((self.home / "runs" / "tiny").exists())

    def test_threads_and_cuda_exclude_each_other(self):
        done = self.run_capstan("train", "tiny.yaml", "--nproc", "2", "--ranks", "threads", "--set", "run.device=cuda")
        self.assertEqual(done.returncode, 2)
        self.assertIn("run.device", done.stderr)

    def test_a_plan_for_gpus_needs_none(self):
        done = self.check("plan", "tiny.yaml", "--world", "2", "--set", "run.device=cuda", "--set", "precision.compute=auto")
        self.assertIn("compute bf16", done.stdout)

    def test_plans_that_recipes_and_help_name_are_made(self):
        files = sorted((SOURCE / "configs").rglob("*.yaml"))
        comments = "\n".join(line for file in files for line in file.read_text().splitlines() if line.startswith("#"))
        commands = re.findall(r"capstan (plan [^`\n]+)", comments + "\n" + self.check("plan", "--help").stdout.partition("Example:")[2])
        self.assertGreaterEqual(len(commands), 10)
        for command in commands:
            with self.subTest(command):
                self.check(*command.split())

    def test_a_model_is_used_where_the_user_says(self):
        self.train("used")
        text = ("generate", "--model", "runs/used", "--prompt", "let the", "--greedy", "--max-tokens", "4")
        for verb in (text, ("eval", "--model", "runs/used", "--data", "data/held", "--samples", "4")):
            by_itself = self.run_with_driver(*verb)
            self.assertEqual(by_itself.returncode, 0, by_itself.stderr)
            self.assertIn("on the CPU", by_itself.stderr)
            self.assertIn("although there is a GPU: no ", by_itself.stderr)
            on_cpu = self.run_with_driver(*verb, "--device", "cpu")
            self.assertEqual((on_cpu.returncode, on_cpu.stdout), (0, by_itself.stdout))
            self.assertNotIn("although", on_cpu.stderr)
            for gpus, missing in (("1", "libcapstan_cuda.so"), ("0", "shows no GPU")):
                refused = self.run_with_driver(*verb, "--device", "cuda", gpus=gpus)
                self.assertEqual(refused.returncode, 2)
                for words in ("--device cuda", missing, "need cpu or auto", "capstan doctor says why"):
                    self.assertIn(words, refused.stderr)
        self.assertEqual(self.run_capstan(*text, "--device", "gpu").returncode, 2)


if __name__ == "__main__":
    unittest.main()
