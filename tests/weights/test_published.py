"""Shapes that need no file, against the parameter counts that their makers publish."""

import math

import pytest
import tiny

from safemoe_jax.weights.base import EMBEDDED, load_base, read_spec
from safemoe_jax.weights.layout import leaf_shapes
from safemoe_jax.weights.published import PUBLISHED


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
    ],
)
def test_a_published_shape_has_its_makers_number_of_parameters(source, parameters):
    shapes = leaf_shapes(read_spec(source)).values()
    assert sum(math.prod(shape) for shape in shapes) == parameters
    assert source in PUBLISHED


def test_of_a_directory_the_config_is_enough(tmp_path):
    tiny.write_base(tmp_path / "whole")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((tmp_path / "whole/config.json").read_text())
    spec = load_base(str(tmp_path / "whole"), "float32").spec
    assert read_spec(str(tmp_path / "config")) == spec


def test_the_embedded_base_tells_its_shape_without_its_weights():
    (source,) = EMBEDDED
    spec = read_spec(source)
    assert (spec.num_layers, spec.embed_dim, spec.vocab_size) == (30, 576, 49_152)
