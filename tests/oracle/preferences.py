"""Losses of preferences in float64 torch, and the same of TRL, which they are checked against.

`compute` gives what `tests/oracle/generate.py` stores in preferences.npz: of each case the inputs,
and of each form of a method the loss of each unit, the gradient with respect to every token's
log-probability, and rewards. The formulas are those of TRL 1.16.0, written down anew, but for
averages of cross entropy, which here are of one pair.

  python -m tests.oracle.preferences        runs TRL's own trainers on the cases and compares
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tests.oracle.cases import PREFERENCE_FORMS as FORMS

Arrays = dict[str, np.ndarray]
Found = dict[str, torch.Tensor]


def make_case(prompts: list[int], answers: list[tuple[int, int]], *, seed: int) -> Arrays:
    """Returns units of two documents: a prompt, then an answer of a length of its own.

    `log_probs`, `reference` and `weights` are float32 `[N, 2, L]`, zero after a document's end.
    Weights are 1 on an answer's targets; log-probabilities of prompts are numbers as well, and so
    are those of the last position, whose target is of no document. `lengths` int32 `[N, 2]` are of
    whole documents. `labels` float32 `[N]` serve methods of single answers, whose second document
    is the answer to another prompt.
    """
    random = np.random.RandomState(seed)
    lengths = np.array([[p + a for a in pair] for p, pair in zip(prompts, answers, strict=True)])
    at = np.arange(lengths.max())[None, None]
    real = at < lengths[..., None]
    scored = (at >= np.array(prompts)[:, None, None] - 1) & (at < lengths[..., None] - 1)
    log_probs = -random.exponential(2.0, size=real.shape)
    reference = np.minimum(log_probs + 0.4 * random.normal(size=real.shape), -1e-3)
    return {
        "log_probs": np.float32(log_probs * real),
        "reference": np.float32(reference * real),
        "weights": np.float32(scored),
        "lengths": np.int32(lengths),
        "labels": np.float32(np.where(random.rand(len(prompts)) < 0.5, 1, -1)),
    }


def make_cases() -> dict[str, Arrays]:
    """Returns the inputs of every case."""
    random = np.random.RandomState(7)
    prompts = random.randint(2, 9, size=7).tolist()
    answers = random.randint(1, 14, size=(7, 2)).tolist()
    cases = {
        "several": make_case(prompts, answers, seed=1),
        "single": make_case([3], [(6, 4)], seed=2),
        "equal": make_case([2, 5, 3], [(4, 4), (1, 7), (8, 2)], seed=3),
        "extreme": make_case([4] * 6, [(40, 3), (5, 40), (8, 8), (8, 8), (20, 20), (1, 1)], seed=4),
    }
    cases["several"]["labels"][:3] = [1, -1, 1]
    cases["equal"]["reference"] = cases["equal"]["log_probs"].copy()
    extreme = cases["extreme"]["log_probs"]
    extreme[0, 0] -= 3  # a long answer that lost 120 nats
    extreme[1, 1] -= 3  # and one on the other side
    extreme[2, 0] = extreme[3, 1] = -1e-5  # answers that are nearly certain
    extreme[4] = -30  # answers that are nearly impossible
    extreme[4, 0] += 0.5
    scored = cases["extreme"]["weights"] > 0
    cases["extreme"]["log_probs"] = np.where(scored, extreme, np.float32(-1))
    return cases


def dpo(sums: Found, keys: dict[str, Any]) -> Found:
    """Returns the loss of each pair, rewards and further figures."""
    chosen, rejected = keys["beta"] * sums["average_ratio" if "normalised" in keys else "ratio"].T
    e = keys.get("label_smoothing", 0.0)
    right, wrong = -F.logsigmoid(chosen - rejected), -F.logsigmoid(rejected - chosen)
    if keys.get("robust"):
        loss = ((1 - e) * right - e * wrong) / (1 - 2 * e)
    else:
        loss = (1 - e) * right + e * wrong
    return {"loss": loss, "chosen_reward": chosen, "rejected_reward": rejected}


def ipo(sums: Found, keys: dict[str, Any]) -> Found:
    """As `dpo`."""
    chosen, rejected = sums["average_ratio"].T
    loss = (chosen - rejected - 1 / (2 * keys["beta"])) ** 2
    rewards = keys["beta"] * sums["average_ratio"].T
    return {"loss": loss, "chosen_reward": rewards[0], "rejected_reward": rewards[1]}


def simpo(sums: Found, keys: dict[str, Any]) -> Found:
    """As `dpo`."""
    chosen, rejected = keys["beta"] * sums["average"].T
    loss = -F.logsigmoid(chosen - rejected - keys["gamma"])
    return {"loss": loss, "chosen_reward": chosen, "rejected_reward": rejected}


def cpo(sums: Found, keys: dict[str, Any]) -> Found:
    """As `dpo`."""
    chosen, rejected = keys["beta"] * sums["log_prob"].T
    nll = -sums["average"][:, 0]
    loss = -F.logsigmoid(chosen - rejected) + keys["alpha"] * nll
    return {"loss": loss, "chosen_reward": chosen, "rejected_reward": rejected, "nll": nll}


def orpo(sums: Found, keys: dict[str, Any]) -> Found:
    """As `dpo`."""
    chosen, rejected = sums["average"].T
    odds = sums["average"] - torch.log(-torch.expm1(sums["average"]))
    ratio = odds[:, 0] - odds[:, 1]
    return {
        "loss": -chosen - keys["weight"] * F.logsigmoid(ratio),
        "chosen_reward": keys["weight"] * chosen,
        "rejected_reward": keys["weight"] * rejected,
        "nll": -chosen,
        "log_odds_ratio": ratio,
    }


def kto(sums: Found, keys: dict[str, Any]) -> Found:
    """As `dpo`, of single answers: their `reward`, and the estimate `kl` of all."""
    score, other = sums["ratio"].T
    kl = other.mean().clamp(min=0).detach()
    good = keys["desirable_weight"] * (1 - torch.sigmoid(keys["beta"] * (score - kl)))
    bad = keys["undesirable_weight"] * (1 - torch.sigmoid(keys["beta"] * (kl - score)))
    loss = torch.where(sums["labels"] > 0, good, bad)
    return {"loss": loss, "reward": keys["beta"] * score, "kl": kl}


METHODS = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "cpo": cpo, "orpo": orpo, "kto": kto}


def sums_of(case: Arrays, log_probs: torch.Tensor) -> Found:
    """Returns what the methods are made of: sums and averages over answers, `[N, 2]`."""
    reference, weights, labels = (
        torch.tensor(case[name], dtype=torch.float64) for name in ("reference", "weights", "labels")
    )
    length = weights.sum(-1)
    log_prob = (log_probs * weights).sum(-1)
    ratio = ((log_probs - reference) * weights).sum(-1)
    return {
        "log_prob": log_prob,
        "ratio": ratio,
        "average": log_prob / length,
        "average_ratio": ratio / length,
        "labels": labels,
    }


def solve(case: Arrays, form: str) -> Arrays:
    """Returns float64 results of a form, with `gradient` `[N, 2, L]` of the summed loss."""
    method, keys = FORMS[form]
    log_probs = torch.tensor(case["log_probs"], dtype=torch.float64, requires_grad=True)
    found = METHODS[method](sums_of(case, log_probs), keys)
    (gradient,) = torch.autograd.grad(found["loss"].sum(), log_probs)
    return {"gradient": gradient.numpy()} | {k: v.detach().numpy() for k, v in found.items()}


def compute() -> Arrays:
    """Returns all inputs as `case/name` and all results as `case/form/name`."""
    arrays: Arrays = {}
    for name, case in make_cases().items():
        arrays |= {f"{name}/{field}": value for field, value in case.items()}
        for form in FORMS:
            found = solve(case, form)
            arrays |= {f"{name}/{form}/{field}": value for field, value in found.items()}
    return arrays


class TableModel(torch.nn.Module):
    """What TRL takes for a model: the first id of a row says which row of a table answers it."""

    is_gradient_checkpointing = False

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = table

    def forward(self, input_ids: torch.Tensor, labels: Any = None, **_: Any) -> SimpleNamespace:
        """Returns scores of the ids after the first, and logits of two ids, 0 being the target."""
        log_probs = self.table[input_ids[:, 0]]
        logits = torch.stack([log_probs, torch.log(-torch.expm1(log_probs))], dim=-1)
        logits = torch.cat([logits, logits[:, :1]], dim=1)
        if labels is not None:
            log_probs = log_probs * (labels[:, 1:] != -100)
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs, logits=logits, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
        )


def bare_trainer(trainer: type, **attributes: Any) -> Any:
    """Returns a trainer without a model, data or process group."""
    made = object.__new__(trainer)
    made.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    made.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    made.aux_loss_enabled = made.precompute_ref_logps = False
    made._metrics = defaultdict(lambda: defaultdict(list))
    made._total_train_tokens, made._tp_size = 0, 1
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def rows_for(numbers: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids `[R, L + 1]` that ask a `TableModel` for these rows, and their mask."""
    mask = torch.cat([torch.zeros_like(weights[:, :1]), weights], dim=1).long()
    ids = torch.zeros_like(mask)
    ids[:, 0] = numbers
    return ids, mask


