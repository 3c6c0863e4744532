"""What trains and what does not."""

import pytest

from jaxft.errors import ConfigError
from jaxft.state import partition

PARAMS = {"embed.w": 1, "layers.mlp.up.w": 2, "norm.scale": 3}


def test_a_pattern_separates_what_trains_from_what_does_not():
    assert partition(PARAMS, "") == (PARAMS, {})
    trainable, frozen = partition(PARAMS, r"^embed|mlp")
    assert (trainable, frozen) == ({"norm.scale": 3}, {"embed.w": 1, "layers.mlp.up.w": 2})


def test_a_pattern_that_matches_nothing_or_everything_is_refused():
    with pytest.raises(ConfigError, match=r"'lora' matches no parameter; paths are embed\.w, "):
        partition(PARAMS, "lora")
    with pytest.raises(ConfigError, match="'e' matches every parameter; nothing would train"):
        partition({"embed.w": 1, "head.w": 2}, "e")
