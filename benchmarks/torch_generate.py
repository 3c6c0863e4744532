"""One measurement of transformers' `generate` with random weights, for `generation.py`.

It runs under any Python with torch and transformers and imports nothing of jaxft. Its argument is
the workload as JSON; it prints one JSON line.
"""

# pyright: reportMissingImports=false, reportCallIssue=false
import json
import platform
import sys
import time


def main() -> None:
    """Times greedy continuations of random prompts."""
    import torch
    import transformers

    workload = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[workload["dtypes"]]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**workload["config"])
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.eval()
    shape = (workload["rows"], workload["length"])
    tokens = torch.randint(0, config.vocab_size, shape, device=device)

    def seconds(new: int) -> float:
        started = time.monotonic()
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] == workload["length"] + new
        if device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started

    seconds(2)
    print(
        json.dumps(
            {
                "seconds": [seconds(workload["new"]) for _ in range(workload["repeats"])],
                "threads": torch.get_num_threads(),
                "device_kind": torch.cuda.get_device_name() if device == "cuda" else "cpu",
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
