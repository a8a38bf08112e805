# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""A trained model used on a GPU and on the CPU of the same machine."""
import json
import unittest

from cli_program import Program


class Gpu(Program):
    def test_texts_and_losses_of_both_devices_agree(self):
        self.train("used", "--set", "run.device=cpu", "--set", "run.steps=40")
        text = ("generate", "--model", "runs/used", "--prompt", "let the", "--max-tokens", "30", "--ignore-end", "--json")
        held = ("eval", "--model", "runs/used", "--data", "data/held", "--json")
        for choice in (("--greedy",), ("--seed", "3")):
            on_gpu = self.check(*text, *choice, "--device", "cuda")
            self.assertIn("on GPU 0", on_gpu.stderr)
            self.assertEqual(json.loads(on_gpu.stdout), json.loads(self.check(*text, *choice, "--device", "cpu").stdout))
        losses = [json.loads(self.check(*held, "--device", device).stdout)["loss"] for device in ("cuda", "cpu")]
        self.assertAlmostEqual(losses[0], losses[1], delta=1e-4)

    def test_offload_trains_the_same_model(self):
        losses = {}
        offloads = {"plain": (), "activations": ("parallel.offload_activations=true",), "optimizer": ("parallel.zero.offload=optimizer",),
                    "all": ("parallel.zero.stage=3", "parallel.zero.offload=all", "parallel.offload_activations=true")}
        for name, keys in offloads.items():
            sets = [word for key in ("run.device=cuda", "run.deterministic=true", "run.steps=20", *keys) for word in ("--set", key)]
            self.train(name, *sets)
            losses[name] = [self.steps(name)[step]["loss"] for step in range(1, 21)]
        self.assertEqual(losses["activations"], losses["plain"])
        for name in ("optimizer", "all"):
            for got, want in zip(losses[name], losses["plain"]):
                self.assertAlmostEqual(got, want, delta=1e-3)

    def test_auto_takes_the_gpu(self):
        self.train("auto", "--set", "run.device=cpu")
        self.assertIn("on GPU 0", self.check("generate", "--model", "runs/auto", "--prompt", "let", "--max-tokens", "2").stderr)


if __name__ == "__main__":
    unittest.main()
