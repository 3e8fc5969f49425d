"""Models as values on meshes that somebody else made: served, computed, differentiated, trained and kept as on one device."""

from __future__ import annotations

import json

import jax
import pytest
from jax.sharding import Mesh

from llm_infer import load_model
from llm_infer.base.errors import UserError
from tests.models.family_checkpoints import FOLDER
from tests.parallel.processes import output_of

SOME = ("explicit axes: served", "one device: served", "experts, model first: computed", "copies of KV heads: trained")


@pytest.mark.parametrize("names", [SOME, pytest.param((), marks=pytest.mark.sweep)], ids=["some", "all"])
def test_on_others_meshes(names: tuple[str, ...]) -> None:
    found = json.loads(output_of("tests.parallel.given_meshes", *names)[-1])
    assert found["failures"] == {} and len(found["checked"]) >= len(names or range(10))


def test_what_cannot_be() -> None:
    one = jax.devices()[:1]
    mesh = Mesh(one, ("model",))
    for message, given in {
        "leave out devices and sizes": {"mesh": mesh, "tensor_parallel_size": 2},
        "axes of `mesh`": {"axes": {"x": "tp"}},
        "expected one of dp, tp, ep": {"mesh": mesh, "axes": {"model": "pp"}},
        "the mesh has no axis data: it has model": {"mesh": mesh, "axes": {"data": "dp"}},
        "each once": {"devices": one * 2},
        "1 devices, but tensor_parallel_size=2 needs 2": {"devices": one, "tensor_parallel_size": 2},
        "weights='x'": {"weights": "x"},
    }.items():
        with pytest.raises(UserError, match=message):
            load_model(FOLDER / "llama_gqa", progress=False, **given)
