# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""Runs the sides of gpu_step.sh in turn and makes the table.

Each side first tries every micro-batch of the list once and keeps its fastest; what runs out of memory is skipped and said. Then all
sides run in turn, each in a process of its own, and ratios are medians over the pairs of a round. MFU counts the causal FLOPs of the
plan, for every side the same, over the dense bf16 peak of the data sheet; "n/a" where that is unknown. Peak memory is that of the
allocator's tensors, "card" what the driver shows as used. Time to the first step is from the first call to its end, so without loading
libraries, with compilation and choice of kernels. Sides differ in gradients: ours are summed in fp32 over micro-batches, PyTorch's in bf16."""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

MODELS = {  # family hidden ffn layers heads kv_heads vocabulary sequence tied bias (of q, k, v; those of gpt2 are all there)
    "tiny": ("llama", 64, 176, 2, 4, 2, 512, 64, False, True),
    "tiny-gpt2": ("gpt2", 64, 256, 2, 4, 4, 512, 64, True, True),
    "gpt2-124m": ("gpt2", 768, 3072, 12, 12, 12, 50304, 1024, True, True),  # 50257 ids and 47 that fill up a multiple of 64, for all sides
    "124m": ("llama", 768, 2048, 12, 12, 12, 50304, 1024, True, False),
    "qwen2.5-0.5b": ("llama", 896, 4864, 24, 14, 2, 151936, 1024, True, True),
    "qwen2.5-1.5b": ("llama", 1536, 8960, 28, 12, 2, 151936, 1024, True, True),
    "qwen2.5-3b": ("llama", 2048, 11008, 36, 16, 2, 151936, 1024, True, True),
    "qwen2.5-7b": ("llama", 3584, 18944, 28, 28, 4, 152064, 1024, False, True),
}
KEYS = ("family", "hidden", "ffn", "layers", "heads", "kv_heads", "vocabulary", "sequence", "tied", "bias")
PEER = pathlib.Path(__file__).with_name("gpu_step_peer.py")
NAMES = {"capstan": "Capstan", "eager": "PyTorch eager", "compile": "torch.compile"}


