"""Config files of the tiny models of families that are composed of parts the others have."""

from typing import Any

from tests.oracle.shared import LLAMA3, SHARED, YARN, Config, without

# Of the settings of kinds of layer transformers does not read whether pairs are rounded.
_YARN = without(YARN, "truncate")


def _olmo3(**changes: Any) -> Config:
    family = {
        "architectures": ["Olmo3ForCausalLM"],
        "attention_bias": False,
        "layer_types": ["sliding_attention", "full_attention"],
        "model_type": "olmo3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000.0} | _YARN,
            "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
        },
        "sliding_window": 6,
    }
    return SHARED | family | changes


_OLMO3_CASES = {
    "olmo3_gqa": _olmo3(),
    "olmo3_mha_tied_published": without(
        _olmo3(
            num_hidden_layers=4,
            num_key_value_heads=2,
            rope_scaling=_YARN | {"attention_factor": 1.2},
            rope_theta=500000,
            tie_word_embeddings=True,
        ),
        "layer_types",
        "rope_parameters",
    ),
    "olmo3_packed": _olmo3(sliding_window=4),
}


def _smollm3(**changes: Any) -> Config:
    family = {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "layer_types": ["full_attention", "full_attention"],
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "no_rope_layers": [1, 0],
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    return SHARED | family | changes


_SMOLLM3_CASES = {
    "smollm3_gqa": _smollm3(),
    "smollm3_mha_tied_published": without(
        _smollm3(
            max_window_layers=28,
            no_rope_layer_interval=4,
            num_hidden_layers=4,
            num_key_value_heads=4,
            rope_scaling=None,
            rope_theta=5000000.0,
        ),
        "layer_types",
        "no_rope_layers",
        "rope_parameters",
        "tie_word_embeddings",
    ),
    "smollm3_packed": without(
        _smollm3(no_rope_layers=[0, 1], sliding_window=4, use_sliding_window=True), "layer_types"
    ),
}


def _ministral(**changes: Any) -> Config:
    family = {
        "architectures": ["MinistralForCausalLM"],
        "head_dim": 12,
        "layer_types": ["full_attention", "sliding_attention"],
        "model_type": "ministral",
        "sliding_window": 6,
    }
    return SHARED | family | changes


_MINISTRAL_CASES = {
    "ministral_gqa": _ministral(),
    "ministral_mha_tied": without(
        _ministral(
            num_key_value_heads=4,
            rope_theta=100000000.0,
            sliding_window=3,
            tie_word_embeddings=True,
        ),
        "layer_types",
        "rope_parameters",
    ),
    "ministral_packed": _ministral(sliding_window=4),
}


def _seed_oss(**changes: Any) -> Config:
    family = {
        "architectures": ["SeedOssForCausalLM"],
        "attention_bias": True,
        "attention_out_bias": False,
        "head_dim": 12,
        "mlp_bias": False,
        "model_type": "seed_oss",
        "residual_dropout": 0.1,
        "rms_norm_eps": 1e-6,
    }
    return SHARED | family | changes


_SEED_OSS_CASES = {
    "seed_oss_gqa": _seed_oss(),
    "seed_oss_mha_tied_published": without(
        _seed_oss(
            num_key_value_heads=4,
            rope_scaling={"rope_type": "default"},
            rope_theta=10000000.0,
            tie_word_embeddings=True,
        ),
        "rope_parameters",
    ),
    "seed_oss_packed": _seed_oss(num_key_value_heads=1),
}


def _granite(**changes: Any) -> Config:
    family = {
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 6.0,
        "logits_scaling": 0.7,
        "mlp_bias": False,
        "model_type": "granite",
        "residual_multiplier": 0.22,
    }
    return SHARED | family | changes


_GRANITE_CASES = {
    "granite_gqa": _granite(),
    "granite_mha_tied_published": without(
        _granite(
            num_key_value_heads=4,
            rope_scaling=None,
            rope_theta=5000000.0,
            tie_word_embeddings=True,
        ),
        "attention_multiplier",
        "embedding_multiplier",
        "rope_parameters",
    ),
    "granite_packed": without(
        _granite(num_key_value_heads=1), "logits_scaling", "residual_multiplier"
    ),
}


def _glm(**changes: Any) -> Config:
    family = {
        "architectures": ["GlmForCausalLM"],
        "attention_bias": True,
        "head_dim": 8,
        "model_type": "glm",
        "rms_norm_eps": 1.5625e-7,
        "rope_parameters": {
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
    }
    return SHARED | family | changes


def _glm4(**changes: Any) -> Config:
    return _glm(architectures=["Glm4ForCausalLM"], model_type="glm4", **changes)


_GLM_CASES = {
    "glm_gqa": _glm(),
    "glm_mha_tied_published": without(
        _glm(head_dim=12, num_key_value_heads=4, rope_theta=10000.0, tie_word_embeddings=True),
        "attention_bias",
        "rope_parameters",
    ),
    "glm_packed": _glm(num_key_value_heads=1),
    "glm4_gqa": _glm4(),
    "glm4_unbiased_tied_published": without(
        _glm4(
            attention_bias=False,
            partial_rotary_factor=1.0,
            rope_theta=10000.0,
            tie_word_embeddings=True,
        ),
        "rope_parameters",
    ),
    "glm4_packed": _glm4(num_key_value_heads=1),
}


def _exaone4(**changes: Any) -> Config:
    family = {
        "architectures": ["Exaone4ForCausalLM"],
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "model_type": "exaone4",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_theta": 10000.0} | LLAMA3,
        "sliding_window": 6,
        "sliding_window_pattern": "LG",
    }
    return SHARED | family | changes


_EXAONE4_CASES = {
    "exaone4_gqa": _exaone4(),
    "exaone4_full_tied_published": without(
        _exaone4(
            layer_types=["full_attention", "full_attention"],
            rope_scaling=LLAMA3,
            rope_theta=10000.0,
            sliding_window=None,
            sliding_window_pattern=None,
            tie_word_embeddings=True,
        ),
        "rope_parameters",
    ),
    "exaone4_period_mha": without(
        _exaone4(num_hidden_layers=4, num_key_value_heads=2, sliding_window_pattern=3),
        "layer_types",
    ),
    "exaone4_packed": _exaone4(sliding_window=4),
}


def _cohere(**changes: Any) -> Config:
    family = {
        "architectures": ["CohereForCausalLM"],
        "attention_bias": False,
        "layer_norm_eps": 1e-5,
        "logit_scale": 1.5,
        "model_type": "cohere",
        "tie_word_embeddings": True,
        "use_qk_norm": True,
    }
    return without(SHARED | family, "rms_norm_eps") | changes


_COHERE_CASES = {
    "cohere_gqa": _cohere(),
    "cohere_mha_published": without(
        _cohere(
            model_max_length=131072,
            num_key_value_heads=4,
            rope_theta=8000000.0,
        ),
        "logit_scale",
        "rope_parameters",
        "tie_word_embeddings",
        "use_qk_norm",
    ),
    "cohere_packed": _cohere(num_key_value_heads=1, tie_word_embeddings=False),
}


def _cohere2(**changes: Any) -> Config:
    family = {
        "architectures": ["Cohere2ForCausalLM"],
        "layer_types": ["sliding_attention", "full_attention"],
        "model_type": "cohere2",
        "sliding_window": 6,
    }
    return without(_cohere() | family, "use_qk_norm") | changes


_COHERE2_CASES = {
    "cohere2_gqa": _cohere2(),
    "cohere2_mha_published": without(
        _cohere2(
            _sliding_window_pattern=4,
            cache_implementation="hybrid",
            layer_switch=4,
            num_hidden_layers=4,
            num_key_value_heads=4,
            order_of_interleaved_layers="local_attn_first",
            position_embedding_type="rope_gptj",
            rope_scaling=None,
            rope_theta=50000,
            rotary_pct=1.0,
            sliding_window_pattern=4,
            use_embedding_sharing=True,
            use_gated_activation=True,
            use_parallel_block=True,
            use_parallel_embedding=True,
        ),
        "layer_types",
        "rope_parameters",
        "tie_word_embeddings",
    ),
    "cohere2_packed": _cohere2(sliding_window=4, tie_word_embeddings=False),
}


_GROWING = {
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "factor": 16.0,
    "llama_4_scaling_beta": 0.3,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 12,
    "rope_theta": 1000.0,
    "rope_type": "yarn",
}


def _ministral3(**changes: Any) -> Config:
    family = {
        "architectures": ["Ministral3ForCausalLM"],
        "head_dim": 16,
        "model_type": "ministral3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": _GROWING,
        "sliding_window": None,
    }
    return SHARED | family | changes


_MINISTRAL3_CASES = {
    "ministral3_gqa": _ministral3(),
    "ministral3_window_tied_published": _ministral3(
        num_key_value_heads=2,
        rope_parameters=_GROWING
        | {"max_position_embeddings": 128, "mscale_all_dim": 1.0, "type": "yarn"},
        sliding_window=7,
        tie_word_embeddings=True,
    ),
    "ministral3_level": _ministral3(
        rope_parameters=without(_GROWING, "mscale") | {"llama_4_scaling_beta": 0.0}
    ),
    "ministral3_packed": _ministral3(
        rope_parameters=_GROWING | {"original_max_position_embeddings": 5}
    ),
}


def _hunyuan(**changes: Any) -> Config:
    family = {
        "architectures": ["HunYuanDenseV1ForCausalLM"],
        "attention_bias": False,
        "eod_token_id": 3,
        "head_dim": 12,
        "model_type": "hunyuan_v1_dense",
    }
    return SHARED | family | changes


_HUNYUAN_CASES = {
    "hunyuan_v1_dense_gqa": _hunyuan(),
    "hunyuan_v1_dense_stretched_tied_published": without(
        _hunyuan(
            num_key_value_heads=4,
            rope_scaling={
                "alpha": 50.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "type": "dynamic",
            },
            rope_theta=10000.0,
            tie_word_embeddings=True,
            use_cla=False,
            use_qk_norm=True,
        ),
        "rope_parameters",
    ),
    "hunyuan_v1_dense_packed": _hunyuan(num_key_value_heads=1),
}


def _nanochat(**changes: Any) -> Config:
    family = {
        "architectures": ["NanoChatForCausalLM"],
        "attention_bias": False,
        "final_logit_softcapping": 3.0,
        "hidden_act": "relu2",
        "model_type": "nanochat",
        "rms_norm_eps": 1e-6,
    }
    return SHARED | family | changes


_NANOCHAT_CASES = {
    "nanochat_gqa": _nanochat(),
    "nanochat_mha_tied_published": without(
        _nanochat(
            num_key_value_heads=4, rms_norm_eps=0.1, rope_theta=100.0, tie_word_embeddings=True
        ),
        "final_logit_softcapping",
        "rope_parameters",
    ),
    "nanochat_packed": _nanochat(final_logit_softcapping=None, num_key_value_heads=1),
}


def _apertus(**changes: Any) -> Config:
    family = {
        "architectures": ["ApertusForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "hidden_act": "xielu",
        "model_type": "apertus",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_theta": 10000.0} | LLAMA3,
    }
    return SHARED | family | changes


_APERTUS_CASES = {
    "apertus_gqa": _apertus(),
    "apertus_mha_tied_published": without(
        _apertus(
            mlp_bias=False,
            num_key_value_heads=2,
            rope_scaling=LLAMA3,
            rope_theta=12000000,
            tie_word_embeddings=True,
        ),
        "rope_parameters",
    ),
    "apertus_packed": without(_apertus(), "head_dim", "rope_parameters"),
}

COMPOSED: dict[str, Config] = {
    **_OLMO3_CASES,
    **_SMOLLM3_CASES,
    **_MINISTRAL_CASES,
    **_SEED_OSS_CASES,
    **_GRANITE_CASES,
    **_GLM_CASES,
    **_EXAONE4_CASES,
    **_COHERE_CASES,
    **_COHERE2_CASES,
    **_MINISTRAL3_CASES,
    **_HUNYUAN_CASES,
    **_NANOCHAT_CASES,
    **_APERTUS_CASES,
}
