"""Several adapters in one batch: each text is what its model alone writes."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxft
from jaxft.hf.peft.write import write_adapter
from jaxft.models.adapters import Adaptation, weights_in
from jaxft.models.config import Numerics
from jaxft.models.families import architecture_from_hf
from jaxft.models.module import without_memory
from jaxft.models.weights import Site
from jaxft.programs.engine import Engine
from jaxft.programs.model import load_source
from jaxft.programs.side_by_side import SideBySide, load_adapter, reason_apart
from jaxft.programs.texts import NO_COLUMNS, Request
from jaxft.workdir.source import find_source
from tests.adapters import linear_sites, random_adapter, shapes_of
from tests.oracle.cases import CASES
from tests.tiny import load_tiny
from tests.tiny_run import tiny_config


def write(folder, name, ranks, **kinds):
    """Writes an adapter in PEFT's format on the model of `folder/base`; returns its path."""
    tiny = load_tiny("gqa")
    adapter = random_adapter(tiny, ranks, base=str(folder / "base"), **kinds)
    (folder / name).mkdir()
    write_adapter(folder / name, adapter, tiny.architecture.naming, shapes_of(tiny))
    return folder / name


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base and adapters of unlike ranks and sites."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_config(folder)
    sites = linear_sites(load_tiny("gqa"))
    write(folder, "wide", dict.fromkeys(sites, 5))
    write(folder, "queries", {site: 2 for site in sites if site.endswith(("q", "o"))})
    write(folder, "first", dict.fromkeys(sites[:4], 11), rslora=True)
    write(folder, "dora", dict.fromkeys(sites[:2], 2), dora=True)
    return folder


def loaded(home, name):
    return load_source(find_source(home / name))


def beside(home, base, name):
    source = find_source(home / name)
    assert not reason_apart(source)
    model = load_adapter(source, base, dtypes="float32")
    assert model is not None
    return model


def run(engine, found):
    while not engine.idle:
        for piece in engine.step(5):
            found.setdefault(piece.ticket, []).append(piece)


@pytest.mark.slow(seconds=9)
def test_texts_of_several_adapters_in_one_batch_are_those_of_each_model_alone(home):
    base = loaded(home, "base")
    # Its pair is of rank 2, and another one is subtracted.
    keys = {"adapter__rank": 2, "adapter__start": "pissa", "optim__learning_rate": 2e-2}
    jaxft.train(tiny_config(home, "trained", train__steps=4, **keys))
    config, side = base.architecture.config, SideBySide(base, dtypes="float32")
    known = base.has_token
    engine = Engine(config, side.graphdef, side.params, rows=5, slots=64, has_token=known)
    prompt, found, tickets = list(range(5, 22)), {}, {}

    def add(name):
        columns = side.add(beside(home, base, name))
        engine.replace(side.graphdef, side.params, columns=side.width)
        return columns

    def ask(name, columns):
        request = Request(prompt, 12, base.stop_ids, columns=columns, scored=True)
        tickets.setdefault(name, []).append(engine.submit(request))

    def step(most):
        for piece in engine.step(most):
            found.setdefault(piece.ticket, []).append(piece)

    columns = {"wide": add("wide"), "queries": add("queries")}
    ask("base", NO_COLUMNS)
    ask("wide", columns["wide"])
    step(2)
    for name in ("first", "trained"):  # texts are under way when they come
        columns[name] = add(name)
    ranges = sorted((c.start, c.end) for c in columns.values())
    assert ranges == [(0, 5), (5, 7), (7, 18), (18, 22)] and side.width == 32
    for name in ("queries", "first", "trained"):
        ask(name, columns[name])
    while not engine.idle:
        step(5)
    # One goes, and the rows that it wrote are not taken for those of what has its place.
    side.remove(columns["wide"])
    again = add("queries")
    assert again.start == columns["wide"].start and again.number != columns["wide"].number
    ask("queries", again)
    ask("base", NO_COLUMNS)
    while not engine.idle:
        step(5)
    texts = set()
    for name, of_name in tickets.items():
        model = loaded(home, name)
        for ticket in of_name:
            new = [token for piece in found[ticket] for token in piece.tokens]
            ids, places = [*prompt, *new], range(len(prompt) - 1, len(prompt) + len(new) - 1)
            logs = np.asarray(jax.nn.log_softmax(model([ids])[0, places.start : places.stop]))
            allowed = np.where(known, logs, -np.inf)
            assert new == allowed.argmax(axis=-1).tolist(), name
            scores = [piece.scores for piece in found[ticket]]
            chosen, best, likely = (np.concatenate(part) for part in zip(*scores, strict=True))
            np.testing.assert_allclose(chosen, allowed.max(axis=-1), atol=1e-5)
            np.testing.assert_allclose(likely, -np.sort(-allowed)[:, :20], atol=1e-5)
            assert best[:, 0].tolist() == new
        texts.add(tuple(new))
    assert len(texts) == 5  # or the test would not tell them apart


@pytest.mark.slow(seconds=2)
def test_what_shares_no_model_says_why(home):
    def changed(name, **changes):
        source = find_source(home / name)
        found = source.architecture
        adaptation = dataclasses.replace(found.adaptation, **changes)
        source.__dict__["architecture"] = dataclasses.replace(found, adaptation=adaptation)
        return source

    def of_family(case, end):
        source, found = changed("wide"), architecture_from_hf(CASES[case])
        weights = weights_in(without_memory(found.build(Numerics())))
        site = next(path for path in weights if path.startswith("layers.") and path.endswith(end))
        adaptation = Adaptation({site: Site(2, 4.0)})
        source.__dict__["architecture"] = dataclasses.replace(found, adaptation=adaptation)
        return source

    head = {"head": Site(2, 4.0)}
    for source, reason in (
        (find_source(home / "dora"), "magnitudes"),
        (changed("wide", trained="norm"), "trained as a whole"),
        (changed("wide", rows=(3,)), "rows of tokens"),
        (changed("wide", whole=True), "nobody else has"),
        (changed("wide", sites=head), "head is applied to all rows"),
        (of_family("mixtral_gqa_published", "gate"), "gate is applied to all rows"),
        (of_family("deepseek_v3_published", "kv_up"), "kv_up is applied to all rows"),
    ):
        assert reason in reason_apart(source)
    assert not reason_apart(of_family("mixtral_gqa_published", "router"))
    assert not reason_apart(of_family("deepseek_v3_published", "kv_down"))


def test_an_adapter_of_other_tokens_is_not_put_beside(home):
    base = loaded(home, "base")
    other = dataclasses.replace(base)
    other.__dict__["has_token"] = ~base.has_token
    assert load_adapter(find_source(home / "wide"), other, dtypes="float32") is None
    assert load_adapter(find_source(home / "wide"), base, dtypes="bfloat16") is None
