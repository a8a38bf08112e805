# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a device, one process each, against those of the CPU and against each other: class DeviceRuns, which needs a GPU. With
TEST_DEVICE=cpu it runs what a CPU can of it, which shows that the comparisons are right. Class DevicePlans plans the same recipes anywhere."""
import os
import unittest

from cli_program import FP64, Program

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
BF16 = "precision.compute=bf16"
EXPERTS = ("model={family: moe, experts: {count: 8, per_token: 2, shared_intermediate_size: 64, auxiliary_loss: 0.01, z_loss: 1.0e-3}}",)
IN_BACKWARD = ("batch.micro_samples=8", "optimizer.max_grad_norm=none")
SOPHIA = ("optimizer={name: sophia, betas: [0.965, 0.99], sophia: {rho: 0.05, interval: 3}}",)
WIDE = ("model.hidden_size=256", "model.intermediate_size=256")  # 8-bit moments are kept in blocks of 256

MODELS = {
    "plain": (),
    "documents": ("data.documents=separate", "model.sliding_window=12"),
    "qk_norm": ("model.qk_norm=true", "model.attention_bias=true"),
    "gpt2": ("model={family: gpt2, num_key_value_heads: auto}",),
    "experts": EXPERTS,
}
EXACT = {  # fp64
    **MODELS,
    "recompute": ("parallel.recompute={mode: selective, parts: [attention, mlp, norm]}",),
    "in_backward": (*IN_BACKWARD, "optimizer.in_backward=true"),
    "lion": ("optimizer={name: lion, lr: 1.0e-3}",),
    "sophia": SOPHIA,
}
NARROW = {
    **{name: (BF16, *keys) for name, keys in MODELS.items()},
    "fp16": ("precision.compute=fp16",),
    "cublaslt": (BF16, "run.gemm=cublaslt"),
    "moments_bf16": (BF16, "optimizer.moments=bf16"),
    "moments_int8": (BF16, "optimizer.moments=int8", *WIDE),
    "fp8_tensor": (BF16, "precision.fp8.scaling=tensor"),
    "fp8_row": (BF16, "precision.fp8={scaling: row, gradients: e4m3}"),
    "fp8_delayed": (BF16, "precision.fp8={scaling: delayed, history: 4}"),
}
LAUNCHED = {**NARROW, "fp32": (), "fp64": FP64, "sophia": (BF16, *SOPHIA), "in_backward": (BF16, *IN_BACKWARD, "optimizer.in_backward=true")}


def words_of(keys):
    """fp64 comes as words of the command line, other keys without --set."""
    return [word for key in keys for word in (("--set", key) if key not in FP64 else (key,))]


class DevicePlans(Program):
    def test_every_recipe_is_legal_on_a_gpu(self):
        recipes = [*((*FP64, *keys) for keys in EXACT.values()), *NARROW.values(), *((*keys, "run.graphs=true") for keys in LAUNCHED.values())]
        for keys in recipes:
            with self.subTest(keys):
                self.check("plan", "tiny.yaml", "--gpu-memory", "80", *words_of(("run.device=cuda", "run.deterministic=true", *keys)))


class DeviceRuns(Program):
    def run_of(self, name, *keys, device=DEVICE):
        """Losses by step, and the weights behind the last one."""
        self.train(name, *words_of((f"run.device={device}", "run.deterministic=true", *keys)))
        steps = self.steps(name)
        self.assertEqual(sorted(steps), list(range(1, 9)))
        return [steps[step]["loss"] for step in sorted(steps)], self.weights(name, 8)

    def assert_same_bits(self, name, got, want):
        self.assertEqual(got[0], want[0], name)
        self.assertEqual(sorted(got[1]), sorted(want[1]), name)
        self.assertEqual([key for key in want[1] if got[1][key] != want[1][key]], [], name)

    def assert_close(self, name, got, want, most):
        for step, (a, b) in enumerate(zip(got, want), start=1):
            self.assertLessEqual(abs(a - b), most * abs(b), f"{name}, step {step}: {got} and {want}")

    def test_losses_in_fp64_are_those_of_the_cpu(self):
        for name, keys in EXACT.items():
            with self.subTest(name):
                want, _ = self.run_of(f"{name}-cpu", *FP64, *keys, device="cpu")
                got, _ = self.run_of(f"{name}-fp64", *FP64, *keys)
                self.assert_close(name, got, want, 1e-9)
                self.assertLess(got[-1], got[0])

    def test_losses_in_fp32_are_those_of_the_cpu(self):
        for name, keys in MODELS.items():
            with self.subTest(name):
                want, _ = self.run_of(f"{name}-cpu32", *keys, device="cpu")
                got, _ = self.run_of(f"{name}-fp32", *keys)
                self.assert_close(name, got, want, 1e-3)

    # The CPU's run of the same recipe rounds elsewhere; a wrong scale, a lost sum or a wrong mask is far beyond.
    def test_narrow_losses_are_close_to_fp32_of_the_cpu(self):
        exact = {}
        for name, keys in NARROW.items():
            with self.subTest(name):
                plain = tuple(key for key in keys if not key.startswith(("precision.", "run.", "optimizer.moments")))
                if plain not in exact:
                    exact[plain], _ = self.run_of(f"{name}-exact", *plain, device="cpu")
                if DEVICE == "cpu":
                    keys = [key for key in keys if not key.startswith("run.")]
                got, _ = self.run_of(f"{name}-narrow", *keys)
                self.assert_close(name, got, exact[plain], 0.03)

    def test_the_same_run_twice_has_the_same_bits(self):
        for name in ("plain", "documents", "experts", "fp8_tensor", "moments_bf16"):
            with self.subTest(name):
                first, second = (self.run_of(f"{name}-{turn}", *NARROW[name]) for turn in ("first", "second"))
                self.assert_same_bits(name, first, second)

    def test_the_optimizer_in_the_backward_has_the_same_bits(self):
        behind = self.run_of("behind", BF16, *IN_BACKWARD)
        self.assert_same_bits("in_backward", self.run_of("within", BF16, *IN_BACKWARD, "optimizer.in_backward=true"), behind)

    @unittest.skipIf(DEVICE == "cpu", "graphs are a GPU's")
    def test_launched_steps_have_the_bits_of_ordinary_ones(self):
        for name, keys in LAUNCHED.items():
            with self.subTest(name):
                ordinary = self.run_of(f"{name}-ordinary", *keys)
                self.assert_same_bits(name, self.run_of(f"{name}-graphs", *keys, "run.graphs=true"), ordinary)

    def test_a_run_goes_on_with_the_same_bits(self):
        whole = self.run_of("whole", BF16)
        keys = words_of((f"run.device={DEVICE}", "run.deterministic=true", BF16))
        self.train("halves", *keys, "--set", "run.steps=4")
        self.train("halves", *keys)
        steps = self.steps("halves")
        self.assert_same_bits("resume", ([steps[step]["loss"] for step in range(1, 9)], self.weights("halves", 8)), whole)


if __name__ == "__main__":
    unittest.main()
