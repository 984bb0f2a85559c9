"""The oracle equals transformers, so that what equals the oracle is right and not only
consistent.
"""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints.families import FAMILIES, random_ids, tiny_hf
from transom.base.errors import RequestError
from transom.checkpoints.load import load
from transom.checkpoints.read_args import read_args
from transom.config.model_args import ModelArgs
from transom.verify.findings import difference
from transom.verify.model import COUNT, TOLERANCE, compare_with_oracle
from transom.verify.oracle import Oracle, unsupported
from transom.verify.sample_models import SAMPLES

UNSPOKEN = {"llama-dynamic": "dynamic", "phi3-longrope": "longrope", "llama4": "vision_args"}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNSPOKEN])
def test_oracle_equals_transformers(family, tmp_path):
    theirs = tiny_hf(family)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
    ids = random_ids(1, COUNT)
    logits = Oracle(model.args, weights).logits(ids[0].tolist())
    with torch.no_grad():
        expected = theirs(ids).logits[0].double()
    assert difference(logits, expected) < 1e-5, "transformers computes in float32"


@pytest.mark.parametrize("family", UNSPOKEN)
def test_what_it_lacks_of_the_families_is_known(family, tmp_path):
    tiny_hf(family).save_pretrained(tmp_path)
    (missing,) = unsupported(read_args(tmp_path))
    assert UNSPOKEN[family] in missing


@pytest.mark.parametrize("name", SAMPLES)
def test_every_built_in_model_equals_the_oracle(name):
    findings = list(compare_with_oracle(ModelArgs.from_dict(SAMPLES[name]), name))
    assert [one for one in findings if not one.ok] == []
    # Drawn weights must not hide behind zero gradients: only then would a tolerance of 1e-5 be
    # generous.
    assert max(one.error for one in findings) < TOLERANCE / 10


def test_built_in_models_use_every_option_the_oracle_speaks():
    models = [ModelArgs.from_dict(fields) for fields in SAMPLES.values()]
    wanted = {
        "rope_layout": {"interleaved", "halves"},
        "qk_norm": {"none", "head", "projection"},
        "norm": {"rms", "rms_wide", "rms_plus_one", "layer"},
        "norm_placement": {"pre", "post", "both"},
        **{
            name: {False, True}
            for name in ("use_qk_norm", "qkv_bias", "out_bias", "attn_sinks", "ffn_gated")
        },
        **{
            name: {False, True}
            for name in ("ffn_bias", "tie_embeddings", "attn_temperature_tuning")
        },
    }
    for field, values in wanted.items():
        assert {getattr(args, field) for args in models} == values, field
    assert {letter for args in models for letter in args.pattern} >= set("FSCf")
    assert {args.rope_scaling.kind for args in models if args.rope_scaling} == {
        "llama3",
        "linear",
        "yarn",
    }
    routed = [args.moe_args for args in models if args.moe_args]
    assert {moe.routing for moe in routed} == {"softmax", "sigmoid", "biased_sigmoid"}
    assert {moe.expert_activation for moe in routed} == {"model", "clamped"}
    assert {args.mla_args is None for args in models} == {False, True}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"kind": "dynamic"}},
        {"head": {"kind": "classification"}},
        {"context_dim": 8},
        {"mup_base_dim": 8},
    ],
)
def test_what_the_oracle_lacks_is_said_and_refused(fields):
    args = ModelArgs.from_dict(fields)
    (missing,) = unsupported(args)
    assert missing.startswith(next(iter(fields)))
    with pytest.raises(RequestError, match="no formula"):
        Oracle(args, {})
