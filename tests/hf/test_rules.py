"""Layouts, checked against einsum, against NumPy's own joining, and by going both ways."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.hf.rules import Rule, Tensor, expand, of_stacks


def tensor(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def only(rules: list[Rule], shapes: dict[str, tuple[int, ...]]) -> Tensor:
    [found] = expand(rules, shapes)
    return found


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


@pytest.mark.parametrize("layout", ["(n h) d -> n h d", "(n h) d -> d n h"])
def test_reading_is_a_view_of_the_file(layout):
    theirs = tensor(6, 5)
    shape = (3, 2, 5) if layout.endswith("n h d") else (5, 3, 2)
    assert np.shares_memory(Rule("q", "q_proj", layout).to_ours(theirs, shape), theirs)


@pytest.mark.parametrize("layout", ["(+ n h) d -> n h d", "(n h +) d -> d n h"])
def test_reading_a_part_is_a_view_of_the_file(layout):
    shape = (2, 3, 4) if layout.endswith("n h d") else (4, 2, 3)
    theirs = tensor(18, 4)
    found = only([Rule(name, "qkv", layout) for name in "qkv"], dict.fromkeys("qkv", shape))
    assert found.shape == (18, 4)
    for part in found.parts:
        assert np.shares_memory(part.to_ours(theirs), theirs)


def test_parts_marked_first_are_concatenated_in_the_order_of_the_table():
    rules = [
        Rule("q", "qkv", "(+ n h) d -> n h d"),
        Rule("k", "qkv", "(+ k h) d -> k h d"),
        Rule("v", "qkv", "(+ k h) d -> k h d"),
    ]
    found = only(rules, {"v": (1, 2, 3), "k": (1, 2, 3), "q": (2, 2, 3)})
    pieces = [tensor(4, 3), 100 + tensor(2, 3), 200 + tensor(2, 3)]
    theirs = np.concatenate(pieces)
    for part, piece in zip(found.parts, pieces, strict=True):
        np.testing.assert_array_equal(part.to_ours(theirs).reshape(piece.shape), piece)


def test_parts_marked_last_lie_in_turns():
    rules = [Rule(name, "gate_up", "e d (f +) -> e f d") for name in ("gate", "up")]
    found = only(rules, dict.fromkeys(("gate", "up"), (2, 5, 3)))
    theirs = tensor(2, 3, 10)
    gate, up = (part.to_ours(theirs) for part in found.parts)
    np.testing.assert_array_equal(gate, theirs[..., ::2].transpose(0, 2, 1))
    np.testing.assert_array_equal(up, theirs[..., 1::2].transpose(0, 2, 1))


LAYOUTS = [
    ("v d -> v d", "vd"),
    ("f d -> d f", "df"),
    ("(n h) d -> n h d", "nhd"),
    ("(k h) d -> d k h", "dkh"),
    ("d (n h) -> n h d", "nhd"),
    ("d -> d", "d"),
    ("->", ""),
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


SHARED = [
    ("(+ a) b -> a b", 0),
    ("b (+ a) -> a b", 0),
    ("b (+ c a) -> a b c", 0),
    ("(a +) b -> b a", None),
    ("b (c a +) -> a b c", None),
]


@given(
    layout=st.sampled_from(SHARED),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    layers=st.integers(1, 3),
)
def test_parts_there_and_back_are_the_same_tensor(layout, shape, sizes, layers):
    text, free = layout
    shape = shape[: len(text.partition("->")[2].split())]
    names = [f"part{number}" for number in range(len(sizes))]
    shapes = {}
    for name, size in zip(names, sizes, strict=True):
        own = list(shape)
        if free is not None:  # parts in turns must be of equal size
            own[free] = size
        shapes[name] = (layers, *own)
    tensors = list(expand([Rule(n, "layers.{layer}.w", text) for n in names], shapes))
    assert len(tensors) == layers
    for found in tensors:
        theirs = tensor(*found.shape)
        ours = [part.to_ours(theirs) for part in found.parts]
        assert [array.shape for array in ours] == [shapes[name][1:] for name in names]
        back = found.to_theirs(ours)
        assert back.flags.c_contiguous
        np.testing.assert_array_equal(back, theirs)


@pytest.mark.parametrize(
    "layout",
    [
        "f d",
        "f d -> d",
        "f d -> d f f",
        "f f -> f",
        "f d -> (d f)",
        "(f d -> d f",
        "F d -> d F",
        "+ f d -> f d",
        "(f + d) -> f d",
        "(+) f d -> f d",
        "(+ f) (+ d) -> f d",
        "(+ f +) d -> f d",
        "(+ f) d -> + f d",
    ],
)
def test_a_layout_that_says_nothing_sensible_is_refused(layout):
    with pytest.raises(ValueError, match="same letters, once each"):
        Rule("w", "w", layout)


@pytest.mark.parametrize("name", ["{expert}.w", "{expert}.{layer}", "{layer}.{layer}", "{rank}.w"])
def test_a_name_with_other_placeholders_is_refused(name):
    with pytest.raises(ValueError, match="expected no braces"):
        Rule("w", name, "d -> d")


def test_one_parameter_of_layers_is_one_tensor_a_layer():
    rules = [Rule("layers.w", "layers.{layer}.weight", "f d -> d f"), Rule("n", "norm", "d -> d")]
    tensors = list(expand(rules, {"n": (4,), "layers.w": (2, 4, 3)}))
    assert [(t.name, t.parts[0].index, t.parts[0].shape, t.shape) for t in tensors] == [
        ("layers.0.weight", (0,), (4, 3), (3, 4)),
        ("layers.1.weight", (1,), (4, 3), (3, 4)),
        ("norm", (), (4,), (4,)),
    ]


def test_one_parameter_of_experts_is_one_tensor_a_layer_and_expert():
    rules = [Rule("w", "layers.{layer}.experts.{expert}.w", "f d -> f d")]
    tensors = list(expand(rules, {"w": (2, 3, 5, 4)}))
    assert [t.name for t in tensors] == [
        f"layers.{layer}.experts.{expert}.w" for layer in range(2) for expert in range(3)
    ]
    assert [t.parts[0].index for t in tensors] == list(np.ndindex(2, 3))
    assert {t.shape for t in tensors} == {(5, 4)}


def test_rules_of_absent_parameters_are_passed_over():
    rules = [Rule("embed.w", "embed", "v d -> v d"), Rule("head.w", "head", "v d -> d v")]
    assert [tensor.name for tensor in expand(rules, {"embed.w": (3, 2)})] == ["embed"]


def test_a_parameter_without_rule_is_an_error():
    with pytest.raises(ValueError, match=r"No rule .*: head\.w"):
        list(expand([Rule("embed.w", "embed", "v d -> v d")], {"embed.w": (3, 2), "head.w": (2,)}))


@pytest.mark.parametrize(
    ("layouts", "shapes", "complaint"),
    [
        (("f d -> f d", "f d -> f d"), ((2, 3), (2, 3)), "mark the same axis"),
        (("(+ f) d -> f d", "f d -> f d"), ((2, 3), (2, 3)), "mark the same axis"),
        (("(+ f) d -> f d", "(f +) d -> f d"), ((2, 3), (2, 3)), "mark the same axis"),
        (("(+ f) d -> f d", "f (+ d) -> f d"), ((2, 3), (2, 3)), "mark the same axis"),
        (("(+ f) d -> f d",), ((2, 3),), "and only these"),
        (("(+ f) d -> f d", "(+ f) d -> f d"), ((2, 3), (2, 4)), "differ in other axes"),
        (("(+ f) d -> f d", "(+ f) -> f"), ((2, 3), (2,)), "differ in other axes"),
        (("(f +) d -> f d", "(f +) d -> f d"), ((2, 3), (4, 3)), "differ in size"),
        (("(+ f) d -> f d", "(+ f) d -> f d"), ((2, 3), None), "does not have: p1"),
    ],
)
def test_rules_that_do_not_share_a_tensor_sensibly_are_refused(layouts, shapes, complaint):
    rules = [Rule(f"p{i}", "w", layout) for i, layout in enumerate(layouts)]
    with pytest.raises(ValueError, match=complaint):
        list(expand(rules, {f"p{i}": shape for i, shape in enumerate(shapes) if shape}))


def test_parts_of_different_numbers_of_layers_are_refused():
    rules = [Rule(name, "{layer}.w", "(+ f) d -> f d") for name in ("a", "b")]
    with pytest.raises(ValueError, match="leading axes differ"):
        list(expand(rules, {"a": (2, 4, 3), "b": (3, 4, 3)}))


def test_two_rules_of_one_parameter_are_refused():
    with pytest.raises(ValueError, match=r"Two rules speak of w\."):
        list(expand([Rule("w", "a", "d -> d"), Rule("w", "b", "d -> d")], {"w": (2,)}))


def test_an_axis_of_size_1_is_left_out():
    rule = Rule("taps", "conv1d", "(k h) 1 w -> k h w")
    theirs = tensor(6, 1, 4)
    ours = rule.to_ours(theirs, (3, 2, 4))
    np.testing.assert_array_equal(ours.reshape(6, 4), theirs[:, 0])
    np.testing.assert_array_equal(rule.to_theirs(ours), theirs)


def test_layers_of_a_stack_have_the_numbers_that_it_has_in_the_model():
    rules = [
        Rule("embed", "embed", "v d -> v d"),
        Rule("layers.up", "layers.{layer}.up", "f d -> f d"),
    ]
    own = {"layers.1": [Rule("layers.q", "layers.{layer}.q", "n d -> n d")]}
    stacks = {"layers.0": range(0, 6, 2), "layers.1": range(1, 6, 2)}
    shapes = {"embed": (2, 2), "layers.0.up": (3, 2, 2), "layers.1.up": (3, 2, 2)}
    found = list(expand(of_stacks(rules, stacks, own), shapes | {"layers.1.q": (3, 2, 2)}))
    places = {t.name: (t.parts[0].rule.ours, t.parts[0].index) for t in found}
    assert places["layers.4.up"] == ("layers.0.up", (2,))
    assert places["layers.3.q"] == ("layers.1.q", (1,))
    assert len(places) == 1 + 6 + 3
    alone = list(of_stacks(rules, {"layers": range(6)}, {}))
    assert alone == rules
