"""Config files of the tiny models: each branch of a family's mathematics is in some case."""

from typing import Any

from tests.oracle.composed import COMPOSED
from tests.oracle.latent import LATENT
from tests.oracle.shared import LLAMA3, SHARED, YARN, Config, without


def _llama(**changes: Any) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": 64,
    } | changes


# Files written by transformers 4 keep theta outside and call the rest `rope_scaling`.
_LLAMA3_PUBLISHED = {"rope_theta": 10000.0, "rope_scaling": LLAMA3}
_LLAMA_GQA = _llama()

_LLAMA_CASES = {
    "gqa": _LLAMA_GQA,
    "mha": _llama(num_key_value_heads=4),
    "mqa_tied": _llama(num_key_value_heads=1, tie_word_embeddings=True),
    "llama3_rope": _llama(
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_theta": 10000.0} | LLAMA3,
    ),
    "llama3_rope_tied_published": without(
        _llama(head_dim=16, num_attention_heads=2, tie_word_embeddings=True, **_LLAMA3_PUBLISHED),
        "rope_parameters",
    ),
    "linear_rope": _llama(
        rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    ),
    "head_dim_6": _llama(
        head_dim=6, hidden_size=24, num_attention_heads=3, num_key_value_heads=1, vocab_size=51
    ),
    "head_dim_10_tied": _llama(
        head_dim=10,
        hidden_size=24,
        intermediate_size=37,
        num_attention_heads=6,
        num_hidden_layers=3,
        tie_word_embeddings=True,
    ),
    "large_eps_theta": _llama(
        rms_norm_eps=0.1, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}
    ),
    "packed": _LLAMA_GQA,
    "trajectory": _llama(tie_word_embeddings=True, hidden_size=24),
}


def _mistral(**changes: Any) -> Config:
    family = {
        "architectures": ["MistralForCausalLM"],
        "head_dim": 8,
        "model_type": "mistral",
        "sliding_window": 7,
    }
    return SHARED | family | changes


_MISTRAL_CASES = {
    "mistral_window": _mistral(),
    "mistral_nemo": without(
        _mistral(head_dim=12, num_key_value_heads=1, sliding_window=None, rope_theta=1000000.0),
        "rope_parameters",
    ),
    "mistral_mha_tied": without(
        _mistral(num_key_value_heads=4, sliding_window=2, tie_word_embeddings=True), "head_dim"
    ),
    "mistral_packed": _mistral(sliding_window=4),
}


def _qwen2(**changes: Any) -> Config:
    family = {
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 2,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "sliding_window": 6,
        "use_sliding_window": False,
    }
    return SHARED | family | changes


_QWEN2_CASES = {
    "qwen2_gqa": without(_qwen2(rope_theta=1000000.0), "rope_parameters"),
    "qwen2_mha_tied": _qwen2(num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2_window": _qwen2(num_hidden_layers=3, max_window_layers=1, use_sliding_window=True),
    "qwen2_layer_types": _qwen2(
        layer_types=["sliding_attention", "full_attention"], use_sliding_window=True
    ),
    "qwen2_packed": _qwen2(
        max_window_layers=1, num_key_value_heads=1, sliding_window=4, use_sliding_window=True
    ),
}


def _qwen3(**changes: Any) -> Config:
    family = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 12,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    return SHARED | family | changes


_QWEN3_CASES = {
    "qwen3_gqa_tied": without(
        _qwen3(rope_scaling=None, rope_theta=1000000, tie_word_embeddings=True), "rope_parameters"
    ),
    "qwen3_mha": _qwen3(num_key_value_heads=4),
    "qwen3_window": _qwen3(
        max_window_layers=1, num_hidden_layers=3, sliding_window=6, use_sliding_window=True
    ),
    "qwen3_packed": _qwen3(num_key_value_heads=1),
}


def _gemma2(**changes: Any) -> Config:
    family = {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 20,
        "rms_norm_eps": 1e-6,
        "sliding_window": 6,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
    }
    return without(SHARED | family, "hidden_act") | changes


_GEMMA2_CASES = {
    "gemma2_gqa": _gemma2(),
    "gemma2_published": without(
        _gemma2(
            attn_logit_softcapping=50.0,
            cache_implementation="hybrid",
            final_logit_softcapping=30.0,
            head_dim=12,
            hidden_act="gelu_pytorch_tanh",
            query_pre_attn_scalar=8,
            rope_theta=10000.0,
            sliding_window_size=6,
        ),
        "layer_types",
        "rope_parameters",
        "tie_word_embeddings",
        "use_bidirectional_attention",
    ),
    "gemma2_mha_uncapped": _gemma2(
        attn_logit_softcapping=None, final_logit_softcapping=None, num_key_value_heads=4
    ),
    "gemma2_packed": _gemma2(num_key_value_heads=1, sliding_window=4),
}


def _gemma3(**changes: Any) -> Config:
    """Returns seven layers: one period of five windows and a full one, and the next one begun."""
    family = {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 24,
        "intermediate_size": 32,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 20,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
        },
        "sliding_window": 6,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
    }
    return without(SHARED | family, "hidden_act") | changes


