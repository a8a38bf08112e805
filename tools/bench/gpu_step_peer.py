# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""The peer of gpu_step.sh: the same model as transformers' LlamaForCausalLM, with biases Qwen2ForCausalLM, or GPT2LMHeadModel, eager or compiled, with
the same keys as gpu_step.

Keeps what ours keeps: fp32 master weights and fp32 moments in torch's fused AdamW, beside bf16 weights without autocast (states=fp32);
gradients stay in the type of the weights over the micro-batches of a step, ours are summed in fp32. states=low has the optimizer work on
the bf16 weights themselves, with moments of their type."""
import json
import resource
import sys
import time

import torch
import transformers

DEFAULTS = dict(family="llama", device="cuda", dtype="bf16", micro="4", samples="8", sequence="1024", hidden="768", ffn="2048", layers="12", heads="12",
                kv_heads="12", vocabulary="50304", tied="false", bias="false", steps="4", warmup="3", threads="auto", compile="false", states="fp32",
                recompute="none")


def make_config(a):
    shared = dict(vocab_size=int(a["vocabulary"]), tie_word_embeddings=a["tied"] == "true", use_cache=False, attn_implementation="sdpa")
    if a["family"] == "gpt2":
        return transformers.GPT2Config(
            n_embd=int(a["hidden"]), n_inner=int(a["ffn"]), n_layer=int(a["layers"]), n_head=int(a["heads"]), n_positions=int(a["sequence"]),
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared)
    has_bias = a["bias"] == "true"  # of q, k and v alone
    return (transformers.Qwen2Config if has_bias else transformers.LlamaConfig)(
        hidden_size=int(a["hidden"]), intermediate_size=int(a["ffn"]), num_hidden_layers=int(a["layers"]), num_attention_heads=int(a["heads"]),
        num_key_value_heads=int(a["kv_heads"]), max_position_embeddings=int(a["sequence"]), **shared)


def make_model(a, dtype):
    config = make_config(a)
    with torch.device(a["device"]):
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()
    if a["recompute"] == "block":
        model.gradient_checkpointing_enable()
    return model


class Optimizer:
    def __init__(self, parameters, keeps_master):
        self.parameters = parameters
        self.master = [p.detach().float().clone() for p in parameters] if keeps_master else parameters
        self.adamw = torch.optim.AdamW(self.master, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if self.master is not self.parameters:
            for master, parameter in zip(self.master, self.parameters):
                master.grad = parameter.grad.float()
                parameter.grad = None
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.master is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.master)


def measure(a, result):
    on_gpu = a["device"] == "cuda"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[a["dtype"]]
    micro, sequence = int(a["micro"]), int(a["sequence"])
    count = int(a["samples"]) // micro
    model = make_model(a, dtype)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    keeps_master = a["states"] == "fp32" and dtype != torch.float32
    optimizer = Optimizer(list(model.parameters()), keeps_master)
    states = "fp32" if keeps_master or dtype == torch.float32 else a["dtype"]
    result["keeps"] = f"{a['dtype']}, {'master fp32' if keeps_master else 'no master'}, gradients {a['dtype']}, moments {states}"
    forward = torch.compile(model) if a["compile"] == "true" else model
    ids = [torch.randint(int(a["vocabulary"]), (micro, sequence), device=a["device"]) for _ in range(count)]

    def step():
        total = 0
        for row in ids:
            loss = forward(input_ids=row, labels=row).loss / count
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return float(total)  # waits

    start, times = time.perf_counter(), []
    for i in range(int(a["warmup"]) + int(a["steps"])):
        begin = time.perf_counter()
        result["loss"] = step()
        if on_gpu:
            torch.cuda.synchronize()
        if i == 0:
            result["first_step_s"] = time.perf_counter() - start
        if i >= int(a["warmup"]):
            times.append((time.perf_counter() - begin) * 1e3)
    result["step_ms"] = times
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        result["memory"] = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved(),
                            "card_bytes": total - free}
    else:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result["memory"] = {"peak_bytes": None, "reserved_bytes": resident, "card_bytes": None}


def main(arguments):
    a = dict(DEFAULTS)
    for text in arguments:
        key, _, value = text.partition("=")
        if key not in a:
            sys.exit(f"error: got {text!r}, need KEY=VALUE with one of {', '.join(a)}")
        a[key] = value
    torch.manual_seed(1)
    if a["threads"] != "auto":
        torch.set_num_threads(int(a["threads"]))
    result = {"who": "compile" if a["compile"] == "true" else "eager", "micro": int(a["micro"]),
              "tokens_per_step": int(a["samples"]) * int(a["sequence"]), "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        measure(a, result)
    except torch.OutOfMemoryError:
        result["out_of_memory"] = True
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
