"""Every key of a run, with its default, meaning and limits.

A default lives here and nowhere else. Keys whose zero or empty value means "off" or "derived" say
so, because flags cannot carry `None`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxft.config.keys import key, walk
from jaxft.errors import ConfigError
from jaxft.extensions import load_named

FORMATS = (
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "columns",
    "text",
    "preference",
    "labelled",
)
TEXT_SPLITS = ("paragraph", "line", "file")
OVERLENGTH = ("error", "drop", "truncate", "split", "cut_prompt_start", "cut_prompt_middle")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model that is fine-tuned, and how it is computed."""

    path: str = key("", "Hugging Face folder, or repository id such as 'org/name'.")
    revision: str = key("", "Branch, tag or commit of a repository id; empty: its default branch.")
    tokenizer: str = key("", "Folder or repository id of another tokenizer; empty: model.path.")
    add_tokens: str = key(
        "",
        "Special tokens that the tokenizer gets, comma-separated, such as '<|call|>,<|result|>'; "
        "the embedding grows if it has no rows to spare. Rows that spell them need "
        "--config.data.control_tokens=keep.",
    )
    random_init: bool = key(
        False, "Start from random weights: model.path then needs only config.json and a tokenizer."
    )
    dtypes: str = key(
        "mixed",
        "'mixed': float32 master parameters and bfloat16 compute; or all in the named type.",
        choices=("mixed", "float32", "bfloat16"),
    )
    quantise: str = key(
        "",
        "Type in which the weights of the layers are held while adapters learn beside them: 'nf4' "
        "and 'int4' take 4.25 bits for each, 'int8' and 'fp8' 8.25; empty: that of computing. "
        "They are encoded as they are read.",
        choices=("", "nf4", "int4", "int8", "fp8"),
    )
    matmul: str = key(
        "",
        "Numbers of 8 bits that training multiplies in the layers: 'int8' (TPU v5e, v5p, v6e), "
        "'fp8' (NVIDIA Hopper and later, TPU7x); empty: those of computing. Weights, what they are "
        "applied to and its gradients are rounded where they meet; gradients of weights are not, "
        "nor are adapters, routers, the embedding and the head. Evaluation and generation never "
        "round.",
        choices=("", "int8", "fp8"),
    )
    attention: str = key(
        "auto",
        "Attention back end; 'auto' prints what it chose for the device.",
        choices=("auto", "xla", "cudnn", "tokamax", "splash", "ring"),
    )
    remat: str = key(
        "full",
        "Kept from a layer's forward pass for its backward: 'none' keeps all, 'dots' the outputs "
        "of matrix products with weights, 'full' the layer's input alone. Or that and named "
        "activations, such as 'qkv+attention'; also attention_out, mlp and mlp_out. 'auto' takes "
        "of none, dots, qkv+attention, attention and full the fastest that fits the devices' "
        "memory; a run that is resumed keeps it.",
    )
    offload: str = key(
        "",
        "Of what is kept, the activations that wait in the host's memory: 'inputs+qkv'; empty: "
        "none.",
    )
    expert_capacity: float = key(
        0.0,
        "In a mixture of experts: tokens of a row that an expert takes, as a multiple of its even "
        "share; what exceeds is dropped, and counted. 0: none is. Evaluation never drops any.",
        minimum=0,
    )

    @property
    def added_tokens(self) -> list[str]:
        """The tokens of `add_tokens`."""
        return [part.strip() for part in self.add_tokens.split(",")] if self.add_tokens else []


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The data, and the way they become rows of tokens."""

    train: str = key(
        "",
        "Training data: files, globs or hub ids, comma-separated. A hub id may carry a "
        "configuration and a split: 'org/name:config[split]'. Options follow after colons: "
        "'a.jsonl:0.3' (weight), 'b.csv:format=columns:prompt=question:completion=answer', "
        "'c.txt:text_split=line:limit=1000'; also system=, text= and weight=. Weights are shares "
        "of the documents of one pass, which ends when the scarcest source is used up.",
    )
    validation: str = key(
        "",
        "Held-out data in the same form, or a part of the training data that is then not trained "
        "on: '5%'; empty: no evaluation.",
    )
    format: str = key(
        "auto",
        "Row format of sources that name none; 'auto' detects it and says so in the log. "
        "'preference' holds pairs of answers, 'labelled' answers marked as good or bad.",
        choices=FORMATS,
    )
    columns: str = key(
        "",
        "Columns that hold each part, for sources that name none. For format 'columns': "
        "'prompt=question,completion=answer'; for 'text': 'text=body'; for 'preference': "
        "'prompt=q,chosen=good,rejected=bad'; for 'labelled': 'prompt=q,completion=a,label=liked'.",
    )
    text_split: str = key(
        "paragraph",
        "What one document of a plain text file is, of sources that do not say.",
        choices=TEXT_SPLITS,
    )
    bad_rows: str = key(
        "error",
        "What happens to rows that cannot be read or trained on: 'error' refuses the data set, "
        "'skip' leaves them out, counts them and lists them in skipped.jsonl of the workdir.",
        choices=("error", "skip"),
    )
    bad_share: float = key(
        0.01,
        "With bad_rows 'skip': the largest share of the rows of a data set that is left out before "
        "it is refused; more than a few in a hundred are no accidents but another format.",
        minimum=0,
        maximum=1,
    )
    template: str = key("", "File with a Jinja chat template; empty: the tokenizer's own.")
    thinking: str = key(
        "template",
        "Reasoning in <think> blocks of assistant turns: 'template' leaves it to the chat "
        "template, 'keep' trains each turn as it is generated, as the last one, so that no block "
        "is dropped, 'drop' removes the blocks before rendering.",
        choices=("template", "keep", "drop"),
    )
    control_tokens: str = key(
        "text",
        "What becomes of a control token of the tokenizer, such as '<|im_end|>', that a row "
        "spells: 'text' encodes it as plain text, 'refuse' makes the row a bad one, 'keep' makes "
        "it the real token: for rows that are trusted, such as those with tokens of add_tokens.",
        choices=("text", "refuse", "keep"),
    )
    train_on: str = key(
        "assistant",
        "Tokens that carry loss: 'assistant' turns with their stop token, only the last one "
        "('completion'), or 'all'. Of preferences it is always the last one.",
        choices=("assistant", "completion", "all"),
    )
    max_length: int = key(1024, "Tokens in a row of the batch.", minimum=2, maximum=1 << 24)
    overlength: str = key(
        "error",
        "What happens to documents over max_length; the share lost is always reported. 'truncate' "
        "keeps the beginning, 'split' makes several of one. 'cut_prompt_start' and "
        "'cut_prompt_middle' keep the last answer whole and shorten what precedes it: the first "
        "keeps BOS and what is nearest to the answer, the second the beginning as well; an answer "
        "that does not fit by itself is dropped, and plain text, all answer, is split. The two "
        "answers of a preference share a row; they are cut alike and never split.",
        choices=OVERLENGTH,
    )
    packing: str = key(
        "documents",
        "'documents': several documents share a row and do not see each other; 'stream': one "
        "stream cut every max_length tokens, documents see what precedes them and end with EOS; "
        "'none': one a row.",
        choices=("documents", "stream", "none"),
    )
    shuffle: bool = key(True, "A new deterministic order of rows in each epoch.")
    streaming: bool = key(False, "Stream hub data sets instead of downloading them first.")
    cache: str = key("", "Folder of tokenised rows; empty: ~/.cache/jaxft/data.")


# Modules of the built-in objectives. They are imported when an objective is asked for, because
# their mathematics needs jax.
OBJECTIVES = {
    name: f"jaxft.training.objectives.{name}"
    for name in ("sft", "dpo", "ipo", "simpo", "orpo", "cpo", "kto")
}


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The objective: which one is learnt, and its keys.

    The keys of an objective stand beside its mathematics. They are the group of its name, or of the
    last part of a dotted one: `objective.dpo.beta`.
    """

    name: str = key(
        "sft",
        f"What is learnt: {', '.join(OBJECTIVES)}, or a module of yours that defines OBJECTIVE.",
    )
    reference: str = key(
        "auto",
        "Where a preference objective has the log-probabilities of the starting weights from: "
        "'fixed' keeps these weights and computes them in every step, 'cached' computes them once; "
        "'auto': fixed if the objective needs them.",
        choices=("auto", "fixed", "cached", "none"),
    )
    chunk: int = key(
        1024,
        "Positions of a device whose float32 logits exist at once; 0: all of them.",
        minimum=0,
    )
    balance: float = key(
        0.0,
        "Weight of the load-balancing loss of a mixture of experts; 0 leaves it out. Models name "
        "the one they were trained with in config.json (router_aux_loss_coef).",
        minimum=0,
    )

    def __post_init__(self):
        self._made: dict[str, Any] = {}  # keys by the name of their objective

    @property
    def objective(self) -> Any:
        """The `Objective` of that name."""
        return _load(self.name)

    @property
    def keys(self) -> Any:
        """The keys of that objective."""
        return self._keys_of(self.name)

    @property
    def groups(self) -> dict[str, Any]:
        """Keys of objectives by group: of the one that is learnt, and all that were looked at."""
        touched = {_group_of(name): keys for name, keys in self._made.items()}
        # sft has no keys: whoever lists all of them need not wait for jax.
        return touched if self.name == "sft" else touched | {_group_of(self.name): self.keys}

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with the objective, its keys and its reference."""
        try:
            needed, keys = self.objective.reference, self.keys
        except ConfigError as error:
            yield from error.problems
            return
        yield from keys.problems() if hasattr(keys, "problems") else ()
        if needed and self.reference == "none":
            yield (
                f"objective.reference is 'none', but {self.name} compares with the weights that "
                "training starts from. Set --config.objective.reference=fixed or cached."
            )
        if not needed and self.reference in ("fixed", "cached"):
            yield (
                f"objective.reference is {self.reference!r}, but {self.name} compares with no "
                "other model. Leave it at auto."
            )
        for name, group in self._made.items():
            changed = [item.path for item in walk(group) if item.value != item.default]
            if name != self.name and changed:
                yield (
                    f"objective.{_group_of(name)}.{changed[0]} is set, but objective.name "
                    f"is {self.name!r}. Set --config.objective.name={name}, or leave the key out."
                )

    @property
    def uses_reference(self) -> str:
        """Origin of the starting weights' log-probabilities; empty if none are needed."""
        needed = self.objective.reference
        return ("fixed" if self.reference == "auto" else self.reference) if needed else ""

    @property
    def forward_passes(self) -> int:
        """Number of passes without gradients in a step, beside the one that learns."""
        return (self.uses_reference == "fixed") + (self.objective.whole is not None)

    def __getattr__(self, name: str) -> Any:
        # Called for what is no field: the keys of an objective, made when they are asked for.
        return self._keys_of(self._objective_of(name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_made" or hasattr(ObjectiveConfig, name):
            object.__setattr__(self, name, value)
        else:
            self._made[self._objective_of(name)] = value

    def _keys_of(self, objective: str) -> Any:
        if objective not in self._made:
            self._made[objective] = _load(objective).keys()
        return self._made[objective]

    def _objective_of(self, group: str) -> str:
        name = vars(self).get("name", "")
        if group == _group_of(name) and not group.startswith("_"):
            return name
        if group in OBJECTIVES:
            return group
        raise AttributeError(f"ObjectiveConfig has no key {group!r}")


def _load(objective: str) -> Any:
    group = _group_of(objective)
    if group.startswith("_") or hasattr(ObjectiveConfig, group):
        raise ConfigError(
            f"objective {objective!r} cannot be used: its keys would be objective.{group}, which "
            "is something else already. Rename the module."
        )
    return load_named(objective, OBJECTIVES, kind="objective", attribute="OBJECTIVE")


def _group_of(objective: str) -> str:
    """Returns the group of an objective's keys."""
    return str(objective).rpartition(".")[2]


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Devices along each axis of the mesh; `stage` is of pipeline parallelism."""

    stage: int = key(0, "Devices on the axis; 0: left to the strategy; -1: all that remain.")
    data: int = key(0, "As above, for data parallelism, which goes over slices.")
    fsdp: int = key(0, "As above, for fully sharded data parallelism.")
    context: int = key(0, "As above, for the positions of a row.")
    expert: int = key(0, "As above, for the experts of a layer.")
    tensor: int = key(0, "As above, for tensor parallelism.")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length of the run, and when it logs, saves and evaluates."""

    workdir: str = key("", "Folder that the run writes to.")
    name: str = key(
        "", "Title of its report, and its group at wandb; empty: the name of the workdir."
    )
    steps: int = key(0, "Optimizer steps; 0: as many as train.epochs take.", minimum=0)
    epochs: float = key(1.0, "Passes over the training rows, when train.steps is 0.", minimum=0)
    batch_size: int = key(
        8, "Rows in one optimizer step, over all devices and micro-batches.", minimum=1
    )
    accumulation: int = key(
        1, "Micro-batches that batch_size is split into; does not change the result.", minimum=1
    )
    seed: int = key(0, "Seed of shuffling, random weights and sampling.")
    log_every: int = key(10, "Steps between lines of metrics.", minimum=1)
    save_every: int = key(500, "Steps between checkpoints; 0: only at the end.", minimum=0)
    save_epochs: bool = key(False, "Save at the end of each epoch as well.")
    eval_every: int = key(0, "Steps between evaluations; 0: at the end of each epoch.", minimum=0)
    keep_last: int = key(2, "Newest checkpoints that are kept, beside the best.", minimum=1)
    compilation_cache: str = key(
        "", "Folder of compiled programs; empty: ~/.cache/jaxft/xla; 'off': none."
    )
    compiler_options: str = key(
        "",
        "XLA's options for the training step, on top of those of the chip, comma-separated: "
        "'xla_tpu_scoped_vmem_limit_kib=98304,xla_enable_async_all_gather=true'.",
    )
    wandb: str = key("", "Project that metrics also go to, if wandb is installed; empty: none.")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation, during training and as a command."""

    datasets: str = key(
        "",
        "More held-out data for `jaxft eval`: 'name=source', several separated by ';'. "
        "data.validation is evaluated under the name 'validation'.",
    )
    retention: str = key(
        "", "A source outside the task: what the model loses on it is printed beside its gain."
    )
    batch_size: int = key(0, "Rows in one evaluation step; 0: train.batch_size.", minimum=0)
    max_rows: int = key(
        0, "Evaluate a sample of so many rows, drawn by train.seed; 0: all rows.", minimum=0
    )
    best: str = key(
        "loss",
        "What the best checkpoint and patience go by: the validation 'loss', or the share of right "
        "'answers' to the validation data, which eval.answers generates.",
        choices=("loss", "answers"),
    )
    patience: int = key(
        0, "Evaluations without improvement before training stops; 0: never.", minimum=0
    )
    minimum_change: float = key(
        0.0,
        "Fall of the validation loss, or rise of the share of right answers, that counts as "
        "improvement.",
        minimum=0,
    )
    answers: str = key(
        "none",
        "Answers that each evaluation generates: 'exact' compares with the reference text, 'label' "
        "takes the answer as one of the labels found in the data.",
        choices=("none", "exact", "label"),
    )
    answer_rows: int = key(
        200,
        "Answers are generated for a sample of so many rows, drawn by train.seed; 0: all rows.",
        minimum=0,
    )
    max_new_tokens: int = key(64, "Longest generated answer, in tokens.", minimum=1)
    samples: int = key(
        3,
        "Prompts answered in the report, before training and by the checkpoint that an export "
        "takes.",
        minimum=0,
    )