def parse(arguments):
    shapes = "\n".join(f"  {name:14}{' '.join(f'{key}={value}' for key, value in zip(KEYS, shape))}" for name, shape in MODELS.items())
    parser = argparse.ArgumentParser(prog="gpu_step.sh", description=__doc__, epilog=f"models with the shapes of "
                                     f"the published configurations:\n{shapes}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="124m")
    parser.add_argument("--dtype", choices=("bf16", "fp8", "fp32"), default="bf16", help="of ours; peers compute in bf16 beside fp8")
    parser.add_argument("--graphs", action="store_true", help="ours with run.graphs")
    parser.add_argument("--micro-batches", default="4,8,16,32", help="sequences per pass to try")
    parser.add_argument("--tokens", type=int, default=524288, help="per optimizer step, rounded down to whole micro-batches")
    parser.add_argument("--peers", default="eager,compile", help="or none")
    parser.add_argument("--gemm", choices=("auto", "libtorch", "cublaslt"), default="auto", help="of ours, as run.gemm")
    parser.add_argument("--states", choices=("fp32", "low"), default="fp32", help="of the peers: fp32 master and moments, or none and bf16")
    parser.add_argument("--moments", choices=("auto", "bf16", "int8"), default="auto", help="of ours, as optimizer.moments")
    parser.add_argument("--recompute", choices=("none", "block"), default="none", help="of all sides: layers run again in the backward")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a round, after 3 that are not")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--trace", action="store_true", help="a Chrome trace of one more step of ours, by kernel_classes.py")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_step_results"), help="folder of table, JSON lines and trace")
    parser.add_argument("--program", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--python", default=sys.executable, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.micro_batches = sorted({int(text) for text in options.micro_batches.split(",")})
        if min(options.micro_batches) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--micro-batches: got {options.micro_batches}, need numbers from 1, such as 4,8")
    options.peers = [] if options.peers == "none" else options.peers.split(",")
    if unknown := [peer for peer in options.peers if peer not in ("eager", "compile")]:
        parser.error(f"--peers: got {unknown[0]}, need none, or eager and compile")
    if not pathlib.Path(options.program).is_file():
        parser.error(f"no {options.program}: build it without --no-build, or set CAPSTAN_BUILD_DIR")
    if min(options.rounds, options.steps, options.tokens) < 1:
        parser.error("--rounds, --steps and --tokens: need at least 1")
    return options


class Bench:
    def __init__(self, options):
        self.options = options
        self.shape = dict(zip(KEYS, MODELS[options.model]))
        options.out.mkdir(parents=True, exist_ok=True)
        self.runs = options.out / "runs.jsonl"
        self.runs.write_text("")
        self.parameters = None  # of all sides

    def arguments(self, who, micro, more):
        o = self.options
        samples = max(1, o.tokens // self.shape["sequence"] // micro) * micro
        keys = {**self.shape, "device": o.device, "micro": micro, "samples": samples, "steps": o.steps,
                "recompute": o.recompute, **more}
        if who == "capstan":
            keys.update(dtype=o.dtype, graphs=o.graphs, gemm=o.gemm, moments=o.moments)
        else:
            keys.update(dtype="bf16" if o.dtype == "fp8" else o.dtype, compile=who == "compile", states=o.states)
        return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]

    def run(self, who, micro, **more):
        program = [self.options.program] if who == "capstan" else [self.options.python, str(PEER)]
        done = subprocess.run([*program, *self.arguments(who, micro, more)], text=True, capture_output=True)
        if done.returncode != 0:
            sys.exit(f"error: {NAMES[who]} with {micro} sequences a pass ended with {done.returncode}:\n{done.stderr[-4000:]}")
        result = {**json.loads(done.stdout.splitlines()[-1]), "model": self.options.model, "device": self.options.device}
        self.parameters = self.parameters or result["parameters"]
        if result["parameters"] != self.parameters:
            sys.exit(f"error: {NAMES[who]} has {result['parameters']} parameters, the side before it {self.parameters}: not the same model")
        with open(self.runs, "a") as file:
            file.write(json.dumps(result) + "\n")
        return result

    def best_micro_batch(self, who):
        sizes = self.options.micro_batches
        speeds = {}
        for micro in sizes if len(sizes) > 1 else []:
            result = self.run(who, micro, steps=1)
            if result.get("out_of_memory"):
                print(f"{NAMES[who]}: {micro} sequences a pass do not fit the memory: skipped, and what is larger", file=sys.stderr)
                break
            speeds[micro] = speed(result)
        if len(sizes) == 1:
            return sizes[0]
        return max(speeds, key=speeds.get) if speeds else None

    def rounds(self):
        """Who -> results, in turn."""
        chosen = {who: self.best_micro_batch(who) for who in ["capstan", *self.options.peers]}
        results = {who: [] for who in chosen}
        for number in range(self.options.rounds):
            print(f"round {number + 1} of {self.options.rounds}", file=sys.stderr)
            for who, micro in chosen.items():
                if micro is None:
                    continue
                result = self.run(who, micro)
                if result.get("out_of_memory"):
                    print(f"{NAMES[who]}: {micro} sequences a pass do not fit the memory, left out", file=sys.stderr)
                    chosen[who] = None
                else:
                    results[who].append(result)
        return results


def speed(result):
    return result["tokens_per_step"] / statistics.median(result["step_ms"]) * 1e3


def gib(number):
    return "n/a" if number is None else f"{number / 2**30:.2f}"


def table(options, results):
    ours = results["capstan"]
    first = ours[0] if ours else {}
    peak, flops = first.get("peak_flops"), first.get("flops_per_token")
    of_peak = f"{peak * 1e-12:.0f} TFLOP/s dense bf16" if peak else "n/a, no data-sheet peak for it"
    lines = [f"{options.model}, {options.dtype}{', graphs' if options.graphs else ''}, {first.get('processor', '?')} (MFU over {of_peak}), "
             f"{options.rounds} rounds in turn, medians", "",
             "| | kept | sequences a pass | tokens/s | Capstan / it | MFU causal | peak GiB | card GiB | first step s |",
             "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for who, runs in results.items():
        if not runs:
            lines.append(f"| {NAMES[who]} | | did not fit | n/a | n/a | n/a | n/a | n/a | n/a |")
            continue
        speeds = [speed(r) for r in runs]
        ratio = statistics.median(speed(a) / b for a, b in zip(ours, speeds)) if ours else None
        mfu = f"{100 * statistics.median(speeds) * flops / peak:.1f} %" if peak and flops else "n/a"
        memory = {key: max((r["memory"][key] for r in runs if r["memory"][key] is not None), default=None) for key in ("peak_bytes", "card_bytes")}
        lines.append(f"| {NAMES[who]} | {runs[0]['keeps']} | {runs[0]['micro']} | {statistics.median(speeds):.0f} | "
                     f"{'n/a' if ratio is None else f'{ratio:.2f}'} | {mfu} | {gib(memory['peak_bytes'])} | {gib(memory['card_bytes'])} | "
                     f"{statistics.median(r['first_step_s'] for r in runs):.2f} |")
    if ours:
        predicted = first["predicted"]
        lines += ["", f"Predicted by the plan: peak {gib(predicted['peak_bytes'])} GiB, card {gib(predicted['card_bytes'])} GiB. "
                      f"{first['tokens_per_step']} tokens a step, {first['parameters']} parameters."]
    return "\n".join(lines) + "\n"


def main(arguments):
    options = parse(arguments)
    bench = Bench(options)
    results = bench.rounds()
    text = table(options, results)
    if options.trace and results["capstan"]:
        import kernel_classes
        trace = options.out / "trace.json"
        bench.run("capstan", results["capstan"][0]["micro"], steps=1, trace=trace)
        text += "\n" + kernel_classes.table(json.loads(trace.read_text()))
    (options.out / "table.md").write_text(text)
    print(text, end="")
    if not results["capstan"]:
        sys.exit("error: no micro-batch of the list fits the memory; try --micro-batches 1")


if __name__ == "__main__":
    main(sys.argv[1:])
