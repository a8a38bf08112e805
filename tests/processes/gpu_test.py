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

    def test_auto_takes_the_gpu(self):
        self.train("auto", "--set", "run.device=cpu")
        self.assertIn("on GPU 0", self.check("generate", "--model", "runs/auto", "--prompt", "let", "--max-tokens", "2").stderr)


if __name__ == "__main__":
    unittest.main()
