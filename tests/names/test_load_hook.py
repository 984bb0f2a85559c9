"""Old names in `load_state_dict`: states as Meta's and Mistral's codes write them give the same
model.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM

MOE = {
    "num_experts": 3,
    "top_k": 2,
    "hidden_dim": 20,
    "shared_expert": True,
    "interleave_moe_layer_step": 2,
}
State = dict[str, Tensor]


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    out = {}
    for key, tensor in state.items():
        for ours, theirs in pairs:
            key = re.sub(ours, theirs, key)
        out[key] = tensor
    return out


def mistral(state: State) -> State:
    """w1 w3 w2, a gate, one matrix per expert."""
    out = renamed(
        state,
        (r"router\.weight", "gate.weight"),
        ("w_gate", "w1"),
        ("w_value", "w3"),
        ("w_out", "w2"),
    )
    for key in [key for key in out if ".experts." in key]:
        stem, leaf = key.split(".experts.")
        for index, tensor in enumerate(out.pop(key)):
            out[f"{stem}.experts.{index}.{leaf}"] = tensor
    return out


def fused(state: State) -> State:
    """Meta's training names: norms inside fused linears, extra states and a rotary table beside
    them.
    """
    out = dict(state)
    for i in (0, 1):
        at = f"layers.{i}.attention"
        out[f"{at}.wqkv.weight"] = torch.cat(
            [out.pop(f"{at}.{leaf}.weight") for leaf in ("wq", "wk", "wv")]
        )
        out[f"{at}.wqkv.layer_norm_weight"] = out.pop(f"layers.{i}.attention_norm.weight")
        out[f"{at}.wqkv._extra_state"] = torch.empty(0)
    mlp = "layers.0.feed_forward"
    out[f"{mlp}.mlp.fc1_weight"] = torch.cat(
        [out.pop(f"{mlp}.{leaf}.weight") for leaf in ("w_gate", "w_value")]
    )
    out[f"{mlp}.mlp.fc2_weight"] = out.pop(f"{mlp}.w_out.weight")
    out[f"{mlp}.mlp.layer_norm_weight"] = out.pop("layers.0.ffn_norm.weight")
    out["layers.1.feed_forward.norm.weight"] = out.pop("layers.1.ffn_norm.weight")
    out["rope.freqs"] = torch.empty(4)
    return out


def grouped(state: State, flat: bool) -> State:
    """Llama 4's experts, input-major: flat as stored, or [E, in, out] as its code holds them."""
    out, at = dict(state), "layers.1.feed_forward"
    out[f"{at}.router_DE"] = out.pop(f"{at}.router.weight").mT
    names = (
        ("w_gate", "w1", "moe_w_in_eD_F", "w_in_shared_FD"),
        ("w_value", "w3", "moe_w_swiglu_eD_F", "w_swiglu_FD"),
        ("w_out", "w2", "moe_w_out_eF_D", "w_out_shared_DF"),
    )
    for ours, held, stored, shared in names:
        experts = out.pop(f"{at}.experts.{ours}.weight").mT
        out[f"{at}.experts.{stored if flat else held}"] = experts.flatten(0, 1) if flat else experts
        inner = f"{shared}.weight" if flat else f"shared_expert.{held}.weight"
        out[f"{at}.{inner}"] = out.pop(f"{at}.shared_expert.{ours}.weight")
    return out


FORMS: dict[str, Callable[[State], State]] = {
    "ours": dict,
    "mistral": mistral,
    "meta, fused": fused,
    "meta, flat experts": lambda state: grouped(state, flat=True),
    "meta, grouped experts": lambda state: grouped(state, flat=False),
    "all at once": lambda state: fused(grouped(state, flat=True)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_names_gives_the_same_model(form):
    model = random_model(tiny_args(moe_args=MOE))
    state = FORMS[form](model.state_dict())
    other = LLM(model.args)
    other.load_state_dict(state)
    tokens = random_tokens(2, 9)
    assert torch.equal(
        other(TransformerInput(tokens)).logits, model(TransformerInput(tokens)).logits
    )
    assert set(other.state_dict()) == set(model.state_dict()), "names are ours once loaded"


def test_the_given_state_is_left_as_it_was():
    model = random_model(tiny_args())
    state = mistral(model.state_dict())
    before = set(state)
    LLM(model.args).load_state_dict(state)
    assert set(state) == before


def test_a_model_inside_another_module_takes_old_names_too():
    model = random_model(tiny_args())
    state = {f"policy.{key}": tensor for key, tensor in mistral(model.state_dict()).items()}
    holder = torch.nn.ModuleDict({"policy": LLM(model.args)})
    holder.load_state_dict(state)
    assert torch.equal(
        holder["policy"].layers[0].feed_forward.w_out.weight,
        model.layers[0].feed_forward.w_out.weight,
    )


def test_the_same_weights_under_two_names_are_refused():
    model = random_model(tiny_args())
    state = mistral(model.state_dict()) | model.state_dict()
    with pytest.raises(RequestError, match=r"w1\.weight and .*w_gate\.weight, the same weights"):
        LLM(model.args).load_state_dict(state)


def test_what_is_missing_or_unknown_is_still_said():
    model = random_model(tiny_args())
    state = mistral(model.state_dict())
    state["layers.0.feed_forward.w9.weight"] = state.pop("layers.0.feed_forward.w1.weight")
    with pytest.raises(
        RuntimeError, match=r"Missing key.*layers\.0\.feed_forward\.w_gate(.|\n)*w9"
    ):
        LLM(model.args).load_state_dict(state)


def test_a_fused_matrix_of_another_height_is_refused():
    model = random_model(tiny_args())
    state = dict(model.state_dict())
    for leaf in ("wq", "wk", "wv"):
        del state[f"layers.0.attention.{leaf}.weight"]
    state["layers.0.attention.wqkv.weight"] = torch.zeros(63, 32)
    with pytest.raises(
        RequestError, match=r"layers\.0\.attention\.wqkv\.weight: got shape \(63, 32\)"
    ):
        LLM(model.args).load_state_dict(state)
