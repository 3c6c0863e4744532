"""Config files of the tiny models of families with attention to latents, or with their experts."""

from typing import Any

from tests.oracle.shared import SHARED, YARN, Config, without

_LATENT = {
    "attention_bias": False,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
}
_YARN = without(YARN, "truncate")


def _published(**scales: float) -> Config:
    """Returns rotary settings as published files have them."""
    scaling = without(_YARN, "rope_type") | {"type": "yarn"} | scales
    return {"rope_scaling": scaling, "rope_theta": 1000}


def _deepseek_v3(**changes: Any) -> Config:
    family = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 1,
        "model_type": "deepseek_v3",
        "n_group": 4,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "routed_scaling_factor": 2.5,
        "topk_group": 2,
    }
    return SHARED | _LATENT | family | changes


_DEEPSEEK_V3_CASES = {
    "deepseek_v3_published": without(
        _deepseek_v3(
            ep_size=1,
            moe_layer_freq=1,
            num_experts_per_tok=3,
            num_hidden_layers=2,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            **_published(mscale=1.0, mscale_all_dim=0.7),
        ),
        "rope_parameters",
    ),
    "deepseek_v3_direct_tied": _deepseek_v3(
        first_k_dense_replace=0,
        n_group=1,
        n_shared_experts=2,
        norm_topk_prob=False,
        num_hidden_layers=2,
        q_lora_rank=None,
        rope_interleave=False,
        tie_word_embeddings=True,
        topk_group=1,
    ),
    "deepseek_v3_packed": _deepseek_v3(
        first_k_dense_replace=2,
        num_experts_per_tok=4,
        rope_parameters=_YARN | {"rope_theta": 1000.0},
    ),
}


def _deepseek_v2(**changes: Any) -> Config:
    family = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "first_k_dense_replace": 1,
        "mlp_bias": False,
        "model_type": "deepseek_v2",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    }
    return SHARED | _LATENT | family | changes


_DEEPSEEK_V2_CASES = {
    "deepseek_v2_lite_published": without(
        _deepseek_v2(
            aux_loss_alpha=0.001,
            n_group=1,
            n_shared_experts=2,
            num_experts_per_tok=3,
            num_hidden_layers=2,
            q_lora_rank=None,
            scoring_func="softmax",
            seq_aux=True,
            topk_group=1,
            **_published(mscale=0.707, mscale_all_dim=0.707),
        ),
        "rope_parameters",
    ),
    "deepseek_v2_groups_tied": _deepseek_v2(
        first_k_dense_replace=0,
        n_group=4,
        num_hidden_layers=2,
        routed_scaling_factor=16.0,
        tie_word_embeddings=True,
        topk_group=2,
        topk_method="group_limited_greedy",
    ),
    "deepseek_v2_packed": without(_deepseek_v2(), "num_key_value_heads"),
}


def _glm4_moe_lite(**changes: Any) -> Config:
    family = {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "n_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "topk_group": 1,
        "v_head_dim": 24,
    }
    return SHARED | _LATENT | family | changes


_GLM4_MOE_LITE_CASES = {
    "glm4_moe_lite_published": without(
        _glm4_moe_lite(
            first_k_dense_replace=1,
            num_hidden_layers=2,
            num_nextn_predict_layers=1,
            partial_rotary_factor=1.0,
            rope_scaling=None,
            rope_theta=1000000,
            topk_method="noaux_tc",
        ),
        "rope_parameters",
    ),
    "glm4_moe_lite_sparse_tied": _glm4_moe_lite(
        mlp_layer_types=["sparse", "sparse"],
        n_group=2,
        num_hidden_layers=2,
        q_lora_rank=None,
        tie_word_embeddings=True,
    ),
    "glm4_moe_lite_packed": _glm4_moe_lite(
        mlp_layer_types=["dense", "dense", "sparse"], num_experts_per_tok=3
    ),
}


def _glm4_moe(**changes: Any) -> Config:
    family = {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 20,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": True,
    }
    return SHARED | family | changes


_GLM4_MOE_CASES = {
    "glm4_moe_published": without(
        _glm4_moe(
            num_experts_per_tok=3,
            num_hidden_layers=2,
            partial_rotary_factor=0.5,
            rope_scaling=None,
            rope_theta=1000000,
        ),
        "rope_parameters",
    ),
    "glm4_moe_sparse_mha_tied": _glm4_moe(
        attention_bias=False,
        first_k_dense_replace=0,
        n_shared_experts=2,
        num_hidden_layers=2,
        num_key_value_heads=4,
        routed_scaling_factor=2.5,
        tie_word_embeddings=True,
        use_qk_norm=False,
    ),
    "glm4_moe_packed": _glm4_moe(
        first_k_dense_replace=2, n_group=4, num_experts_per_tok=4, topk_group=3
    ),
}
LATENT = {
    **_DEEPSEEK_V3_CASES,
    **_DEEPSEEK_V2_CASES,
    **_GLM4_MOE_LITE_CASES,
    **_GLM4_MOE_CASES,
}
