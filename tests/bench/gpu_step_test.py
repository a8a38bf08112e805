# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""The scripts of tools/bench/gpu_step.sh: classes of kernels in a trace made by hand, and rounds of a program that only says numbers."""
import contextlib
import io
import json
import pathlib
import sys
import tempfile
import unittest

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools" / "bench"
sys.path.insert(0, str(TOOLS))

import gpu_step  # noqa: E402
import kernel_classes  # noqa: E402

NAMES = {
    "nccl": ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
    "gemm": ["nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
             "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>(Params)"],
    "attention": ["void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4>>(pytorch_flash::Flash_fwd_params)",
                  "void capstan::kernels::(anonymous namespace)::rope_rows<__nv_bfloat16, 8>(capstan::kernels::RopeArgs)"],
    "norm": ["void capstan::kernels::norm_forward<float, __nv_bfloat16, __nv_bfloat16, 8, 1, false>(capstan::kernels::NormForwardArgs, RowShape)",
             "void capstan::kernels::(anonymous namespace)::forward_kernel<float>(capstan::kernels::QkNormForwardArgs)"],
    "activation": ["void capstan::kernels::(anonymous namespace)::forward_rows<__nv_bfloat16, Silu, 8>(capstan::kernels::ActivationArgs)"],
    "loss": ["void capstan::kernels::(anonymous namespace)::fused_kernel<float>(capstan::kernels::CrossEntropyArgs)",
             "void capstan::kernels::(anonymous namespace)::gradient_kernel<float>(capstan::kernels::LogitGradientArgs)"],
    "optimizer": ["void capstan::kernels::update_tiles<AdamWUpdate>(capstan::kernels::OptimizerArgs)",
                  "void capstan::kernels::(anonymous namespace)::tile_squares<float>(capstan::kernels::SquaredNormArgs)"],
    "copy": ["void capstan::kernels::(anonymous namespace)::copy_words<uint4>(uint4 const*, uint4*, long)",
             "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>(int)"],
    "other": ["void at::native::vectorized_elementwise_kernel<4, AddFunctor<float>>(int)", "distribution_normal_kernel"],
}


def event(name, begin, length, cat="kernel"):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": length}


class KernelClasses(unittest.TestCase):
    def test_names(self):
        for kind, names in NAMES.items():
            for name in names:
                self.assertEqual(kernel_classes.class_of(name), kind, name)

    def trace(self):
        return {"traceEvents": [
            event("nvjet_tst_64x8", 100, 50), event("nvjet_tst_64x8", 200, 30), event("flash_fwd_kernel", 140, 40), event("gemm on a CPU", 0, 999, "cpu_op"),
            event("Memcpy DtoD", 240, 10, "gpu_memcpy"), {"ph": "M", "cat": "kernel", "name": "process"}]}

    def test_sums(self):
        self.assertEqual(kernel_classes.sum_classes(self.trace()), {"gemm": (80.0, 2), "attention": (40.0, 1), "copy": (10.0, 1)})

    def test_time_of_two_streams_counts_once(self):
        self.assertEqual(kernel_classes.busy_us(kernel_classes.gpu_events(self.trace())), 80 + 30 + 10)

    def test_table(self):
        text = kernel_classes.table(self.trace())
        self.assertIn("| gemm | 0.080 | 61.5 % | 2 |", text)
        self.assertIn("busy for 0.120 of 0.150 ms", text)
        self.assertIn("no GPU kernels", kernel_classes.table({"traceEvents": []}))

    def test_no_trace(self):
        with self.assertRaises(SystemExit) as refused:
            kernel_classes.main(["/dev/null"])
        self.assertIn("need a Chrome trace", str(refused.exception))


