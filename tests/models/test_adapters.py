"""Adapters: what they compute, against dense matrices; where they are; what they start from."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import AdapterConfig
from jaxft.errors import CheckpointError, ConfigError
from jaxft.models.adapters import is_beside, start_values, weights_in
from jaxft.models.config import Numerics
from jaxft.models.families import architecture_from_hf
from jaxft.models.module import merge
from jaxft.models.weights import Noise, _dropped, dropout_from, row_norm
from jaxft.training.adaptation import adapted
from jaxft.workdir.adapter_note import AdapterNote, read_note
from tests.oracle.cases import CASES, FAMILY_CASES
from tests.tiny import load_tiny, relative_error
from tests.tiny import with_adapters as tiny_with_adapters

RANK = 4


def with_adapters(case: str, **keys):
    """Returns a tiny model's architecture with adapters, and its plain parameters."""
    tiny = load_tiny(case)
    keys = {"rank": RANK} | keys
    architecture = adapted(tiny.architecture, AdapterConfig(**keys))
    return tiny, architecture, architecture.abstract(Numerics())


def random_leaves(abstract, seed=0):
    """Returns values of adapters, none of them zero."""
    random = np.random.RandomState(seed)
    return {
        path: jnp.asarray(random.normal(size=spec.shape) * 0.2 + path.endswith("magnitude"))
        for path, spec in abstract.params.items()
        if is_beside(path)
    }


def merged(architecture, plain, leaves):
    """Returns dense parameters that do the same, in float64: W + s (B A - B0 A0), scaled rows."""
    params = {path: np.asarray(value, np.float64) for path, value in plain.items()}
    for site, adapter in architecture.adaptation.sites.items():
        w = params[f"{site}.w"]
        a, b = (np.asarray(leaves[f"{site}.{x}"], np.float64) for x in ("lora_a", "lora_b"))
        lead = sum(axis in ("layers", "experts") for axis in _axes(architecture, site))
        inputs = a.ndim - lead - 1

        def product(a, b, lead=lead, shape=w.shape):
            rows = b.reshape(*b.shape[:lead], -1, b.shape[-1])
            return (rows @ a.reshape(*a.shape[: lead + 1], -1)).reshape(shape)

        w = w + adapter.scale * product(a, b)
        if adapter.start:
            pair = (leaves[f"{site}.start_a"], leaves[f"{site}.start_b"])
            w = w - adapter.scale * product(*(np.asarray(x, np.float64) for x in pair))
        if adapter.magnitude:
            over = tuple(range(w.ndim - inputs, w.ndim))
            norm = np.sqrt(np.sum(np.square(w), axis=over, keepdims=True))
            wanted = np.asarray(leaves[f"{site}.magnitude"], np.float64)
            w = w / norm * wanted.reshape(norm.shape)
        params[f"{site}.w"] = w
    return {path: jnp.asarray(value, jnp.float32) for path, value in params.items()}


def _axes(architecture, site):
    return architecture.abstract(Numerics()).axes[f"{site}.w"]


