"""One measurement of a plain PyTorch loop over a model of Hugging Face, for `train_step.py`.

It runs under any Python with torch and transformers and imports nothing of jaxft. Its argument is
the work as JSON; it prints one JSON line.
"""

# pyright: reportMissingImports=false, reportCallIssue=false
import json
import math
import platform
import resource
import sys
import time

import torch
import transformers


class LowRank(torch.nn.Module):
    """A linear layer that stays as it is, with a low-rank adapter beside it."""

    def __init__(self, base: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        bound = 1 / math.sqrt(base.in_features)
        a = torch.empty(rank, base.in_features).uniform_(-bound, bound)
        self.a = torch.nn.Parameter(a)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the product with the layer, and the adapter's part of it."""
        narrow = torch.nn.functional.linear(x, self.a)
        return self.base(x) + torch.nn.functional.linear(narrow * self.scale, self.b)


def add_adapters(model: torch.nn.Module, rank: int, alpha: float) -> None:
    """Freezes a model, and gives every linear layer of its blocks an adapter."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in list(block.modules()):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, LowRank(child, rank, alpha))


def main() -> None:
    """Times fine-tuning with torch's fused AdamW, or evaluation."""
    work = json.loads(sys.argv[1])
    described = work["described"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[described["dtypes"]]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**work["config"])
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        if work["rank"]:
            add_adapters(model, work["rank"], work["alpha"])
    model.train(work["trains"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), fused=True)
    shape = (described["rows"], described["length"])
    tokens = torch.randint(0, config.vocab_size, shape, device=device)

    def train() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    @torch.inference_mode()
    def evaluate() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    step = train if work["trains"] else evaluate

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
    for _ in range(work["steps"]):
        loss = step()
    wait()
    seconds = (time.monotonic() - started) / work["steps"]
    count = shape[0] * shape[1]
    record = {
        "measurement": "train_step" if work["trains"] else "evaluation",
        "system": "torch",
        **described,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in trained),
        "packed": False,
        "attention": "sdpa",
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(count / seconds, 1),
        "trained_tokens_per_second": round((count - shape[0]) / seconds, 1),
        "first_step_seconds": round(first_step_seconds, 2),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "loss": round(loss.item(), 4),
        "threads": torch.get_num_threads(),
        "device_kind": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "packages": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
