"""Objectives of preferences: PyTorch's losses and gradients, and what must not change them."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data.batch import Batch
from jaxft.errors import ConfigError
from jaxft.training.objectives import dpo
from jaxft.training.objectives.preferences import make_pair_objective
from tests.oracle.cases import PREFERENCE_FORMS, load_preferences
from tests.preference_rows import FixedPolicy, pack_units

CASES = load_preferences()
MOST_UNITS, LENGTH = 4, 130
# Each holds units in a row in no order, some rows fewer, and one row nothing.
LAYOUTS = {
    "several": [[4, 0, 6], [2], [5, 1, 3], []],
    "single": [[], [0], [], []],
    "equal": [[2, 0], [], [1], []],
    "extreme": [[3, 1], [5, 0, 2], [], [4]],
}
ONE_A_ROW = [[0], [1], [2], [3], [4], [5], [6]]
PAIR_FORMS = [form for form, (method, _) in PREFERENCE_FORMS.items() if method != "kto"]
REFERENCE_FORMS = [form for form in PAIR_FORMS if form.startswith(("dpo", "ipo"))]
FIGURES = ("chosen_reward", "rejected_reward", "nll", "log_odds_ratio")


def objective_of(form):
    """Returns the objective and the keys of a form."""
    method, values = PREFERENCE_FORMS[form]
    module = importlib.import_module(f"jaxft.training.objectives.{method}")
    return module.OBJECTIVE, module.OBJECTIVE.keys(**values)


def compiled(form):
    """Returns `(log_probs, batch) -> (terms, gradient, terms of units)`."""
    method, values = PREFERENCE_FORMS[form]
    numbers = {name: value for name, value in values.items() if not isinstance(value, bool)}
    switches = tuple(values.keys() - numbers.keys())
    return functools.partial(_judge(method, switches), numbers)


@functools.cache
def _judge(method, switches):
    """Compiled once for all values of keys that are numbers."""

    def judge(numbers, log_probs, batch):
        objective = importlib.import_module(f"jaxft.training.objectives.{method}").OBJECTIVE
        keys = objective.keys(**dict.fromkeys(switches, True))
        for name, value in numbers.items():
            setattr(keys, name, value)

        def total(log_probs):
            terms = objective.loss(FixedPolicy(log_probs, MOST_UNITS), batch, keys)
            return terms.total, terms

        gradient, terms = jax.grad(total, has_aux=True)(log_probs)
        return terms, gradient, objective.rows(FixedPolicy(log_probs, MOST_UNITS), batch, keys)

    return jax.jit(judge)


@functools.cache
def compiled_whole():
    objective, keys = objective_of("kto")
    return jax.jit(lambda x, batch: objective.whole(FixedPolicy(x, MOST_UNITS), batch, keys))


def pack_case(name, form, rows, length=LENGTH):
    """Returns the packed rows of a case, with the KL estimate of all of them for KTO."""
    labelled = PREFERENCE_FORMS[form][0] == "kto"
    packed = pack_units(CASES[name], rows, length, labelled=labelled)
    if not labelled:
        return packed
    total, count = compiled_whole()(packed.log_probs, packed.batch)["kl"]
    return pack_units(CASES[name], rows, length, labelled=True, kl=total / count)


def judge_case(name, form, rows, length=LENGTH):
    packed = pack_case(name, form, rows, length)
    terms, gradient, units = compiled(form)(packed.log_probs, packed.batch)
    gradient = packed.unpack(gradient, CASES[name]["log_probs"])
    return terms, gradient, jax.tree.map(packed.of_units, units)


def assert_close(found, expected, limit=1e-5):
    """Compares with float64, relative to the largest value."""
    expected = np.asarray(expected)
    scale = max(np.abs(expected).max(), 1e-6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit * scale)


def above_zero(margin):
    """Equal ones count half."""
    return (1 + np.sign(margin)) / 2


@pytest.mark.parametrize("form", PREFERENCE_FORMS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_packed_units_are_those_of_torch(form, case):
    terms, gradient, units = judge_case(case, form, LAYOUTS[case])
    expected = {name: CASES[case][f"{form}/{name}"] for name in ("loss", "gradient")}
    assert_close(units.total, expected["loss"])
    assert_close(terms.total, expected["loss"].sum())
    assert_close(gradient, expected["gradient"])
    # A unit with a small gradient is as right as one with a large one.
    for unit, of_unit in zip(gradient, expected["gradient"], strict=True):
        if np.abs(of_unit).max() > 1e-6:
            assert_close(unit, of_unit, 1e-4)
    np.testing.assert_array_equal(units.weight, 1)
    assert terms.weight == len(expected["loss"])


@pytest.mark.parametrize("form", PAIR_FORMS)
@pytest.mark.parametrize("case", CASES)
def test_figures_of_pairs_are_those_of_torch(form, case):
    _, _, units = judge_case(case, form, LAYOUTS[case])
    stored = CASES[case]
    for name in FIGURES:
        assert (name in units.figures) == (f"{form}/{name}" in stored)
        if name in units.figures:
            assert_close(units.figures[name][0], stored[f"{form}/{name}"])
    chosen, rejected = (stored[f"{form}/{name}"] for name in FIGURES[:2])
    largest = max(np.abs(chosen).max(), np.abs(rejected).max())
    np.testing.assert_allclose(units.figures["margin"][0], chosen - rejected, atol=1e-5 * largest)
    np.testing.assert_array_equal(units.figures["accuracy"][0], above_zero(chosen - rejected))
    sums = np.sum(np.float64(stored["log_probs"]) * stored["weights"], axis=-1)
    of_tokens = sums / np.sum(stored["weights"], axis=-1)
    likelier = above_zero(of_tokens[:, 0] - of_tokens[:, 1])
    np.testing.assert_array_equal(units.figures["likelihood_accuracy"][0], likelier)
    assert_close(units.figures["chosen_log_prob"][0], sums[:, 0])
    assert_close(units.figures["rejected_log_prob"][0], sums[:, 1])


@pytest.mark.parametrize("form", ["kto", "kto_weighted"])
@pytest.mark.parametrize("case", CASES)
def test_figures_of_labelled_answers_are_those_of_torch(form, case):
    terms, _, units = judge_case(case, form, LAYOUTS[case])
    stored, labels = CASES[case], CASES[case]["labels"]
    reward, kl = stored[f"{form}/reward"], stored[f"{form}/kl"]
    for name, label in (("chosen", 1), ("rejected", -1)):
        found, count = units.figures[f"{name}_reward"]
        np.testing.assert_array_equal(count, labels == label)
        assert_close(found, np.where(labels == label, reward, 0))
        assert terms.figures[f"{name}_log_prob"][1] == np.sum(labels == label)
    assert_close(units.figures["kl"][0], np.full(len(labels), kl))
    beta = PREFERENCE_FORMS[form][1]["beta"]
    right = above_zero(labels * (reward / beta - kl))
    np.testing.assert_array_equal(units.figures["accuracy"][0], right)


@pytest.mark.parametrize("form", PREFERENCE_FORMS)
def test_terms_are_the_sums_of_those_of_units(form):
    packed = pack_case("several", form, LAYOUTS["several"])
    terms, _, units = compiled(form)(packed.log_probs, packed.batch)
    assert all(leaf.shape == () for leaf in jax.tree.leaves(terms))
    assert all(leaf.shape == (4, MOST_UNITS) for leaf in jax.tree.leaves(units))
    jax.tree.map(lambda a, b: assert_close(a, np.sum(b)), terms, units)


@pytest.mark.parametrize("form", ["dpo_all", "ipo", "simpo", "cpo", "orpo", "kto_weighted"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_add_up_to_the_whole(form, parts):
    """With an odd number of units, and a last part that holds none."""
    whole = pack_case("several", form, LAYOUTS["several"])
    found, gradients = None, []
    for part in range(parts):
        some = slice(part * 4 // parts, (part + 1) * 4 // parts)
        terms, gradient, _ = compiled(form)(
            whole.log_probs[some], whole.batch.map(lambda column, some=some: column[some])
        )
        found = terms if found is None else found + terms
        gradients.append(gradient)
    stored = CASES["several"]
    assert_close(found.total, stored[f"{form}/loss"].sum())
    assert found.weight == 7
    gradient = whole.unpack(np.concatenate(gradients), stored["log_probs"])
    assert_close(gradient, stored[f"{form}/gradient"])


@pytest.mark.parametrize("form", ["dpo_all", "ipo", "simpo", "cpo", "orpo", "kto_weighted"])
def test_units_one_a_row_give_what_packed_units_give(form):
    packed = judge_case("several", form, LAYOUTS["several"])
    alone = judge_case("several", form, ONE_A_ROW, length=48)
    jax.tree.map(lambda a, b: assert_close(a, b), alone, packed)


@pytest.mark.parametrize("form", PREFERENCE_FORMS)
def test_padding_alone_gives_zeros(form):
    packed = pack_units(CASES["several"], [[], [], [], []], LENGTH)
    found = compiled(form)(packed.log_probs, packed.batch)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("form", PREFERENCE_FORMS)
def test_what_is_not_scored_changes_nothing(form):
    """Prompts of chosen and rejected answers, ends of documents, padding."""
    packed = pack_case("several", form, LAYOUTS["several"])
    before, gradient, _ = compiled(form)(packed.log_probs, packed.batch)
    unread = packed.batch.weights == 0
    assert not np.any(np.asarray(gradient)[unread])
    moved = np.where(unread, -3.0, packed.log_probs)
    reference = np.where(unread, -9.0, packed.batch["reference"])
    after, _, _ = compiled(form)(moved, packed.batch.with_columns(reference=reference))
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("form", REFERENCE_FORMS)
def test_a_policy_that_is_the_reference_has_no_margin_and_the_expected_loss(form):
    objective, keys = objective_of(form)
    terms, _, units = judge_case("equal", form, LAYOUTS["equal"])
    expected = objective.start(keys)
    assert expected.keys() == {"loss", "margin"}
    np.testing.assert_array_equal(units.figures["margin"][0], 0)
    np.testing.assert_allclose(units.total, expected["loss"], rtol=1e-6)
    assert terms.figures["accuracy"] == (1.5, 3)


@pytest.mark.parametrize("form", ["kto", "kto_weighted"])
def test_kto_expects_half_the_weight_and_no_rewards_at_the_start(form):
    objective, keys = objective_of(form)
    terms, _, _ = judge_case("equal", form, LAYOUTS["equal"])
    found = {name: total / max(count, 1) for name, (total, count) in terms.figures.items()}
    found["loss"] = terms.total / terms.weight
    expected = objective.start(keys)
    assert ("loss" in expected) == (form == "kto")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-7)


@pytest.mark.parametrize("form", ["simpo", "cpo", "orpo"])
def test_objectives_without_a_reference_expect_nothing_and_read_none(form):
    objective, keys = objective_of(form)
    assert not objective.reference and objective.start(keys) == {}
    packed = pack_case("single", form, LAYOUTS["single"])
    columns = {name: packed.batch[name] for name in packed.batch if name not in ("reference", "kl")}

    def loss(log_probs, batch):
        return objective.loss(FixedPolicy(log_probs, MOST_UNITS), batch, keys)

    jax.eval_shape(loss, packed.log_probs, Batch(**columns))


def test_beta_multiplies_rewards_once():
    """Two answers of one token: log-ratios 2 and -1."""
    case = {
        "log_probs": np.float32([[[-1, -9], [-4, -9]]]),
        "reference": np.float32([[[-3, -9], [-3, -9]]]),
        "weights": np.float32([[[1, 0], [1, 0]]]),
        "lengths": np.int32([[2, 2]]),
    }
    packed = pack_units(case, [[0]], 4)
    terms, _, _ = compiled("dpo_sharp")(packed.log_probs, packed.batch)
    np.testing.assert_allclose(terms.total, math.log1p(math.exp(-0.7 * 3)), rtol=1e-6)
    figures = {name: float(total) for name, (total, _) in terms.figures.items()}
    assert figures == pytest.approx(
        {
            "accuracy": 1,
            "margin": 2.1,
            "chosen_reward": 1.4,
            "rejected_reward": -0.7,
            "chosen_log_prob": -1,
            "rejected_log_prob": -4,
            "likelihood_accuracy": 1,
        }
    )


def test_a_small_difference_of_long_answers_is_not_lost_to_rounding():
    """Two sums of thousands of nats differ by a half: their own rounding is a thousandth."""
    random = np.random.RandomState(0)
    shape = (1, 2, 4000)
    log_probs = np.float32(-random.exponential(2, size=shape))
    case = {
        "log_probs": log_probs,
        "reference": log_probs + np.float32(1e-4 * random.normal(1, 1, size=shape)),
        "weights": np.ones(shape, np.float32),
        "lengths": np.int32([[4000, 4000]]),
    }
    packed = pack_units(case, [[0]], 8000)
    terms, _, _ = compiled("dpo")(packed.log_probs, packed.batch)
    ratio = np.sum(np.float64(log_probs) - np.float64(case["reference"]), axis=-1)[0]
    assert -1 < ratio[0] < -0.1
    np.testing.assert_allclose(terms.figures["chosen_reward"][0], 0.1 * ratio[0], rtol=1e-5)


@pytest.mark.slow(seconds=3)
def test_averages_are_over_scored_tokens_alone():
    """A longer prompt, and tokens of the answer that carry no loss, change nothing."""
    case = CASES["single"]
    longer = {
        name: np.concatenate([np.zeros_like(case[name][..., :3]), case[name]], axis=-1)
        for name in ("log_probs", "reference", "weights")
    }
    longer = case | longer | {"lengths": case["lengths"] + 3}
    for form in ("dpo_normalised", "ipo", "simpo", "cpo", "orpo"):
        packed = (pack_units(units, [[0]], 48) for units in (case, longer))
        found = [compiled(form)(x.log_probs, x.batch)[0].total for x in packed]
        np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("chosen, rejected", [(0.0, -2.0), (-2.0, 0.0), (0.0, 0.0), (-1e-9, -1e3)])
def test_orpo_learns_from_answers_whose_probability_rounds_to_one_or_zero(chosen, rejected):
    case = {
        "log_probs": np.float32([[[chosen, -9], [rejected, -9]]]),
        "reference": np.zeros((1, 2, 2), np.float32),
        "weights": np.float32([[[1, 0], [1, 0]]]),
        "lengths": np.int32([[2, 2]]),
    }
    packed = pack_units(case, [[0]], 4)
    terms, gradient, _ = compiled("orpo_heavy")(packed.log_probs, packed.batch)
    assert np.isfinite(terms.total) and np.all(np.isfinite(gradient))
    assert gradient[0, 0] <= -1  # cross entropy, and what the odds add
    # As long as the rejected answer is the likelier one, or as likely, its odds are pushed down.
    assert gradient[0, 2] > 0.5 if rejected >= chosen else gradient[0, 2] >= 0


def test_kl_is_the_mean_over_answers_of_all_micro_batches_and_at_least_zero():
    case = CASES["several"]
    packed = pack_units(case, LAYOUTS["several"], LENGTH, labelled=True)
    sums = [
        compiled_whole()(packed.log_probs[i : i + 1], packed.batch.map(lambda x, i=i: x[i, None]))
        for i in range(4)
    ]
    total, count = np.sum([s["kl"] for s in sums], axis=0)
    ratio = np.sum((np.float64(case["log_probs"]) - case["reference"]) * case["weights"], -1)
    assert count == 7
    assert_close(total, ratio[:, 1].sum())
    below = pack_units(case, LAYOUTS["several"], LENGTH, labelled=True, kl=-3.0)
    at_zero = pack_units(case, LAYOUTS["several"], LENGTH, labelled=True, kl=0.0)
    found, expected = (compiled("kto")(x.log_probs, x.batch)[0] for x in (below, at_zero))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found.figures["kl"] == (0, 7)


def test_answers_to_other_prompts_are_not_learnt():
    packed = pack_case("several", "kto", LAYOUTS["several"])
    _, gradient, _ = compiled("kto")(packed.log_probs, packed.batch)
    assert np.any(gradient) and not np.any(np.asarray(gradient)[packed.batch["labels"] == 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_robust_dpo_needs_a_share_of_wrong_labels_below_a_half(smoothing):
    keys = objective_of("dpo")[0].keys
    problem, *rest = keys(robust=True, label_smoothing=smoothing).problems()
    assert "--config.objective.dpo.label_smoothing=0.1" in problem and not rest
    assert list(keys(robust=True, label_smoothing=0.3).problems()) == []
    assert list(keys(label_smoothing=0.5).problems()) == []


def test_a_loss_that_is_a_mean_over_pairs_is_refused_with_its_shape():
    def mean_loss(pairs, keys):
        return dpo.pair_loss(pairs, keys)._replace(loss=jnp.zeros(()))

    objective = make_pair_objective(dpo.DpoKeys, mean_loss, reference=True)
    packed = pack_case("several", "dpo", LAYOUTS["several"])
    policy = FixedPolicy(packed.log_probs, MOST_UNITS)
    with pytest.raises(ConfigError, match=r"mean_loss has the shapes loss \[\]; expected \[4, 4\]"):
        objective.rows(policy, packed.batch, dpo.DpoKeys())
