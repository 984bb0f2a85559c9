"""New adapters, several at once, merging: on models of our own, without any foreign library."""

import copy
import math

import pytest
import torch

from tests.checkpoints.adapters.twins import far
from tests.helpers import random_model, random_tokens, run_python, tiny_args
from transom.base.errors import RequestError
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import activate_adapters, adapter_names, plain_weights, remove_adapter
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.lora.merge import merge_adapter, unmerge_adapter
from transom.models.llm import LLM

MOE = {"num_experts": 3, "top_k": 2, "hidden_dim": 20, "shared_expert": True, "expert_bias": True}
TOKENS = random_tokens(2, 9)


def logits(model: LLM) -> torch.Tensor:
    return model(TransformerInput(TOKENS)).logits


def drawn(model: LLM, name: str, seed: int, **fields) -> LLM:
    """A new adapter with every part drawn: B starts at zero."""
    apply_lora(model, LoraArgs(**{"rank": 3, "alpha": 4.0, **fields}), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".lora.{name}." in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"moe_args": MOE}, {"tie_embeddings": True, "qkv_bias": True}]
)
def test_a_new_adapter_changes_nothing_and_alone_is_trained(fields, dora):
    model = random_model(tiny_args(**fields))
    before, names = logits(model), list(model.state_dict())
    apply_lora(model, LoraArgs(rank=2, dora=dora, targets=("all-linear", "tok_embeddings")))
    assert far(logits(model), before) < 1e-5
    assert [name for name in model.state_dict() if ".lora." not in name] == names
    logits(model).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name in model.state_dict() if ".lora.default." in name}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("attention", {"wq", "wk", "wv", "wo"}),
        ("ffn", {"w_gate", "w_value", "w_out"}),
        ("experts", {"experts.w_gate", "experts.w_value", "experts.w_out"}),
        ("wq|wv", {"wq", "wv"}),
        (r"layers\.1\.attention\.w[qk]", {"wq", "wk"}),
        ("output", {"output"}),
    ],
)
def test_targets_are_roles_or_ends_of_names(target, expected):
    model = random_model(tiny_args(moe_args={**MOE, "interleave_moe_layer_step": 2}))
    apply_lora(model, LoraArgs(rank=1, targets=(target,)))
    owners = {key.split(".lora.")[0] for key in model.state_dict() if ".lora." in key}
    ends = {".".join(o.split(".")[-2:]) if ".experts." in o else o.split(".")[-1] for o in owners}
    assert ends == expected
    assert not target.startswith("layers") or {o.split(".")[1] for o in owners} == {"1"}


def test_arguments_and_configs_leave_torch_alone():
    code = (
        "import transom.lora.args, transom.checkpoints.adapters.peft_config, sys; print('torch' "
        "in sys.modules)"
    )
    assert run_python(code).strip() == "False"


def test_what_is_left_out_is_said(capsys):
    apply_lora(random_model(tiny_args(moe_args=MOE)), LoraArgs(rank=1, targets=("attention",)))
    said = " ".join(capsys.readouterr().err.split())
    assert "attention adapter 8 of 8" in said and "experts frozen 0 of 6" in said


@pytest.mark.parametrize(
    ("fields", "scale"),
    [({}, 4 / 3), ({"scaling": "rslora"}, 4 / math.sqrt(3)), ({"scaling": "direct"}, 4.0)],
)
def test_a_scale_is_what_its_kind_says(fields, scale):
    model = drawn(random_model(tiny_args()), "default", 1, targets=("output",), **fields)
    held = model.output.lora["default"]
    x = torch.randn(5, 32)
    expected = x @ model.output.weight.T + scale * (x @ held.A.T @ held.B.T)
    assert far(model.output(x), expected) < 1e-5


