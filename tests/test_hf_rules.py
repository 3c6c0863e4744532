"""Layouts, checked against einsum and by going both ways."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.hf.rules import Rule, expand


def tensor(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_a_group_is_one_axis_of_theirs_first_letter_outermost():
    rule = Rule("q", "q_proj", "(n h) d -> d n h")
    theirs = tensor(6, 5)
    ours = rule.to_ours(theirs, (5, 3, 2))
    assert ours.shape == (5, 3, 2)
    for n in range(3):
        for h in range(2):
            np.testing.assert_array_equal(ours[:, n, h], theirs[n * 2 + h])


def test_projecting_in_either_layout_is_the_same():
    rule = Rule("o", "o_proj", "d (n h) -> n h d")
    theirs = tensor(4, 6)
    heads = tensor(2, 3)
    ours = rule.to_ours(theirs, (2, 3, 4))
    np.testing.assert_array_equal(np.einsum("nh,nhd->d", heads, ours), theirs @ heads.reshape(-1))


def test_reading_is_a_view_of_the_file():
    theirs = tensor(6, 5)
    assert Rule("q", "q_proj", "(n h) d -> d n h").to_ours(theirs, (5, 3, 2)).base is not None
    assert np.shares_memory(Rule("w", "w", "f d -> d f").to_ours(theirs, (5, 6)), theirs)


LAYOUTS = [
    ("v d -> v d", "vd"),
    ("f d -> d f", "df"),
    ("(n h) d -> d n h", "dnh"),
    ("(k h) d -> d k h", "dkh"),
    ("d (n h) -> n h d", "nhd"),
    ("d -> d", "d"),
    ("e (a b c) d -> c d e b a", "cdeba"),
]


@given(layout=st.sampled_from(LAYOUTS), sizes=st.lists(st.integers(1, 4), min_size=5, max_size=5))
def test_there_and_back_is_the_same_tensor(layout, sizes):
    text, letters = layout
    rule = Rule("ours", "theirs", text)
    shape = tuple(sizes[: len(letters)])
    theirs = tensor(*rule.shape_theirs(shape))
    back = rule.to_theirs(rule.to_ours(theirs, shape))
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, theirs)


@pytest.mark.parametrize(
    "layout",
    ["f d", "f d -> d", "f d -> d f f", "f f -> f", "f d -> (d f)", "(f d -> d f", "F d -> d F"],
)
def test_a_layout_that_says_nothing_sensible_is_refused(layout):
    with pytest.raises(ValueError, match="same letters, once each"):
        Rule("w", "w", layout)


def test_one_parameter_of_layers_is_one_tensor_a_layer():
    rules = [Rule("layers.w", "layers.{layer}.weight", "f d -> d f"), Rule("n", "norm", "d -> d")]
    tensors = list(expand(rules, {"n": (4,), "layers.w": (2, 4, 3)}))
    assert [(tensor.name, tensor.layer, tensor.shape) for tensor in tensors] == [
        ("layers.0.weight", 0, (4, 3)),
        ("layers.1.weight", 1, (4, 3)),
        ("norm", None, (4,)),
    ]


def test_rules_of_absent_parameters_are_passed_over():
    rules = [Rule("embed.w", "embed", "v d -> v d"), Rule("head.w", "head", "v d -> d v")]
    assert [tensor.name for tensor in expand(rules, {"embed.w": (3, 2)})] == ["embed"]


def test_a_parameter_without_rule_is_an_error():
    with pytest.raises(ValueError, match=r"No rule .*: head\.w"):
        list(expand([Rule("embed.w", "embed", "v d -> v d")], {"embed.w": (3, 2), "head.w": (2,)}))
