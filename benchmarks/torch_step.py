"""One measurement of a plain PyTorch loop over Hugging Face's Llama, for `train_step.py`.

It runs under any Python with torch and transformers and imports nothing of jaxft. Its argument is
the workload as JSON; it prints one JSON line.
"""

# pyright: reportMissingImports=false, reportCallIssue=false
import json
import platform
import resource
import sys
import time


def main() -> None:
    """Times full fine-tuning with torch's fused AdamW."""
    import torch
    import transformers

    workload = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[workload["dtypes"]]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**workload["config"], attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).to(device=device, dtype=dtype)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    shape = (workload["rows"], workload["length"])
    tokens = torch.randint(0, config.vocab_size, shape, device=device)

    def step() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    started = time.monotonic()
    step()
    wait()
    first_step_seconds = time.monotonic() - started
    step()
    wait()
    started = time.monotonic()
    for _ in range(workload["steps"]):
        loss = step()
    wait()
    seconds = (time.monotonic() - started) / workload["steps"]
    count = shape[0] * shape[1]
    print(
        json.dumps(
            {
                "measurement": "train_step",
                "system": "torch",
                "shape": workload["shape"],
                "parameters": sum(p.numel() for p in model.parameters()),
                "rows": shape[0],
                "length": shape[1],
                "packed": False,
                "dtypes": workload["dtypes"],
                "attention": "sdpa",
                "step_seconds": round(seconds, 4),
                "tokens_per_second": round(count / seconds, 1),
                "trained_tokens_per_second": round((count - shape[0]) / seconds, 1),
                "first_step_seconds": round(first_step_seconds, 2),
                "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "device_peak_bytes": (
                    torch.cuda.max_memory_allocated() if device == "cuda" else None
                ),
                "loss": round(loss.item(), 4),
                "threads": torch.get_num_threads(),
                "packages": {
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