# What files written by transformers 4 lack.
_GEMMA3_NEW = ("layer_types", "rope_parameters", "use_bidirectional_attention")

_GEMMA3_CASES = {
    # transformers 5 writes this field, which repeats what layer_types say.
    "gemma3_text_gqa": _gemma3(_sliding_window_pattern=6),
    "gemma3_text_published": without(
        _gemma3(
            cache_implementation="hybrid",
            num_key_value_heads=1,
            rope_local_base_freq=10000,
            rope_scaling=None,
            rope_theta=1000000,
            sliding_window_pattern=6,
        ),
        *_GEMMA3_NEW,
    ),
    "gemma3_text_linear_published": without(
        _gemma3(
            num_key_value_heads=4,
            rope_local_base_freq=100.0,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
            rope_theta=1000.0,
            sliding_window_pattern=3,
        ),
        *_GEMMA3_NEW,
    ),
    "gemma3_text_final_cap": _gemma3(
        final_logit_softcapping=3.0,
        rope_parameters={
            "full_attention": {"factor": 4.0, "rope_theta": 1000.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
        },
    ),
    "gemma3_text_packed": _gemma3(sliding_window=4),
}


def _gemma4(**changes: Any) -> Config:
    """Returns six layers, in which a group of two windows and a full one recurs."""
    family = {
        "architectures": ["Gemma4ForCausalLM"],
        "attention_bias": False,
        "attention_k_eq_v": True,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 16,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 24,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 32,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "model_type": "gemma4_text",
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
        },
        "sliding_window": 6,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": 64,
    }
    return without(SHARED | family, "hidden_act") | changes


# What sets the smallest models apart, whatever their size. With fewer inputs of a layer all gates
# of a token may be nearly closed, and a norm raises what rounding leaves of them.
_SMALLEST: Config = {
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 16,
    "num_global_key_value_heads": None,
    "use_bidirectional_attention": None,
}
_GEMMA4_CASES = {
    "gemma4_text_gqa": _gemma4(),
    # As transformers writes it; of values of their own the number of heads is the same everywhere.
    "gemma4_text_values": without(
        _gemma4(
            attention_k_eq_v=False,
            final_logit_softcapping=None,
            num_key_value_heads=4,
            per_layer_config={"5": {"head_dim": 12}},
            tie_word_embeddings=False,
            use_bidirectional_attention=None,
        ),
        "global_head_dim",
        "layer_types",
        "num_global_key_value_heads",
        "rope_parameters",
    ),
    "gemma4_text_packed": _gemma4(
        enable_moe_block=True,
        moe_intermediate_size=20,
        num_experts=4,
        sliding_window=4,
        top_k_experts=2,
    ),
    # As E2B: inputs of layers, and groups of layers that read keys and values of groups before.
    "gemma4_text_e2b": _gemma4(
        **_SMALLEST,
        layer_types=["sliding_attention", "full_attention"] * 4,
        num_hidden_layers=8,
        num_key_value_heads=1,
        num_kv_shared_layers=4,
        use_double_wide_mlp=True,
    ),
    # As E4B.
    "gemma4_text_e4b_packed": _gemma4(
        **_SMALLEST,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 3,
        num_hidden_layers=9,
        num_kv_shared_layers=3,
        sliding_window=4,
    ),
    # Keys that are values as well are read, of the last layers of both kinds.
    "gemma4_text_reading": _gemma4(
        hidden_size_per_layer_input=16,
        layer_types=[
            *("sliding_attention", "full_attention", "sliding_attention"),
            *("sliding_attention", "full_attention"),
        ],
        num_hidden_layers=5,
        num_kv_shared_layers=2,
        tie_word_embeddings=False,
        use_double_wide_mlp=True,
    ),
    # What a norm divides by shows how large its input is, as of what is made of a layer's inputs.
    "gemma4_text_inputs_and_experts": _gemma4(
        enable_moe_block=True,
        hidden_size_per_layer_input=16,
        layer_types=["sliding_attention", "full_attention"],
        moe_intermediate_size=20,
        num_experts=4,
        num_hidden_layers=2,
        rms_norm_eps=0.05,
        top_k_experts=2,
    ),
}