def test_several_adapters_add_up_switch_and_go():
    model = random_model(tiny_args(moe_args=MOE))
    base = logits(model)
    drawn(model, "one", 1)
    first = logits(model)
    drawn(model, "two", 2, targets=("attention",), rank=2)
    second = logits(model)
    activate_adapters(model, ["one", "two"])
    both = logits(model)
    assert (
        min(far(a, b) for a, b in [(base, first), (first, second), (both, first), (both, second)])
        > 1e-3
    )
    merge_adapter(model)
    assert far(logits(model), both) < 2e-5
    unmerge_adapter(model)
    activate_adapters(model, [])
    assert far(logits(model), base) == 0
    activate_adapters(model, ["one"])
    assert far(logits(model), first) == 0
    remove_adapter(model, "one")
    assert adapter_names(model) == ("two",) and far(logits(model), base) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merging_rounds_once_and_unmerging_restores_every_bit(dtype):
    model = drawn(
        random_model(tiny_args(moe_args=MOE, qkv_bias=True)).to(dtype), "default", 1, rank=3
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    leaf = model.layers[1].feed_forward.experts.w_value
    held = leaf.lora["default"]
    exact = leaf.weight.double() + held.scale * (held.B.double() @ held.A.double())
    for _ in range(2):
        merge_adapter(model)
        step = 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert far(leaf.weight.double(), exact) <= step
        unmerge_adapter(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_half_precision_weights_keep_their_dtype_and_train_wide_adapters():
    model = drawn(random_model(tiny_args()).bfloat16(), "default", 1)
    assert model.layers[0].attention.wq.lora["default"].A.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    exact = logits(copy.deepcopy(model).float())
    assert (logits(model).float() - exact).std() < 0.02 * exact.std()


def test_a_copy_has_adapters_of_its_own():
    model = drawn(random_model(tiny_args()), "default", 1, modules_to_save=("output",))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layers[0].attention.wq.lora["default"].B.zero_()
        twin.output.weight.zero_()
    assert far(logits(model), logits(twin)) > 1e-2
    activate_adapters(twin, [])
    activate_adapters(model, [])
    assert far(logits(model), logits(twin)) == 0


def test_whole_modules_train_beside_the_base_ones_and_move_with_the_model():
    model = random_model(tiny_args())
    base = logits(model)
    apply_lora(model, LoraArgs(rank=1, targets=("wq",), modules_to_save=("norm", "output")))
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert model.output.weight.requires_grad and far(logits(model), base) > 0.1
    model.double().float()
    changed = logits(model)
    activate_adapters(model, [])
    assert far(logits(model), base) == 0
    activate_adapters(model, ["default"])
    assert far(logits(model), changed) == 0


def test_state_dicts_carry_adapters():
    model = drawn(random_model(tiny_args(moe_args=MOE)), "a", 1, dora=True)
    other = drawn(random_model(tiny_args(moe_args=MOE), seed=5), "a", 2, dora=True)
    other.load_state_dict(model.state_dict())
    assert far(logits(other), logits(model)) == 0


def test_an_unmerged_adapter_is_not_lost_by_saving_the_model():
    model = drawn(random_model(tiny_args()), "default", 1)
    with pytest.raises(RequestError, match="'default' is active; expected to merge it first"):
        plain_weights(model)
    activate_adapters(model, [])
    assert set(plain_weights(model)) == set(random_model(tiny_args()).state_dict())


def test_compiled_and_checkpointed_forwards_agree():
    model = drawn(random_model(tiny_args()), "default", 1, dropout=0.0)
    block, x = model.layers[0].feed_forward, torch.randn(1, 4, 32)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert far(compiled(x), block(x)) < 1e-6
    again = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    again.sum().backward()
    assert block.w_out.lora["default"].A.grad is not None


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda m: apply_lora(m, LoraArgs(targets=("attentoin",))),
            "targets: got 'attentoin'.*did you mean 'attention'",
        ),
        (lambda m: apply_lora(m, LoraArgs(targets=("w[",))), "no regular expression"),
        (
            lambda m: apply_lora(m, LoraArgs(targets=("experts",))),
            "expected attention, ffn, all-linear, or .* wq$",
        ),
        (
            lambda m: apply_lora(m, LoraArgs(rank=99, targets=("wq", "wk"))),
            "rank: got 99; expected at most 16",
        ),
        (
            lambda m: apply_lora(m, LoraArgs(modules_to_save=("outptu",))),
            "no module of this model.*'output'",
        ),
        (lambda m: apply_lora(m, LoraArgs(), "a.b"), "adapter name: got 'a.b'"),
        (lambda m: apply_lora(m, LoraArgs(), "keys"), "adapter name: got 'keys'"),
        (lambda m: apply_lora(m, LoraArgs(), "there"), "adapter: got 'there', which exists"),
        (lambda m: activate_adapters(m, ["their"]), "adapter: got 'their'; expected there"),
        (lambda m: remove_adapter(m, "their"), "adapter: got 'their'; expected there"),
        (unmerge_adapter, "no adapter is merged"),
        (lambda m: merge_adapter(merge_adapter(m)), "cannot be merged again"),
        (lambda m: apply_lora(merge_adapter(m), LoraArgs(), "new"), "unmerge them first"),
        (lambda m: activate_adapters(merge_adapter(m), []), "unmerge them first"),
        (
            lambda m: activate_adapters(drawn(m, "two", 1, dora=True), ["there", "two"]),
            r"expected one at a time.*'two'.*\(DoRA\)",
        ),
        (lambda m: merge_adapter(random_model(tiny_args())), "no adapter is active"),
        (lambda m: LoraArgs(rank=0), "rank: got 0"),
        (lambda m: LoraArgs(alpha=0.0), "alpha: got 0.0"),
        (lambda m: LoraArgs.from_dict({"dropout": 1.0}), "dropout: got 1.0"),
        (lambda m: LoraArgs.from_dict({"scaling": "rslor"}), "did you mean 'rslora'"),
    ],
)
def test_wrong_requests_are_one_sentence(act, words):
    model = drawn(random_model(tiny_args()), "there", 1, targets=("attention",))
    with pytest.raises(RequestError, match=words) as error:
        act(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("removed", ["a", "b"])
def test_removing_one_adapter_leaves_the_other_in_cached_decoding(removed):
    """Absorbed decoding multiplies by the weight of wkv_b past its leaf, which an adapter there
    must prevent.
    """
    mla = {
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    model = random_model(tiny_args(mla_args=mla, n_kv_heads=None))
    plain = logits(model)
    drawn(model, "a", 1, targets=("wkv_a",))
    drawn(model, "b", 2, targets=("wkv_b",))
    activate_adapters(model, ["a", "b"])
    remove_adapter(model, removed)
    expected, cache = logits(model), model.make_cache(2, 32)
    assert far(expected, plain) > 1e-2
    steps = [
        model(TransformerInput(TOKENS[:, i : i + 1]), cache).logits for i in range(TOKENS.size(1))
    ]
    assert far(torch.cat(steps, 1), expected) < 1e-5
    remove_adapter(model, "ab".replace(removed, ""))
    assert not any("absorbed" in vars(block.attention) for block in model.layers)
