"""What config files of tiny models have in common."""

from typing import Any

Config = dict[str, Any]


def without(config: Config, *names: str) -> Config:
    """Returns a config that lacks some fields."""
    return {name: value for name, value in config.items() if name not in names}


# What nearly every family's file holds. `pad_token_id` is null throughout: PyTorch would zero the
# gradient of that row of the embedding.
SHARED = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 64,
}
# Of the 8 pairs of a head of 16 these sizes keep the fastest two rotations, divide the slowest by
# `factor` and blend two or three between, where rounding the bounds (`truncate`) shows.
YARN = {
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 128,
    "rope_type": "yarn",
    "truncate": False,
}
# A rotation of wavelength w is kept below original / high, divided by `factor` above original / low
# and blended between. These sizes put frequencies of the 8 pairs into each of the three.
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