@pytest.mark.parametrize("family", sorted(FAMILY_CASES))
def test_an_adapter_takes_r_times_inputs_and_outputs_of_every_linear_layer(family):
    config = CASES[FAMILY_CASES[family][0]]
    architecture = adapted(architecture_from_hf(config), AdapterConfig(rank=RANK))
    abstract, found = architecture.abstract(Numerics()), 0
    for site in architecture.adaptation.sites:
        shape, axes = abstract.params[f"{site}.w"].shape, abstract.axes[f"{site}.w"]
        copies, inputs = 1, 1
        for size, axis in zip(shape, axes, strict=True):
            copies *= size if axis in ("layers", "experts") else 1
        last = -2 if site.endswith("attn.o") else -1
        inputs = np.prod(shape[last:])
        outputs = np.prod(shape) // copies // inputs
        leaves = [abstract.params[f"{site}.{leaf}"].shape for leaf in ("lora_a", "lora_b")]
        assert sum(map(np.prod, leaves)) == RANK * copies * (inputs + outputs), site
        found += sum(map(np.prod, leaves))
    beside = sum(np.prod(s.shape) for path, s in abstract.params.items() if is_beside(path))
    assert found == beside
    of_layers = {p: a for p, a in abstract.axes.items() if p.endswith(".w") and a[0] == "layers"}
    assert {p.removesuffix(".w") for p, a in of_layers.items() if "router" not in a} == (
        architecture.adaptation.sites.keys()
    )


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        ("gqa", {"alphas": "attn=3"}),
        ("gqa", {"dora": True, "scaling": "rslora", "start": "pissa"}),
        ("gqa", {"start": "pissa", "targets": "q_proj|head|down", "ranks": "down=2"}),
        pytest.param("gpt2_tied", {"targets": "c_attn|mlp"}, marks=pytest.mark.slow(seconds=6)),
        ("mixtral_gqa_published", {}),
        pytest.param("gpt_oss_gqa", {"start": "pissa"}, marks=pytest.mark.slow(seconds=6)),
    ],
)
def test_a_model_with_adapters_computes_what_dense_weights_do(case, keys):
    if case not in CASES:
        case = next(name for name in CASES if name.endswith(case))
    tiny, architecture, abstract = with_adapters(case, **keys)
    leaves = random_leaves(abstract)
    tokens = np.random.RandomState(1).randint(tiny.architecture.config.vocab, size=(2, 12))
    found = merge(abstract.graphdef, tiny.params | leaves)(tokens)
    dense = merged(architecture, tiny.params, leaves)
    expected = tiny.merge(dense)(tokens)
    assert float(jnp.max(jnp.abs(expected - tiny.merge()(tokens)))) > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("start", ["zero", "pissa", "orthogonal"])
def test_a_model_starts_as_it_is_without_adapters(start):
    tiny, architecture, abstract = with_adapters("gqa", start=start, dora=start != "zero")
    leaves = start_values(
        tiny.abstract.graphdef, tiny.params, architecture.adaptation, abstract.params, seed=3
    )
    assert leaves.keys() == {path for path in abstract.params if is_beside(path)}
    tokens = np.arange(12)[None] % tiny.architecture.config.vocab
    found = merge(abstract.graphdef, tiny.params | leaves)(tokens)
    np.testing.assert_allclose(found, tiny.merge()(tokens), atol=1e-5)
    a, b = (np.asarray(leaves[f"layers.attn.o.{leaf}"][1]) for leaf in ("lora_a", "lora_b"))
    w = np.asarray(tiny.params["layers.attn.o.w"][1])
    a, w = a.reshape(RANK, -1), w.reshape(len(w), -1)
    scale = architecture.adaptation.sites["layers.attn.o"].scale
    if start == "pissa":
        u, s, vt = np.linalg.svd(w)
        nearest = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        left, least = (np.linalg.norm(w - part) for part in (scale * b @ a, nearest))
        assert least <= left < 1.01 * least
    elif start == "orthogonal":
        np.testing.assert_allclose(b @ a, 0, atol=1e-6)
        assert np.abs(a).max() > 0.01 < np.abs(b).max()
    else:
        bound = 1 / np.sqrt(a.shape[1])
        assert not b.any() and 0.9 * bound < np.abs(a).max() <= bound


def test_the_norm_of_rows_needs_no_matrix_of_the_weights_size():
    random = np.random.RandomState(0)
    w, a, b = (random.normal(size=shape) for shape in ((5, 3, 4), (2, 3, 4), (5, 2)))
    whole = w + 0.7 * np.einsum("or,rij->oij", b, a)
    found = row_norm(*(jnp.asarray(x, jnp.float32) for x in (w, a, b)), scale=0.7, inputs=2)
    np.testing.assert_allclose(found, np.sqrt((whole**2).sum((1, 2))), rtol=1e-5)


