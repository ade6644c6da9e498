import jax.numpy as jnp
import numpy as np
import pytest
from toys import forward, toy_corpus, toy_model, toy_variables

from safemoe_jax.config import MeshConfig
from safemoe_jax.errors import UserError
from safemoe_jax.model.lora import OwnExpert, Routed
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.training.validation import expert_validation, gate_validation

MODEL = toy_model(num_experts=2)
MESH = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=1))


def split(variables, *trained):
    return {name: tree for name, tree in variables.items() if name not in trained}


def stream_losses(packed, routing_of):
    """Nats per answer token of each stream, from whole logits, one row at a time."""
    variables = toy_variables(MODEL)
    nll, tokens = np.zeros(packed.num_streams), np.zeros(packed.num_streams)
    for index in range(packed.num_rows):
        row = {key: np.asarray(value)[None] for key, value in packed.row(index).items()}
        logits_BTV, _ = forward(MODEL, variables, row, routing_of(row))
        logits_BTV = np.asarray(logits_BTV, np.float64)
        chosen = np.take_along_axis(logits_BTV, row["targets_BT"][..., None], axis=-1)[..., 0]
        loss_BT = np.log(np.exp(logits_BTV).sum(axis=-1)) - chosen
        stream = row["expert_ids_B"][0]
        nll[stream] += (loss_BT * row["loss_mask_BT"]).sum()
        tokens[stream] += row["loss_mask_BT"].sum()
    return nll / tokens


def test_each_expert_is_validated_on_its_own_text():
    packed = toy_corpus(("apples", "pears"), per_stream=6, length=12)
    assert packed.num_rows % 4, "the last batch must be padded"
    variables = toy_variables(MODEL)
    validate = expert_validation(MODEL, split(variables, "experts"), packed, 4, MESH)
    expected = stream_losses(packed, lambda row: OwnExpert(row["expert_ids_B"]))
    np.testing.assert_allclose(validate(variables["experts"]), expected, rtol=1e-5)


def test_the_router_is_validated_on_everything_at_once():
    packed = toy_corpus(("all",), per_stream=7, length=12)
    variables = toy_variables(MODEL)
    validate = gate_validation(MODEL, split(variables, "router"), packed, 4, MESH)
    loss = validate(variables["router"])
    assert loss.shape == ()
    np.testing.assert_allclose(loss, stream_losses(packed, lambda row: Routed())[0], rtol=1e-5)


def test_a_domain_without_validation_text_is_named():
    packed = toy_corpus(("apples",), per_stream=2, length=12)
    grown = packed.__class__(**{**vars(packed), "streams": ("apples", "figs")})
    with pytest.raises(UserError, match="no validation example of 'figs'"):
        expert_validation(MODEL, {"params": jnp.zeros(())}, grown, 4, MESH)