def _olmo2(**changes: Any) -> Config:
    family = {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "model_type": "olmo2",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    }
    return SHARED | family | changes


_OLMO2_CASES = {
    "olmo2_gqa": _olmo2(),
    "olmo2_mha_published": without(
        _olmo2(num_key_value_heads=4, rope_scaling=None, rope_theta=500000), "rope_parameters"
    ),
    "olmo2_tied": _olmo2(num_key_value_heads=1, tie_word_embeddings=True),
    "olmo2_packed": _olmo2(),
}


def _phi3(**changes: Any) -> Config:
    family = {
        "architectures": ["Phi3ForCausalLM"],
        "embd_pdrop": 0.0,
        "model_type": "phi3",
        "original_max_position_embeddings": 128,
        "resid_pdrop": 0.0,
        "rope_parameters": {
            "partial_rotary_factor": 1.0,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "sliding_window": None,
    }
    return SHARED | family | changes


def _longrope(original: int, **changes: Any) -> Config:
    """Returns heads of 16 of which 12 rotate, in the form of files by transformers 4."""
    config = _phi3(
        attention_bias=False,
        full_attn_mod=1,
        interpolate_factor=1,
        lm_head_bias=False,
        mlp_bias=False,
        num_attention_heads=2,
        num_key_value_heads=1,
        original_max_position_embeddings=original,
        partial_rotary_factor=0.75,
        rope_scaling={
            "long_factor": [1.0, 1.3, 2.1, 4.5, 9.0, 17.0],
            "short_factor": [1.0, 1.05, 1.1, 1.4, 2.0, 2.5],
            "type": "longrope",
        },
        rope_theta=100.0,
        sliding_window=262144,
        tie_word_embeddings=True,
        **changes,
    )
    return without(config, "rope_parameters")


_PHI3_CASES = {
    "phi3_window_mha": _phi3(num_key_value_heads=4, sliding_window=7),
    "phi3_partial_gqa": _phi3(
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
    ),
    # Rows of 40 tokens are below and above what the factors were first trained for.
    "phi3_longrope_short": _longrope(64),
    "phi3_longrope_long": _longrope(16),
    # One document is longer, three are not.
    "phi3_packed": _longrope(10),
}


def _gpt2(**changes: Any) -> Config:
    return {
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 1,
        "dtype": "float32",
        "embd_pdrop": 0.1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_embd": 32,
        "n_head": 4,
        "n_inner": None,
        "n_layer": 2,
        "n_positions": 48,
        "pad_token_id": None,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.1,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 64,
    } | changes


_GPT2_CASES = {
    "gpt2_tied": _gpt2(),
    "gpt2_inner": without(
        _gpt2(n_ctx=48, n_head=2, n_inner=40, n_layer=3, layer_norm_epsilon=0.1),
        "tie_word_embeddings",
    ),
    "gpt2_untied": _gpt2(n_head=1, tie_word_embeddings=False),
    "gpt2_packed": _gpt2(),
}


def _mixtral(**changes: Any) -> Config:
    family = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }
    return SHARED | family | changes


_MIXTRAL_CASES = {
    "mixtral_gqa_published": without(
        _mixtral(rope_theta=1000000.0), "rope_parameters", "router_jitter_noise"
    ),
    "mixtral_window_mha": _mixtral(num_key_value_heads=4, sliding_window=7),
    "mixtral_tied": _mixtral(head_dim=12, num_key_value_heads=1, tie_word_embeddings=True),
    "mixtral_packed": _mixtral(num_local_experts=5, num_experts_per_tok=3),
}


def _qwen3_moe(**changes: Any) -> Config:
    family = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 12,
        "max_window_layers": 2,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    return SHARED | family | changes


_QWEN3_MOE_CASES = {
    "qwen3_moe_gqa_published": without(
        _qwen3_moe(rope_scaling=None, rope_theta=1000000.0), "rope_parameters"
    ),
    # Files written by transformers 5 call the experts `num_local_experts`.
    "qwen3_moe_unnormalised_mha": without(
        _qwen3_moe(norm_topk_prob=False, num_key_value_heads=4, num_local_experts=4), "num_experts"
    ),
    "qwen3_moe_tied": _qwen3_moe(num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3_moe_packed": _qwen3_moe(num_experts=5, num_experts_per_tok=3),
}


def _gpt_oss(**changes: Any) -> Config:
    family = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "head_dim": 16,
        "intermediate_size": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 4096,
        "model_type": "gpt_oss",
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rope_parameters": {"rope_theta": 1000.0} | YARN,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 6,
        "swiglu_limit": 0.8,
    }
    return SHARED | family | changes