def test_dropout_keeps_the_expected_share_and_differs_by_token_layer_and_site():
    seeds = jax.random.bits(jax.random.key(0), (4, 64), jnp.uint32)
    x = jnp.ones((4, 64, 8, 16))

    @functools.partial(jax.jit, static_argnums=1)
    def mask(layer, site):
        with dropout_from(Noise(seeds, layer)):
            return _dropped(x, 0.25, site)

    one = np.asarray(mask(jnp.int32(0), 5))
    assert set(np.unique(one)) == {0, np.float32(4 / 3)}
    share = (one == 0).mean()
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / one.size)
    others = [mask(jnp.int32(1), 5), mask(jnp.int32(0), 6)]
    for other in others:
        # Independent masks agree where both keep or both drop.
        assert abs((np.asarray(other) == one).mean() - 0.625) < 0.02
    by_token = (one == 0).mean(axis=(2, 3))
    assert by_token.std() < 3 * np.sqrt(0.25 * 0.75 / 128)
    assert (_dropped(x, 0.25, 5) == x).all()  # without noise


def test_patterns_choose_sites_ranks_and_scales():
    _, architecture, _ = with_adapters(
        "gqa", targets="q_proj$|mlp", ranks="up_proj=2,mlp=3", alphas="down=30", scaling="rslora"
    )
    sites = architecture.adaptation.sites
    ranks = {path.rpartition(".")[2]: site.rank for path, site in sites.items()}
    assert ranks == {"q": RANK, "gate": 3, "up": 2, "down": 3}
    scales = {path.rpartition(".")[2]: site.scale for path, site in sites.items()}
    assert scales == pytest.approx(
        {"q": 8 / 2, "gate": 6 / 3**0.5, "up": 4 / 2**0.5, "down": 30 / 3**0.5}
    )


@pytest.mark.parametrize(
    ("case", "keys", "complaint"),
    [
        ("gqa", {"targets": "qq_proj"}, r"adapter.targets 'qq_proj' matches no weight"),
        ("gqa", {"ranks": "head=2"}, r"adapter.ranks 'head' matches no weight"),
        ("gqa", {"rank": 400}, r"rank \d+ at most, not 400"),
        ("gqa", {"rank": 3, "start": "orthogonal"}, "halves the rank, and 3 is odd"),
        ("gqa", {"targets": "x"}, r"layers\.attn\.q \(model\.layers\..*\.q_proj\), layers"),
        ("gqa", {"train": "^embed", "added_rows": True}, "trains all of embed.w, and"),
        ("gqa", {"train": "nose"}, "adapter.train 'nose' matches no parameter"),
        ("mixtral", {"dora": True}, "cannot have adapter.dora"),
        ("mixtral", {"dropout": 0.1}, "cannot have adapter.dropout"),
    ],
)
def test_what_a_model_cannot_have_is_refused(case, keys, complaint):
    config = CASES[case if case in CASES else FAMILY_CASES[case][0]]
    with pytest.raises(ConfigError, match=complaint):
        adapted(architecture_from_hf(config), AdapterConfig(**({"rank": RANK} | keys)), added=(3,))


@pytest.mark.slow(seconds=2)
def test_rows_of_added_tokens_are_learnt_in_both_tables():
    tiny = load_tiny("gqa")
    vocab = tiny.architecture.config.vocab
    ids = (vocab - 2, vocab - 1)
    architecture = adapted(tiny.architecture, AdapterConfig(added_rows=True), added=ids)
    abstract = architecture.abstract(Numerics())
    leaves = start_values(
        tiny.abstract.graphdef, tiny.params, architecture.adaptation, abstract.params, seed=0
    )
    assert {path: value.shape[0] for path, value in leaves.items()} == {
        "embed.rows": 2,
        "head.rows": 2,
    }
    tokens = np.array([[1, ids[0], 5, ids[1]]])
    model = merge(abstract.graphdef, tiny.params | leaves)
    np.testing.assert_allclose(model(tokens), tiny.merge()(tokens), atol=1e-6)
    leaves = {path: value + 0.3 for path, value in leaves.items()}
    dense = {
        path: value.at[jnp.asarray(ids)].add(0.3) if path in ("embed.w", "head.w") else value
        for path, value in tiny.params.items()
    }
    model = merge(abstract.graphdef, tiny.params | leaves)
    np.testing.assert_allclose(model(tokens), tiny.merge(dense)(tokens), atol=1e-5)


