"""What trains and what does not, and where it is placed."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey

from jaxft.config import from_dict
from jaxft.errors import ConfigError
from jaxft.models.adapters import Adaptation
from jaxft.models.families import reaches_layers
from jaxft.models.weights import Site
from jaxft.training.optimizers.placing import owner_of
from jaxft.training.program import make_placement
from jaxft.training.state import abstract_state, init_state, partition

PARAMS = {"embed.w": 1, "layers.mlp.up.w": 2, "norm.scale": 3}
SHAPES = {
    "embed.w": jax.ShapeDtypeStruct((8, 4), jnp.float32),
    "norm.scale": jax.ShapeDtypeStruct((4,), jnp.float32),
}


def test_a_pattern_separates_what_trains_from_what_does_not():
    assert partition(PARAMS, "") == (PARAMS, {}, {})
    trainable, frozen, base = partition(PARAMS, r"^embed|mlp")
    assert (trainable, frozen) == ({"norm.scale": 3}, {"embed.w": 1, "layers.mlp.up.w": 2})
    assert not base


def test_adapters_train_beside_a_base_that_no_checkpoint_holds():
    params = PARAMS | {"layers.mlp.up.lora_a": 4, "layers.mlp.up.start_a": 5}
    adaptation = Adaptation({"layers.mlp.up": Site(2, 4)}, trained="norm")
    trainable, frozen, base = partition(params, "", adaptation)
    assert trainable == {"layers.mlp.up.lora_a": 4, "norm.scale": 3}
    assert frozen == {"layers.mlp.up.start_a": 5}
    assert base == {"embed.w": 1, "layers.mlp.up.w": 2}
    assert partition(params, "lora_a", adaptation).frozen.keys() == {
        "layers.mlp.up.lora_a",
        "layers.mlp.up.start_a",
    }
    with pytest.raises(ConfigError, match=r"'embed' matches no parameter; paths are layers\."):
        partition(params, "embed", adaptation)
    whole = partition(params, "", dataclasses.replace(adaptation, whole=True))
    assert not whole.base and whole.frozen.keys() >= base.keys()


def test_a_pattern_that_matches_nothing_or_everything_is_refused():
    with pytest.raises(ConfigError, match=r"'lora' matches no parameter; paths are embed\.w, "):
        partition(PARAMS, "lora")
    with pytest.raises(ConfigError, match="'e' matches every parameter; nothing would train"):
        partition({"embed.w": 1, "head.w": 2}, "e")


def test_a_state_starts_at_step_0_with_moments_of_what_trains():
    params = {path: jnp.ones(spec.shape) for path, spec in SHAPES.items()}
    state = init_state(params, optax.adam(1e-3), "norm")
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    assert (state.trainable.keys(), state.frozen.keys()) == ({"embed.w"}, {"norm.scale"})
    assert state.params.keys() == params.keys()
    assert state.opt_state[0].mu.keys() == {"embed.w"}


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ((GetAttrKey("trainable"), DictKey("embed.w")), "embed.w"),
        ((GetAttrKey("opt_state"), GetAttrKey("mu"), DictKey("embed.w")), "embed.w"),
        ((DictKey("muon"), DictKey("embed.w"), GetAttrKey("scales")), "embed.w"),
        ((GetAttrKey("opt_state"), DictKey("count")), ""),  # no parameter's path
        ((GetAttrKey("opt_state"), GetAttrKey("count")), ""),
    ],
)
def test_a_leaf_belongs_to_the_parameter_of_its_path(path, owner):
    assert owner_of(path, SHAPES) == owner


def test_parameters_and_moments_are_placed_each_by_its_own_and_counters_everywhere():
    placement = make_placement(from_dict({"strategy": "ddp", "mesh.data": 8}))
    split = NamedSharding(placement.mesh, PartitionSpec("data"))
    whole = placement.replicated
    shardings = {"embed.w": split, "norm.scale": whole}

    def state(**moments):
        return abstract_state(
            SHAPES, shardings, optax.adam(1e-3), "norm", placement=placement, **moments
        )

    with_parameters, apart = state(), state(moments={"embed.w": whole, "norm.scale": whole})
    for one, of_moments in ((with_parameters, split), (apart, whole)):
        adam = one.opt_state[0]
        assert one.trainable["embed.w"].sharding == split
        assert one.frozen["norm.scale"].sharding == whole
        assert adam.mu["embed.w"].sharding == adam.nu["embed.w"].sharding == of_moments
        assert adam.count.sharding == one.step.sharding == whole
        assert (one.step.dtype, one.trainable["embed.w"].shape) == (jnp.int32, (8, 4))


@pytest.mark.parametrize(
    ("trainable", "reaches"),
    [
        (["head.w", "norm.scale"], False),
        (["head.w", "layers.norm.scale"], True),
        (["embed.w"], True),
        (["normal.w"], True),
        ([], False),
    ],
)
def test_gradients_reach_the_layers_unless_what_trains_comes_after_them(trainable, reaches):
    assert reaches_layers(trainable) is reaches
