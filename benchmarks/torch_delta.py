"""One measurement of transformers' gated delta rule in PyTorch, for `delta.py`.

It runs under any Python with torch and transformers and imports nothing of jaxft. Its argument is
the work as JSON; it prints one JSON line.
"""

# pyright: reportMissingImports=false
import json
import platform
import sys
import time

import torch
import transformers
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule


def main() -> None:
    """Times the rule forward, and with its gradients."""
    work = json.loads(sys.argv[1])
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[work["dtype"]]
    torch.manual_seed(0)
    tokens = (work["rows"], work["length"])

    def leaf(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*tokens, *sizes, dtype=dtype)

    keys, heads, size = work["keys"], work["heads"], work["size"]
    arrays = [
        *(leaf(count, size) for count in (keys, keys, heads)),
        -torch.rand(*tokens, heads),
        torch.rand(*tokens, heads),
    ]
    pulled = leaf(heads, size)

    def forward(arrays: list[torch.Tensor]) -> torch.Tensor:
        settings = {"chunk_size": work["chunk"], "use_qk_l2norm_in_kernel": True}
        return torch_chunk_gated_delta_rule(*arrays, **settings)[0]

    @torch.inference_mode()
    def plain() -> None:
        forward(arrays)

    def passes() -> None:
        leaves = [x.detach().requires_grad_() for x in arrays]
        forward(leaves).backward(pulled)

    def seconds(step) -> tuple[float, float]:
        step()
        started, worked = time.monotonic(), time.process_time()
        for _ in range(work["steps"]):
            step()
        passed = time.monotonic() - started, time.process_time() - worked
        return passed[0] / work["steps"], passed[1] / work["steps"]

    (once, forward_cores), (both, cores) = seconds(plain), seconds(passes)
    count = work["rows"] * work["length"]
    record = {
        "forward_seconds": round(once, 6),
        "step_seconds": round(both, 6),
        "forward_core_seconds": round(forward_cores, 6),
        "core_seconds": round(cores, 6),
        "forward_tokens_per_second": round(count / once, 1),
        "tokens_per_second": round(count / both, 1),
        "threads": torch.get_num_threads(),
        "packages": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
