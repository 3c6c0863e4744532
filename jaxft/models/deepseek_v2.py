"""DeepSeek-V2 and V2-Lite: attention to latents, and experts chosen by the softmax of logits."""

from typing import Any

from jaxft.models.config import DecoderConfig
from jaxft.models.deepseek_v3 import (
    BLOCKS,
    HF_BLOCK_RULES,
    HF_IGNORED,
    HF_RENAMED,
    HF_RULES,
    in_groups,
    latent_decoder,
    latent_fields,
    routed_experts,
)

__all__ = ["BLOCKS", "HF_BLOCK_RULES", "HF_IGNORED", "HF_RENAMED", "HF_RULES", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = latent_fields(config, n_routed_experts=64, n_shared_experts=2)
    # Weights of the chosen are scaled to a sum of 1 by nobody's code but the authors'.
    fields.require(scoring_func="softmax", norm_topk_prob=False, mlp_bias=False)
    fields.require(rope_interleave=True)
    experts = routed_experts(fields, normalised=False, factor=1.0)
    method = fields.get("topk_method", "greedy")
    if method == "group_limited_greedy":
        experts = in_groups(fields, experts)
    elif method != "greedy":
        fields.problem(
            f"config.json: topk_method is {method!r}; expected 'greedy' or 'group_limited_greedy'."
        )
    fields.unused("n_group", "topk_group")
    return latent_decoder(fields, experts, dense=fields.count("first_k_dense_replace", 0))