class TRL:
    """TRL's own loss of a case, the mean over units."""

    def __init__(self, case: Arrays, log_probs: torch.Tensor):
        # Padding has probability 1, of which the other id's logit would be infinite.
        policy = torch.where(log_probs < 0, log_probs, log_probs - 1).flatten(0, 1)
        self.policy = TableModel(policy)
        reference = torch.tensor(case["reference"], dtype=torch.float64)
        self.reference = TableModel(reference.flatten(0, 1))
        self.weights = torch.tensor(case["weights"], dtype=torch.float64)
        self.labels = torch.tensor(case["labels"]) > 0
        numbers = torch.arange(policy.shape[0]).reshape(-1, 2)
        self.first, self.second = (rows_for(numbers[:, i], self.weights[:, i]) for i in range(2))

    def loss(self, form: str) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the mean loss, and TRL's metrics."""
        method, keys = FORMS[form]
        if method == "kto":
            return self._kto(keys)
        if method in ("dpo", "ipo"):
            return self._dpo(method, keys)
        return self._without_reference(method, keys)

    def _dpo(self, method: str, keys: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        from trl import DPOTrainer

        normalised = "sigmoid_norm" if keys.get("normalised") else "sigmoid"
        trainer = bare_trainer(
            DPOTrainer,
            model=self.policy,
            ref_model=self.reference,
            beta=keys["beta"],
            label_smoothing=keys.get("label_smoothing", 0.0),
            loss_types=["ipo" if method == "ipo" else "robust" if "robust" in keys else normalised],
            loss_weights=[1.0],
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            use_weighting=False,
        )
        ids, mask = (torch.cat(pair) for pair in zip(self.first, self.second, strict=True))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        loss = trainer._compute_loss(self.policy, inputs, False)
        return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}

    def _kto(self, keys: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        from trl import KTOTrainer

        trainer = bare_trainer(
            KTOTrainer,
            model=self.policy,
            ref_model=self.reference,
            loss_type="kto",
            calculate_KL=True,
            **keys,
        )
        inputs = {"label": self.labels}
        for prefix, (ids, mask) in (("", self.first), ("KL_", self.second)):
            inputs |= {f"{prefix}input_ids": ids, f"{prefix}completion_mask": mask}
            inputs[f"{prefix}attention_mask"] = torch.ones_like(ids)
        loss = trainer._compute_loss(self.policy, inputs, False)
        return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}

    def _without_reference(
        self, method: str, keys: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer

        trainer = bare_trainer(
            ORPOTrainer if method == "orpo" else CPOTrainer,
            beta=keys["weight" if method == "orpo" else "beta"],
            alpha=0.0,
            cpo_alpha=keys.get("alpha", 0.0),
            simpo_gamma=keys.get("gamma"),
            loss_type="simpo" if method == "simpo" else "sigmoid",
            label_smoothing=0.0,
            is_encoder_decoder=False,
            pad_token_id=0,
            padding_value=0,
        )
        # One pair at a time: TRL's cross entropy of several is an average over all their tokens.
        results = []
        for pair in range(len(self.weights)):
            inputs = {}
            for name, (ids, mask) in (("chosen", self.first), ("rejected", self.second)):
                ids, mask = ids[pair : pair + 1], mask[pair : pair + 1]
                inputs[f"{name}_input_ids"] = ids
                inputs[f"{name}_attention_mask"] = mask  # ORPO's says what cross entropy is of
                inputs[f"{name}_labels"] = torch.where(mask > 0, 0, -100)
            results.append(trainer.get_batch_loss_metrics(self.policy, inputs))
        losses, metrics = zip(*results, strict=True)
        means = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        return torch.stack(losses).mean(), means


def metrics_of(found: Arrays, labels: np.ndarray) -> dict[str, float]:
    """Returns our results under the names of TRL's metrics."""
    if "reward" in found:
        means = {"kl": float(found["kl"])}
        for name, sign in (("chosen", 1), ("rejected", -1)):
            if (labels == sign).any():
                means[f"rewards/{name}"] = float(found["reward"][labels == sign].mean())
        return means
    chosen, rejected = found["chosen_reward"], found["rejected_reward"]
    means = {
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/accuracies": float((chosen > rejected).mean()),
    }
    if "nll" in found:
        means["nll_loss"] = float(found["nll"].mean())
    if "log_odds_ratio" in found:
        means["log_odds_chosen"] = float(found["log_odds_ratio"].mean())
    return means


def differences_from_trl() -> Iterator[str]:
    """Yields where TRL's loss, gradient or metrics are not those stored, one line for each."""
    for name, case in make_cases().items():
        for form, (method, keys) in FORMS.items():
            if method == "dpo" and ("normalised" in keys and "robust" in keys):
                continue  # TRL has no such combination
            if method == "dpo" and "label_smoothing" in keys and "robust" not in keys:
                continue  # nor the conservative form any more, see `conservative_differences`
            log_probs = torch.tensor(case["log_probs"], dtype=torch.float64, requires_grad=True)
            loss, metrics = TRL(case, log_probs).loss(form)
            (gradient,) = torch.autograd.grad(loss, log_probs)
            ours = solve(case, form)
            count = len(case["labels"])
            expected = metrics_of(ours, case["labels"])
            # TRL's rewards are of sums, whatever the loss compares.
            if method == "ipo" or "normalised" in keys:
                expected = {}
            if keys.get("alpha") == 0:
                expected.pop("nll_loss")  # which TRL then leaves out
            pairs = [("loss", loss.item(), ours["loss"].mean())]
            pairs.append(("gradient", gradient.numpy() * count, ours["gradient"]))
            pairs += [(field, metrics[field], value) for field, value in expected.items()]
            for field, theirs, value in pairs:
                # TRL's odds, and its shares of pairs, are float32.
                limit = 1e-5 if method == "orpo" or field == "rewards/accuracies" else 1e-9
                scale = max(np.abs(value).max(), 1e-12)
                error = np.abs(np.asarray(theirs) - value).max() / scale
                if not error <= limit:
                    yield f"{name}/{form}/{field}: differs from TRL by {error:.2e}"


def conservative_differences() -> Iterator[str]:
    """As `differences_from_trl`, of smoothed labels, which TRL keeps in its CPO alone."""
    from trl.experimental.cpo import CPOTrainer

    _, keys = FORMS["dpo_conservative"]
    trainer = bare_trainer(CPOTrainer, alpha=0.0, loss_type="sigmoid", **keys)
    for name, case in make_cases().items():
        ratio = sums_of(case, torch.tensor(case["log_probs"], dtype=torch.float64))["ratio"]
        losses, chosen, _ = trainer.cpo_loss(ratio[:, 0], ratio[:, 1])
        ours = solve(case, "dpo_conservative")
        for field, theirs in (("loss", losses), ("chosen_reward", chosen)):
            if not np.allclose(theirs.numpy(), ours[field], rtol=1e-9, atol=0):
                yield f"{name}/dpo_conservative/{field}: differs from TRL"


def main() -> None:
    """Compares with TRL."""
    import trl

    torch.set_num_threads(1)
    if problems := [*differences_from_trl(), *conservative_differences()]:
        sys.exit("\n".join(problems))
    print(f"TRL {trl.__version__} gives the same losses, gradients and metrics")


if __name__ == "__main__":
    main()
