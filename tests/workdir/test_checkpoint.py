"""What is kept, found and read of checkpoints, and what a torn or broken one does."""

import dataclasses
import gc
import os
import shutil
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.errors import CheckpointError
from jaxft.training.state import TrainState, init_state
from jaxft.workdir import checkpoint
from jaxft.workdir.checkpoint import Checkpoints, Progress, progress_from_json, progress_to_json

OPTIMIZER = optax.adamw(1e-3)


def make_state(step, sharding=None):
    generator = np.random.default_rng(step)
    params = {
        "a.w": jnp.asarray(generator.normal(size=(8, 4)), jnp.float32),
        "b.w": jnp.asarray(generator.normal(size=(16,)), jnp.bfloat16),
    }
    state = init_state(params, OPTIMIZER, "^b")
    state = TrainState(jnp.int32(step), state.trainable, state.frozen, state.opt_state)
    return jax.device_put(state, sharding or jax.devices()[0])


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(checkpoints, step, score=None, **progress):
    checkpoints.save(
        make_state(step),
        progress=Progress(data={"step": step}, **progress),
        config={"train.seed": step},
        score=score,
    )


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_state_progress_and_config_come_back(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        save(checkpoints, 3, score=1.5, tokens=7, period={"loss": 0.1}, best_loss=1.5)
        checkpoints.wait()
        state, progress = checkpoints.restore(abstract(make_state(3)), 3)
        assert_same(state, make_state(3))
        assert jax.tree.structure(state) == jax.tree.structure(make_state(3))
        assert progress == Progress(data={"step": 3}, tokens=7, period={"loss": 0.1}, best_loss=1.5)
        assert checkpoints.restore_config(3) == {"train.seed": 3}
        params = checkpoints.restore_params(abstract(make_state(3)).params, 3)
        assert_same(params, make_state(3).params)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("x")])
def test_a_checkpoint_is_read_on_another_mesh(tmp_path, spec):
    with Checkpoints(tmp_path / "c") as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=NamedSharding(mesh, spec if x.ndim else PartitionSpec()),
            ),
            make_state(1),
        )
        state, _ = checkpoints.restore(target, 1)
        assert_same(state, make_state(1))
        assert state.params["a.w"].sharding == NamedSharding(mesh, spec)


def test_the_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=2) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 2.0, None, 1.5, None], start=1):
            save(checkpoints, step, loss)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best_step() == 2
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "5", "6"]
    # The next part of the run knows the best one too.
    with Checkpoints(tmp_path / "c", keep_last=1) as checkpoints:
        save(checkpoints, 7, 1.0)
        checkpoints.wait()
        assert checkpoints.best_step() == 7, "of equal ones the newest"
        save(checkpoints, 8, 4.0)
        checkpoints.wait()
        assert checkpoints.steps() == [7, 8]


def test_scores_by_another_yardstick_are_not_compared(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=1, yardstick="old") as checkpoints:
        for step, score in enumerate([0.5, 0.1, 0.3], start=1):
            save(checkpoints, step, score)
    with Checkpoints(tmp_path / "c", keep_last=1, yardstick="new") as checkpoints:
        save(checkpoints, 4)
        checkpoints.wait()
        # Until one is scored anew, the old best is kept and is the best.
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 4], 2)
        save(checkpoints, 5, 7.0)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([5], 5)
        save(checkpoints, 6, 8.0)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([5, 6], 5)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.best_step() == 5


def test_without_any_evaluation_there_is_no_best(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=1) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step)
        checkpoints.wait()
        assert checkpoints.best_step() is None
        assert checkpoints.steps() == [3]


def test_a_torn_checkpoint_is_ignored_and_removed(tmp_path):
    folder = tmp_path / "c"
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 1)
    torn = folder / "2.orbax-checkpoint-tmp"
    shutil.copytree(folder / "1", torn)
    (torn / "_CHECKPOINT_METADATA").unlink()
    (folder / "removed").mkdir()
    shutil.copytree(folder / "1", folder / "removed/0")
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    assert torn.exists(), "a reader changes nothing"
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1]
        save(checkpoints, 2)
        checkpoints.wait()
        state, _ = checkpoints.restore(abstract(make_state(2)), 2)
        assert_same(state, make_state(2))
    assert not torn.exists()
    assert not (folder / "removed").exists()


def test_a_checkpoint_disappears_at_once_when_it_is_replaced(tmp_path, monkeypatch):
    """A kill while files are deleted must not leave a folder that looks complete."""
    deleted = []
    original = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if os.path.isdir(path):
            deleted.append([p.name for p in path.iterdir()])
            assert path.name == "removed"
        return original(path, *args, **kwargs)

    with Checkpoints(tmp_path / "c", keep_last=1) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        save(checkpoints, 2)
        checkpoints.wait()
    assert deleted == [["1"]]


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_broken_checkpoint_is_an_error_that_names_the_others(tmp_path, damage, capfd):
    with Checkpoints(tmp_path / "c", keep_last=2) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
        checkpoints.wait()
        folder = tmp_path / "c/2/params"
        if damage == "missing":
            shutil.rmtree(folder)
        for file in folder.glob("**/d/*"):
            os.truncate(file, 50)
        with pytest.raises(CheckpointError, match=r"Checkpoint 2 in .* cannot be read") as error:
            checkpoints.restore(abstract(make_state(2)), 2)
        assert "There are 1, 2: name another" in str(error.value)
        assert "\n" not in str(error.value)
        assert_same(checkpoints.restore(abstract(make_state(1)), 1)[0], make_state(1))
    del error
    gc.collect()
    assert capfd.readouterr().err == ""


