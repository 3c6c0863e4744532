"""Types of models that are refused by name: what they have that no family here has.

A reason completes the sentence "models of this type …". What neither this table nor that of
families holds is refused with the list of supported types.
"""

_INDEXER = "choose the keys that each token sees by an indexer that is trained on its own"
_STREAMS = "have several residual streams, which hyper-connections mix in every layer"
_NGRAMS = "add vectors of n-grams of tokens, hashed into tables larger than the rest"
_STATES = "have layers with a state-space model (Mamba) in the place of attention"
_KIMI_DELTA = "have layers of Kimi Delta Attention, whose states fade by channel"
_CONVOLUTIONS = "have gated short convolutions in the place of attention in most layers"
_LOOPS = "go through the same layers several times for each token"
_DIFFUSION = "write blocks of tokens by diffusion, and not a token after the other"
_SHORTCUT = "have two attentions and a shortcut to experts, some of which do nothing, in each layer"

# model_type: reason.
REFUSED = {
    "axk2": _INDEXER,
    "bailing_hybrid": _KIMI_DELTA,
    "bamba": _STATES,
    "blt": "read bytes, which a model of their entropy groups into patches",
    "deepseek_v32": _INDEXER,
    "deepseek_v4": f"{_STREAMS}, and {_INDEXER}",
    "diffusion_gemma": _DIFFUSION,
    "dory": _LOOPS,
    "dots3_note": _INDEXER,
    "falcon_h1": "have a state-space model (Mamba) beside attention in every layer",
    "falcon_mamba": _STATES,
    "gemma3n": "have several residual streams (AltUp) and vectors of a table for each layer",
    "glm5_next": f"{_STREAMS}, and {_INDEXER}",
    "glm_moe_dsa": _INDEXER,
    "granitemoehybrid": _STATES,
    "hrm_text": _LOOPS,
    "hy_v4": f"{_STREAMS}, and {_INDEXER}",
    "inkling2_loop": _LOOPS,
    "jamba": _STATES,
    "jetmoe": "choose heads of attention for each token, as experts are",
    "kimi_linear": _KIMI_DELTA,
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "lfm3": _CONVOLUTIONS,
    "llama4": "see chunks of 8,192 tokens in three of four layers, and multiply experts' inputs",
    "longcat_flash": _SHORTCUT,
    "longcat_flash_ngram": f"{_SHORTCUT}, and {_NGRAMS}",
    "mamba": _STATES,
    "mamba2": _STATES,
    "minimax": "have lightning attention, whose state fades by head, in most layers",
    "minimax_m3_vl": "choose blocks of keys that each token sees by an indexer",
    "mistral_large4": _INDEXER,
    "nemotron_h": _STATES,
    "qwen4_exp": f"{_STREAMS}, and {_NGRAMS}",
    "recurrent_gemma": "have gated linear recurrences in two of three layers",
    "rwkv": "have a linear recurrence in the place of attention",
    "xlstm": "have matrix memories (mLSTM) in the place of attention",
    "zamba": _STATES,
    "zamba2": _STATES,
    "zaya": "compress queries and keys by convolutions over tokens (CCA)",
}


def reason_for(kind: str) -> str:
    """Returns why models of a type are refused by name; '' if they are not.

    The text within a multimodal model is of the type of the whole with `_text`.
    """
    return REFUSED.get(kind) or REFUSED.get(kind.removesuffix("_text"), "")
