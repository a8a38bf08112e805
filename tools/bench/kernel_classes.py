# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""Sums the GPU time of a Chrome trace by class of kernel.

usage: kernel_classes.py TRACE.json

Reads what Kineto writes (LibTorch, PyTorch): events of kind "X" with a category kernel, gpu_memcpy or gpu_memset; microseconds. A kernel
belongs to the first class whose pattern its name has. Busy time counts moments in which several streams work once."""
import json
import re
import sys

CLASSES = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in (
    ("nccl", r"nccl"),
    ("copy", r"memcpy|memset|\bcopy_(words|bytes)|direct_copy|CatArray|PermuteTokens|FillFunctor"),
    ("attention", r"flash|fmha|attention|rope|softmax_warp"),
    ("loss", r"LogitStats|LogitGradient|CrossEntropy|RescaleSums|FinishStats|cross_entropy|nll_loss|log_?softmax|cunn_SoftMax"),
    ("optimizer", r"OptimizerArgs|BlockwiseArgs|SquaredNorm|DecideStep|adam|lion_|multi_tensor_apply|foreach|lpnorm"),
    ("norm", r"norm(?!al)"),
    ("activation", r"ActivationArgs|silu|swiglu|gelu"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|_mm_|splitK"),
)]


def class_of(name):
    return next((kind for kind, pattern in CLASSES if pattern.search(name)), "other")


def gpu_events(trace):
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    return [e for e in events if e.get("ph") == "X" and str(e.get("cat", "")).lower() in ("kernel", "gpu_memcpy", "gpu_memset")]


def busy_us(events):
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: float(e["ts"])):
        begin, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total


def sum_classes(trace):
    """Class -> (microseconds, count), the largest first."""
    sums = {}
    for event in gpu_events(trace):
        kind = "copy" if event["cat"].lower() != "kernel" else class_of(event["name"])
        time, count = sums.get(kind, (0.0, 0))
        sums[kind] = (time + float(event["dur"]), count + 1)
    return dict(sorted(sums.items(), key=lambda entry: -entry[1][0]))


def table(trace):
    events = gpu_events(trace)
    if not events:
        return "The trace has no GPU kernels: it was made on a CPU, or CUPTI was not loaded.\n"
    sums = sum_classes(trace)
    whole = sum(time for time, _ in sums.values())
    lines = ["| kernels | ms | share | launches |", "|---|---:|---:|---:|"]
    lines += [f"| {kind} | {time / 1e3:.3f} | {100 * time / whole:.1f} % | {count} |" for kind, (time, count) in sums.items()]
    span = max(float(e["ts"]) + float(e["dur"]) for e in events) - min(float(e["ts"]) for e in events)
    lines.append(f"| all | {whole / 1e3:.3f} | 100.0 % | {len(events)} |")
    busy = busy_us(events)
    lines += ["", f"The GPU was busy for {busy / 1e3:.3f} of {span / 1e3:.3f} ms from the first kernel to the last ({100 * busy / span:.1f} %)."]
    others = {}
    for event in events:
        if event["cat"].lower() == "kernel" and class_of(event["name"]) == "other":
            others[event["name"]] = others.get(event["name"], 0.0) + float(event["dur"])
    for name, time in sorted(others.items(), key=lambda entry: -entry[1])[:5]:
        lines.append(f"other: {time / 1e3:.3f} ms {name[:120]}")
    return "\n".join(lines) + "\n"


def main(arguments):
    if len(arguments) != 1:
        sys.exit(__doc__)
    try:
        with open(arguments[0]) as file:
            trace = json.load(file)
        gpu_events(trace)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        sys.exit(f"error: reading {arguments[0]}: got {error!r}, need a Chrome trace in JSON")
    print(table(trace), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
