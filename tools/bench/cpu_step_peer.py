# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""The peer of cpu_step.sh: the same model in PyTorch eager (Hugging Face Llama, SDPA, fused AdamW, clipping; bf16 by autocast).

usage: cpu_step_peer.py DTYPE THREADS STEPS [hidden ffn layers heads kv_heads vocab sequence batch]
"""
import contextlib
import json
import os
import resource
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def seconds_since_process_start():
    with open("/proc/uptime") as f:
        uptime = float(f.read().split()[0])
    with open("/proc/self/stat") as f:
        started = int(f.read().rsplit(")", 1)[1].split()[19])
    return uptime - started / os.sysconf("SC_CLK_TCK")


def main():
    dtype, threads, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    defaults = [512, 1408, 8, 8, 4, 8192, 512, 4]
    given = [int(a) for a in sys.argv[4:]]
    hidden, ffn, layers, heads, kv_heads, vocab, length, batch = given + defaults[len(given):]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, max_position_embeddings=length, tie_word_embeddings=False, use_cache=False,
                         attn_implementation="sdpa")
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    cast = torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()
    times, first = [], None
    for step in range(steps + 2):
        begin = time.perf_counter()
        row = ((torch.arange(batch * (length + 1)) * 2654435761 + step * 40503) >> 7).remainder(vocab).view(batch, length + 1)
        with cast:
            logits = model(row[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, vocab).float(), row[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first = first or seconds_since_process_start()
        times.append((time.perf_counter() - begin) * 1e3)
    print(json.dumps({"step_ms": [round(t, 2) for t in times[2:]], "tokens_per_step": batch * length, "first_step_s": round(first, 2),
                      "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), "loss": loss.item()}))


if __name__ == "__main__":
    main()
