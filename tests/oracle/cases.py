"""Tiny models with stored reference numbers: their configs, folders, batches and results."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.oracle.configs import CONFIGS as CASES
from tests.oracle.published import PUBLISHED, WHOLES
from tests.oracle.weights import weight

FOLDER = Path(__file__).parent
# Of gpt-oss: `blocks` uint8 `[E, rows, columns / 32, 16]`, `scales` uint8 `[E, rows, columns / 32]`
# and `values` float32 `[E, columns, rows]`, which bfloat16 holds exactly.
MXFP4 = FOLDER / "mxfp4.npz"
# `codes` uint8 `[rows, columns]`, `factors` float32 of blocks, and `values` float32.
FP8 = FOLDER / "fp8.npz"
NF4 = FOLDER / "nf4.npz"
# Of preferences.py: `case/name` of inputs and `case/form/name` of results.
PREFERENCES = FOLDER / "preferences.npz"
# Of optimizers.py: what each leaves.
OPTIMIZERS = FOLDER / "optimizers.npz"
# Of delta.py: `form/name` of results.
DELTA = FOLDER / "delta.npz"
PUBLISHED_SIZES = FOLDER / "published_sizes.json"

# Cases of one batch, by family; the trajectory is of ten.
FAMILY_CASES: dict[str, list[str]] = {}
for _name, _config in CASES.items():
    if _name != "trajectory":
        FAMILY_CASES.setdefault(_config["model_type"], []).append(_name)


# Forms of objectives for preferences: the name and its keys.
PREFERENCE_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"beta": 0.1}),
    "dpo_sharp": ("dpo", {"beta": 0.7}),
    "dpo_conservative": ("dpo", {"beta": 0.3, "label_smoothing": 0.1}),
    "dpo_robust": ("dpo", {"beta": 0.3, "label_smoothing": 0.2, "robust": True}),
    "dpo_normalised": ("dpo", {"beta": 5.0, "normalised": True}),
    "dpo_all": (
        "dpo",
        {"beta": 2.0, "label_smoothing": 0.15, "robust": True, "normalised": True},
    ),
    "ipo": ("ipo", {"beta": 0.1}),
    "ipo_strong": ("ipo", {"beta": 0.8}),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 1.0}),
    "simpo_no_margin": ("simpo", {"beta": 10.0, "gamma": 0.0}),
    "orpo": ("orpo", {"weight": 0.1}),
    "orpo_heavy": ("orpo", {"weight": 1.5}),
    "cpo": ("cpo", {"beta": 0.1, "alpha": 1.0}),
    "cpo_no_nll": ("cpo", {"beta": 0.4, "alpha": 0.0}),
    "kto": ("kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    "kto_weighted": ("kto", {"beta": 0.5, "desirable_weight": 1.33, "undesirable_weight": 0.75}),
}


@dataclass(frozen=True)
class Case:
    """One stored case.

    Attributes:
      name: Key of `CASES`.
      config: Content of config.json.
      arrays: `tokens`, `targets`, `weights`, `positions`, `segments`, each `[B, T]` as in a
        `Batch`, or `[steps, B, T]` for the trajectory. A case of one step also holds `logits`
        `[B, T, V]` (zero on padding), `loss_sum` (nats, weighted), `loss_mean`, `grad_norm` of the
        mean loss over all parameters and `grad_norms`, one for each name of `tensors`. With routed
        experts it holds `aux_loss`, the load-balancing loss over all layers and real tokens,
        without its coefficient, which `loss_sum` and gradients leave out. The trajectory holds
        `losses` (mean), `grad_norms` (before clipping), both `[steps]`, and `final_logits`
        `[B, T, V]` of the first batch after the last step.
      shapes: `{Hugging Face name: shape}` of the tensors of a file, shared ones once.
    """

    name: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.arrays[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def tensors(self) -> list[str]:
        """Names in the order of the per-tensor `grad_norms`."""
        return list(self.shapes)


def stored_path(name: str) -> Path:
    """Returns where the numbers of a case are."""
    return FOLDER / f"{f'llama_{name}' if CASES[name]['model_type'] == 'llama' else name}.npz"


def load_case(name: str) -> Case:
    """Returns the stored numbers of a case."""
    with np.load(stored_path(name)) as stored:
        arrays = dict(stored)
    config = json.loads(str(arrays.pop("config")))
    shapes = json.loads(str(arrays.pop("shapes")))
    return Case(name, config, arrays, {tensor: tuple(shape) for tensor, shape in shapes.items()})


def load_published_sizes() -> dict[str, int]:
    """Returns `{name of a published model, ORG--NAME: parameters}`, shared ones once."""
    return json.loads(PUBLISHED_SIZES.read_text())


def published_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns `{ORG--NAME: content of config.json}` of a folder, and of those it does not hold.

    Of a model that takes other senses too it is what the file says of its language model.
    """
    configs = _read_configs(folder)
    return {name: c.get("text_config", c) for name, c in configs.items()} | PUBLISHED


def published_wholes(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns `{ORG--NAME: content of config.json}` of models that take other senses too."""
    found = {name: c for name, c in _read_configs(folder).items() if "vision_config" in c}
    return found | WHOLES


def _read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {f.parent.name: json.loads(f.read_text()) for f in sorted(folder.glob("*/config.json"))}


def load_preferences() -> dict[str, dict[str, np.ndarray]]:
    """Returns what preferences.npz holds of each case, by its name there."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(PREFERENCES) as stored:
        for path, value in stored.items():
            case, _, name = path.partition("/")
            cases.setdefault(case, {})[name] = value
    return cases


def tensor_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Returns `{Hugging Face name: shape}` of a case."""
    with np.load(stored_path(name)) as stored:
        shapes = json.loads(str(stored["shapes"]))
    return {tensor: tuple(shape) for tensor, shape in shapes.items()}


def tensors_of(name: str) -> dict[str, np.ndarray]:
    """Returns `{Hugging Face name: float32 array}` of a case."""
    family = CASES[name]["model_type"]
    return {tensor: weight(tensor, shape, family) for tensor, shape in tensor_shapes(name).items()}


def write_folder(case: str, folder: Path) -> Path:
    """Writes config.json and model.safetensors of a case into an existing folder; returns it."""
    (folder / "config.json").write_text(json.dumps(CASES[case], indent=2))
    save_file(tensors_of(case), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def llama_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns `{Hugging Face name: float32 array}` of any Llama config, stored or not."""
    embed, mlp, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head = config["head_dim"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    block = {
        "input_layernorm": (embed,),
        "self_attn.q_proj": (queries, embed),
        "self_attn.k_proj": (keys, embed),
        "self_attn.v_proj": (keys, embed),
        "self_attn.o_proj": (embed, queries),
        "post_attention_layernorm": (embed,),
        "mlp.gate_proj": (mlp, embed),
        "mlp.up_proj": (mlp, embed),
        "mlp.down_proj": (embed, mlp),
    }
    shapes = {"model.embed_tokens.weight": (vocab, embed), "model.norm.weight": (embed,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in block.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, embed)
    return {name: weight(name, shape, "llama") for name, shape in shapes.items()}
