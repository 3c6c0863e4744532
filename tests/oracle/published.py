"""Config files of published models that ../shared/configs does not hold.

Of each the fields that set its shape, as the source beside it has them.
"""

from tests.oracle.shared import LLAMA3, Config

# Defaults of configuration classes of transformers, which name these models.
_BY_CLASS: dict[str, Config] = {
    "CohereForAI--c4ai-command-r-v01": {
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "model_type": "cohere",
        "num_attention_heads": 64,
        "num_hidden_layers": 40,
        "tie_word_embeddings": True,
        "vocab_size": 256000,
    },
    "HuggingFaceTB--SmolLM3-3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 32768,
        "model_type": "smollm3",
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "THUDM--GLM-4-9B-0414": {
        "attention_bias": True,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "max_position_embeddings": 131072,
        "model_type": "glm4",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1.5625e-7,
        "vocab_size": 151552,
    },
    "mistralai--Ministral-3-8B-Base-2512": {
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "num_attention_heads": 32,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": 131072,
    },
}
PUBLISHED: dict[str, Config] = {
    **_BY_CLASS,
    "THUDM--glm-4-9b": _BY_CLASS["THUDM--GLM-4-9B-0414"] | {"model_type": "glm"},
    # As public repositories quote its file.
    "ByteDance-Seed--Seed-OSS-36B-Instruct": {
        "attention_bias": True,
        "attention_out_bias": False,
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_position_embeddings": 524288,
        "mlp_bias": False,
        "model_type": "seed_oss",
        "num_attention_heads": 80,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 155136,
    },
    # Likewise.
    "swiss-ai--Apertus-8B-2509": {
        "attention_bias": False,
        "hidden_act": "xielu",
        "hidden_dropout": 0.0,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "max_position_embeddings": 65536,
        "mlp_bias": False,
        "model_type": "apertus",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "post_norm": False,
        "qk_norm": True,
        "rms_norm_eps": 1e-5,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192, "type": "llama3"},
        "rope_theta": 12000000,
        "tie_word_embeddings": False,
        "vocab_size": 131072,
    },
}