def test_a_state_of_another_shape_is_refused(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        params = dict(abstract(make_state(1)).params)
        params["a.w"] = jax.ShapeDtypeStruct((8, 5), jnp.float32, sharding=params["a.w"].sharding)
        with pytest.raises(CheckpointError, match=r"cannot be read.* move the folder 1 away"):
            checkpoints.restore_params(params, 1)


def test_a_checkpoint_of_another_optimizer_is_left_where_it_is(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        state = abstract(make_state(1))
        other = dataclasses.replace(state, opt_state=(*state.opt_state, state.step))
        with pytest.raises(CheckpointError, match="restore the keys that were changed"):
            checkpoints.restore(other, 1)


def test_too_little_space_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with Checkpoints(tmp_path / "c") as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(CheckpointError, match=r"A checkpoint takes .* B free\..*--resume"):
            save(checkpoints, 2)
        assert checkpoints.steps() == [1]
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["1"]


def test_space_is_measured_once_the_save_before_is_done(tmp_path, monkeypatch):
    finalize, usage = ocp.CheckpointManager._finalize, shutil.disk_usage

    def slow(*args):
        time.sleep(0.3)
        finalize(*args)

    under_way = []
    monkeypatch.setattr(ocp.CheckpointManager, "_finalize", slow)
    with Checkpoints(tmp_path / "c") as checkpoints:
        manager = checkpoints._manager

        def measure(path):
            under_way.append(manager.is_saving_in_progress())
            return usage(path)

        monkeypatch.setattr(shutil, "disk_usage", measure)
        save(checkpoints, 1)
        assert manager.is_saving_in_progress(), "saves do not wait for the disk"
        save(checkpoints, 2)
    assert under_way == [False, False]


def test_a_write_that_fails_is_an_error_and_leaves_the_others(tmp_path, monkeypatch, capfd):
    with Checkpoints(tmp_path / "c", keep_last=2) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", fail)
            patch.setattr(os, "replace", fail)
            with pytest.raises(CheckpointError, match=r"the disk is full\. Complete.*: 1; they"):
                save(checkpoints, 2)
                checkpoints.wait()
        assert [p.name for p in (tmp_path / "c").iterdir()] == ["1"]
    assert "Traceback" not in capfd.readouterr().err


def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        save(checkpoints, 1, score=2.0)
        save(checkpoints, 1, score=1.0)
        checkpoints.wait()
        assert checkpoints.score(1) == 2.0


def test_reading_and_writing_print_nothing(tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Checkpoints(tmp_path / "c", keep_last=1) as checkpoints:
            for step in (1, 2, 3):
                save(checkpoints, step, score=None if step == 2 else 1.0)
        with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
            checkpoints.restore_params(abstract(make_state(3)).params, checkpoints.best_step())
    assert not caught
    assert capfd.readouterr().err == ""


def test_parts_of_parameters_are_read_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CHUNK", 2**10)
    mesh = jax.make_mesh((8,), ("fsdp",))
    values = np.arange(4 * 16 * 64, dtype=np.float32).reshape(4, 16, 64)
    params = {
        "layers.w": jax.device_put(values, NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))),
        "embed.w": jnp.asarray(values.reshape(64, 64), jnp.bfloat16),
    }
    state = TrainState(jnp.int32(1), params, {}, {"count": jnp.int32(0)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, progress=Progress(data={}), config={})
        checkpoints.wait()
        shapes = {path: value.shape for path, value in params.items()}
        stored = checkpoints.open_params(shapes, 1)
        index = (slice(2, 3), slice(3, 9), slice(0, 64))
        np.testing.assert_array_equal(stored["layers.w"][index], values[index])
        assert stored["embed.w"].shape == (64, 64)
        rows = stored["embed.w"][3:5, 0:64]
        np.testing.assert_array_equal(rows, params["embed.w"][3:5])
        # A layer is a chunk of its own, and no chunk is larger than allowed.
        chunks = {path: checkpoint_chunk(item) for path, item in stored.items()}
        assert chunks["layers.w"] == (1, 16, 8)
        assert np.prod(chunks["embed.w"]) * 2 <= 2**10
        restored, _ = checkpoints.restore(abstract(state), 1)
        np.testing.assert_array_equal(restored.params["layers.w"], values)


def checkpoint_chunk(stored):
    return tuple(stored._store.chunk_layout.read_chunk.shape)


def test_parts_of_another_model_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), progress=Progress(data={}), config={})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"a\.w has shape \[8, 4\].*asks for \[8, 5\]"):
            checkpoints.open_params({"a.w": (8, 5)}, 1)
        with pytest.raises(CheckpointError, match=r"Checkpoint 1 in .* cannot be read"):
            checkpoints.open_params({"c.w": (8, 5)}, 1)
        with pytest.raises(CheckpointError, match=r"Checkpoint 2 in .* cannot be read"):
            checkpoints.open_params({"a.w": (8, 4)}, 2)


def test_progress_survives_json():
    progress = Progress(data={"step": 1}, tokens=3, period={"loss": 0.1 + 0.2})
    assert progress_from_json(progress_to_json(progress)) == progress
    assert progress_to_json(progress)["best_loss"] is None