# Twice as fast as its peer with the same number of sequences; more of them are faster, eight do not fit.
PROGRAM = """#!{python}
import json, sys
a = dict(text.split("=") for text in sys.argv[1:])
tokens, micro = int(a["samples"]) * int(a["sequence"]), int(a["micro"])
ours = "compile" not in a
result = dict(who="capstan", micro=micro, tokens_per_step=tokens, step_ms=[tokens / micro * (1 if ours else 2)] * int(a["steps"]), first_step_s=1.5,
              processor="a card", peak_flops=1e9, flops_per_token=2e5, parameters=7, keeps="what it keeps",
              predicted=dict(peak_bytes=2**30, card_bytes=2**31), memory=dict(peak_bytes=3 * 2**29, reserved_bytes=0, card_bytes=2**31))
if micro >= 8 and ours:
    result["out_of_memory"] = True
print(json.dumps(result))
"""


class GpuStep(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="gpu step ")
        self.addCleanup(self.folder.cleanup)
        self.out = pathlib.Path(self.folder.name) / "out"
        self.program = pathlib.Path(self.folder.name) / "program"
        self.program.write_text(PROGRAM.format(python=sys.executable))
        self.program.chmod(0o755)

    def bench(self, *arguments):
        """(text, notes); the peer is the program as well."""
        text, notes = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(notes):
            gpu_step.main(["--model", "tiny", "--device", "cpu", "--program", str(self.program), "--out", str(self.out), *arguments])
        return text.getvalue(), notes.getvalue()

    def test_the_best_that_fits_is_measured(self):
        text, notes = self.bench("--peers", "none", "--rounds", "2", "--micro-batches", "16,4,2,8", "--tokens", "1024")
        self.assertIn("Capstan: 8 sequences a pass do not fit the memory: skipped, and what is larger", notes)
        self.assertIn("| Capstan | what it keeps | 4 | 4000 | 1.00 | 80.0 % | 1.50 | 2.00 | 1.50 |", text)
        self.assertIn("peak 1.00 GiB, card 2.00 GiB", text)
        self.assertEqual(text, (self.out / "table.md").read_text())
        runs = [json.loads(line) for line in (self.out / "runs.jsonl").read_text().splitlines()]
        self.assertEqual([r["micro"] for r in runs], [2, 4, 8, 4, 4])

    def test_sides_run_in_turn(self):
        self.assertTrue(gpu_step.PEER.exists())
        self.addCleanup(setattr, gpu_step, "PEER", gpu_step.PEER)
        gpu_step.PEER = self.program
        text, _ = self.bench("--peers", "eager", "--python", sys.executable, "--rounds", "2", "--micro-batches", "4", "--tokens", "1024")
        self.assertIn("| PyTorch eager | what it keeps | 4 | 2000 | 2.00 | 40.0 % |", text)

    def test_another_model_is_no_peer(self):
        peer = self.program.with_name("peer")
        peer.write_text(self.program.read_text().replace("parameters=7", "parameters=8"))
        self.addCleanup(setattr, gpu_step, "PEER", gpu_step.PEER)
        gpu_step.PEER = peer
        with self.assertRaises(SystemExit) as refused:
            self.bench("--peers", "eager", "--python", sys.executable, "--rounds", "1", "--micro-batches", "4", "--tokens", "1024")
        self.assertIn("PyTorch eager has 8 parameters, the side before it 7", str(refused.exception))

    def test_nothing_fits(self):
        with self.assertRaises(SystemExit) as ended:
            self.bench("--peers", "none", "--micro-batches", "8")
        self.assertIn("try --micro-batches 1", str(ended.exception))
        self.assertIn("did not fit", (self.out / "table.md").read_text())

    def test_wrong_words_are_refused(self):
        for wrong in (("--micro-batches", "4,x"), ("--micro-batches", "0"), ("--peers", "jax"), ("--rounds", "0"), ("--model", "gpt5")):
            with self.assertRaises(SystemExit) as refused:
                self.bench(*wrong)
            self.assertEqual(refused.exception.code, 2)

    def test_a_side_that_fails_says_why(self):
        self.program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('the reason')\n")
        with self.assertRaises(SystemExit) as failed:
            self.bench("--peers", "none")
        self.assertIn("the reason", str(failed.exception))


if __name__ == "__main__":
    unittest.main()
