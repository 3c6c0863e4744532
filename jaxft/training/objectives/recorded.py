"""The names that records of a run hold by themselves. Pages of a server read them without jax."""

RECORDED = frozenset(
    "step dataset digest loss weight tokens trained_tokens rows of_rows documents "
    "learning_rate grad_norm seconds tokens_per_second mfu mfu_full "
    "host_memory host_memory_peak device_memory device_memory_peak "
    "expert_balance expert_unused expert_dropped expert_busiest "
    "perplexity bits_per_byte exact_match label_accuracy labels".split()
)
"""What the records of a run hold by themselves, in metrics.jsonl or eval.jsonl."""