def test_what_does_not_train_is_kept_in_the_compute_type():
    numerics = Numerics(compute_dtype=jnp.bfloat16)
    tiny = load_tiny("gqa")
    architecture = adapted(tiny.architecture, AdapterConfig(rank=2, train="norm"))
    narrow = {
        path
        for path, spec in architecture.abstract(numerics).params.items()
        if spec.dtype == jnp.bfloat16
    }
    assert narrow == {path for path in tiny.params if "norm" not in path}
    assert all(path.rpartition(".")[2] == "w" for path in narrow)


def test_a_row_of_zeros_stays_one_with_dora():
    tiny = load_tiny("gqa")
    w = tiny.params["layers.mlp.up.w"].at[0, 3].set(0.0)
    plain = dataclasses.replace(tiny, params={**tiny.params, "layers.mlp.up.w": w})
    start = tiny_with_adapters(plain, rank=2, dora=True, targets="mlp.up")
    leaf = "layers.mlp.up.lora_b"
    start.params[leaf] = jnp.zeros_like(start.params[leaf])
    tokens = np.arange(8)[None]
    np.testing.assert_allclose(start.merge()(tokens), plain.merge()(tokens), atol=1e-5)


def test_a_starting_pair_is_as_exact_as_the_pair_it_is_subtracted_from():
    """Or a reader in float32 would find another model than training began with."""
    numerics = Numerics(compute_dtype=jnp.bfloat16)
    architecture = adapted(load_tiny("gqa").architecture, AdapterConfig(rank=2, start="pissa"))
    params = architecture.abstract(numerics).params
    pairs = {path for path in params if is_beside(path)}
    assert any(path.endswith("start_a") for path in pairs)
    assert {params[path].dtype for path in pairs} == {jnp.dtype("float32")}


def test_a_pattern_of_what_trains_chooses_among_the_models_own_parameters():
    plain = architecture_from_hf(CASES["gqa"])
    keys = AdapterConfig(rank=2, start="pissa", train="attn.q|scale")
    adapting = adapted(plain, keys).adaptation
    assert adapting.is_learnt("layers.attn.q.w") and adapting.is_learnt("norm.scale")
    assert not adapting.is_learnt("layers.attn.q.start_a")
    assert not adapting.is_learnt("layers.mlp.up.scales")
    assert adapting.is_learnt("layers.mlp.up.lora_a")


def test_ranks_that_are_all_0_are_no_adapter():
    plain = architecture_from_hf(CASES["gqa"])
    with pytest.raises(ConfigError, match=r"adapter\.ranks '\.=0' leaves no weight an adapter"):
        adapted(plain, AdapterConfig(rank=4, ranks=".=0"))
    both = adapted(plain, AdapterConfig(rank=4, ranks=".=0", train="norm"))
    assert not both.adaptation.sites and both.adaptation


def test_a_note_of_an_adapter_is_read_as_it_was_written(tmp_path):
    _, architecture, _ = with_adapters("gqa", dora=True, train="norm")
    note = AdapterNote(architecture.adaptation, "base", "main", "0a", "float32", (3, 4))
    note.write(tmp_path)
    assert read_note(tmp_path) == note
    assert read_note(tmp_path / "other") is None
    file = tmp_path / "adapter.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"adaptation": {"sites": {"x": {"width": 3}}}}))
    with pytest.raises(CheckpointError, match=r"adapter\.json is damaged"):
        read_note(tmp_path)


def test_weights_are_found_by_the_path_of_their_module():
    tiny = load_tiny("gqa")
    found = weights_in(tiny.merge())
    assert {f"{path}.w" for path in found} == {path for path in tiny.params if "norm" not in path}
    assert relative_error(found["layers.attn.q"].w[...], tiny.params["layers.attn.q.w"]) == 0
