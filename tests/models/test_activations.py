"""Names of what layers keep, and where."""

import pytest

from jaxft.errors import ConfigError
from jaxft.models.activations import ALL, AUTO, RULES, check, kept, offloaded


def problem_of(function, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    [problem] = caught.value.problems
    return problem


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_names_no_activation(rule):
    assert kept(rule) == frozenset()


@pytest.mark.parametrize(
    ("remat", "names"),
    [
        ("qkv", {"qkv"}),
        ("mlp_out", {"mlp_out"}),
        ("qkv+attention", {"qkv", "attention"}),
        ("attention+qkv", {"qkv", "attention"}),
        ("qkv+attention+attention_out+mlp+mlp_out", set(ALL) - {"inputs"}),
        ("qkv+qkv", {"qkv"}),
    ],
)
def test_names_are_joined_by_plus(remat, names):
    assert kept(remat) == names


@pytest.mark.parametrize(
    ("remat", "nearest"),
    [
        ("atention", "attention"),
        ("qkv+mpl_out", "mlp_out"),
        ("ful", "full"),
        ("dot", "dots"),
    ],
)
def test_an_unknown_name_comes_with_all_and_the_nearest(remat, nearest):
    problem = problem_of(kept, remat)
    assert problem.startswith(
        f"model.remat is {remat!r}; expected one of none, dots, full, auto, or "
    )
    assert "out of qkv, attention, attention_out, mlp, mlp_out." in problem
    assert problem.endswith(f"Did you mean {nearest!r}?")


@pytest.mark.parametrize(
    "remat",
    [
        "",
        "+",
        "qkv+",
        "qkv, attention",
        "full+qkv",  # a rule is no part of a list
        "inputs",  # are always kept
    ],
)
def test_what_is_no_list_of_names_is_refused(remat):
    assert f"model.remat is {remat!r}" in problem_of(kept, remat)


@pytest.mark.parametrize("remat", [*RULES, "qkv", "qkv+mlp"])
def test_nothing_is_moved_to_the_host_by_default(remat):
    assert offloaded(remat, "") == frozenset()


@pytest.mark.parametrize(
    ("remat", "offload", "names"),
    [
        ("full", "inputs", {"inputs"}),
        ("qkv", "inputs", {"inputs"}),
        ("qkv+mlp", "mlp", {"mlp"}),
        ("qkv+mlp", "inputs+mlp+qkv", {"inputs", "mlp", "qkv"}),
    ],
)
def test_what_is_kept_can_wait_on_the_host(remat, offload, names):
    assert offloaded(remat, offload) == names


@pytest.mark.parametrize(
    ("remat", "offload", "unkept", "advice"),
    [
        ("full", "qkv", "qkv", "qkv"),
        ("full", "mlp+inputs", "mlp", "mlp"),
        ("qkv", "mlp+attention", "attention, mlp", "attention+mlp+qkv"),
    ],
)
def test_what_is_not_kept_cannot_be_moved_and_the_advice_works(remat, offload, unkept, advice):
    problem = problem_of(offloaded, remat, offload)
    assert f"model.offload names {unkept}, which model.remat {remat!r} does not" in problem
    assert problem.endswith(f"Set --config.model.remat={advice}.")
    assert offloaded(advice, offload)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_what_has_no_name_cannot_be_moved(remat):
    problem = problem_of(offloaded, remat, "inputs")
    assert f"model.remat {remat!r} keeps activations that have no names" in problem
    assert "model.remat=full" in problem


@pytest.mark.parametrize("offload", ["input", "full", "qkv+", "qkv+input"])
def test_an_unknown_name_to_be_moved_comes_with_all(offload):
    problem = problem_of(offloaded, "qkv", offload)
    assert f"model.offload is {offload!r}; expected names joined by '+'" in problem
    assert "out of inputs, qkv, attention, attention_out, mlp, mlp_out." in problem
    assert ("Did you mean 'inputs'?" in problem) == ("input" in offload)


def test_what_is_chosen_later_is_accepted_alone_and_never_taken_for_a_policy():
    check(AUTO, "")
    problem = problem_of(check, AUTO, "inputs")
    assert "model.offload is 'inputs'" in problem and "--config.model.remat=full" in problem
    assert "Name one here, such as --config.model.remat=full." in problem_of(kept, AUTO)
    assert problem_of(check, "aut", "").endswith("Did you mean 'auto'?")