_GPT_OSS_CASES = {
    "gpt_oss_gqa": _gpt_oss(),
    "gpt_oss_published": without(
        _gpt_oss(
            experts_per_token=2,
            initial_context_length=128,
            rope_scaling=YARN,
            rope_theta=1000,
            swiglu_limit=7.0,
        ),
        "rope_parameters",
    ),
    "gpt_oss_truncate_mha": _gpt_oss(
        num_key_value_heads=2, rope_parameters={"rope_theta": 1000.0} | YARN | {"truncate": True}
    ),
    "gpt_oss_default_rope": _gpt_oss(
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        num_hidden_layers=3,
        num_local_experts=5,
        rope_parameters={"rope_theta": 150000.0, "rope_type": "default"},
    ),
    "gpt_oss_packed": _gpt_oss(sliding_window=4),
}


def _qwen3_5(**changes: Any) -> Config:
    family = {
        "architectures": ["Qwen3_5ForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 6,
        "model_type": "qwen3_5_text",
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.25,
        # The norm of a document's first output keeps no more than the sign of one score: with a
        # small epsilon rounding would show where that is near zero.
        "rms_norm_eps": 0.01,
        "rope_parameters": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
    }
    return SHARED | family | changes


_QWEN3_5_CASES = {
    "qwen3_5_gqa": _qwen3_5(),
    # As the text part of published files, where every fourth layer has attention.
    "qwen3_5_published": without(
        _qwen3_5(
            attn_output_gate=True,
            full_attention_interval=4,
            linear_value_head_dim=8,
            rms_norm_eps=1e-5,
            mamba_ssm_dtype="float32",
            mlp_only_layers=[],
            mtp_num_hidden_layers=1,
            mtp_use_dedicated_embeddings=False,
            rope_parameters={
                "mrope_interleaved": True,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000,
                "rope_type": "default",
            },
        ),
        *("layer_types", "partial_rotary_factor"),
    ),
    "qwen3_5_mha_tied": _qwen3_5(
        linear_conv_kernel_dim=3,
        linear_num_value_heads=2,
        linear_value_head_dim=8,
        num_key_value_heads=2,
        rope_parameters={
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        tie_word_embeddings=True,
    ),
    "qwen3_5_packed": _qwen3_5(num_attention_heads=4),
}


def _qwen3_5_moe(**changes: Any) -> Config:
    family = {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.9,
        "shared_expert_intermediate_size": 20,
    }
    return without(_qwen3_5(), "intermediate_size") | family | changes


_QWEN3_5_MOE_CASES = {
    "qwen3_5_moe_gqa": _qwen3_5_moe(),
    "qwen3_5_moe_tied": _qwen3_5_moe(
        linear_num_value_heads=2, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "qwen3_5_moe_packed": _qwen3_5_moe(num_experts=5, num_experts_per_tok=3),
}


def _qwen3_next(**changes: Any) -> Config:
    family = {
        "architectures": ["Qwen3NextForCausalLM"],
        "decoder_sparse_step": 1,
        "intermediate_size": 48,
        "model_type": "qwen3_next",
        "norm_topk_prob": True,
    }
    return _qwen3_5_moe() | family | changes


_QWEN3_NEXT_CASES = {
    "qwen3_next_gqa": _qwen3_next(mlp_only_layers=[]),
    "qwen3_next_unnormalised_mha": _qwen3_next(
        linear_num_value_heads=2, norm_topk_prob=False, num_key_value_heads=2
    ),
    "qwen3_next_packed": _qwen3_next(num_experts=5, num_experts_per_tok=3),
}

CONFIGS: dict[str, Config] = {
    **_LLAMA_CASES,
    **_MISTRAL_CASES,
    **_QWEN2_CASES,
    **_QWEN3_CASES,
    **_GEMMA2_CASES,
    **_GEMMA3_CASES,
    **_GEMMA4_CASES,
    **_OLMO2_CASES,
    **_PHI3_CASES,
    **_GPT2_CASES,
    **_MIXTRAL_CASES,
    **_QWEN3_MOE_CASES,
    **_GPT_OSS_CASES,
    **_QWEN3_5_CASES,
    **_QWEN3_5_MOE_CASES,
    **_QWEN3_NEXT_CASES,
    **COMPOSED,
    **LATENT,
}
