"""Blocks that are read again in every call compute what the blocks in memory compute."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.checkpoints.families import random_ids, tiny_hf
from tests.checkpoints.gguf.files import write_gguf
from tests.helpers import random_model, run_python, tiny_args
from transom.base.errors import RequestError, WorkError, collected_notices
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.describe_model import describe_model
from transom.checkpoints.files.file_pieces import SourceFile
from transom.checkpoints.files.layout import WEIGHTS
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.checkpoints.state import meta_model
from transom.inference import weight_streaming
from transom.inference.decode_args import DecodeArgs
from transom.inference.loop import generate
from transom.inference.memory_answer import memory_answer
from transom.inference.room import check_memory
from transom.inference.weight_streaming import Offload, WeightStream
from transom.layers.inputs import TransformerInput
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.planning.memory import PROGRAM_BYTES
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import quantized_leaves
from transom.quantize.methods import quantize_model

MOE = {"moe_args": {"num_experts": 8, "top_k": 2, "hidden_dim": 48}}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
TARGETS = ("wq", "wo", "w_value", "tok_embeddings")
TOKENS = [[5, 9, 30, 2, 7, 7, 1], [3, 4]]


def smallest(folder, source="disk", **options):
    """Return a model with as many streamed blocks as there can be, and its offloader."""
    plans = []
    load(folder, offload=Offload(source), before_weights=plans.append, **options)
    offload = Offload(source, plans[0].weight_bytes)
    made = load(folder, offload=offload, before_weights=lambda plan: 0, **options)
    return made, offload


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of six layers with tied embeddings, and its model."""
    model = random_model(tiny_args(n_layers=6, vocab_size=99, tie_embeddings=True), std=0.1)
    folder = tmp_path_factory.mktemp("six") / "model"
    save(model, folder)
    return folder


def logits(model, ids=None):
    ids = random_ids() if ids is None else ids
    return model(TransformerInput(ids), inference=True).logits


@pytest.mark.parametrize("family", ["llama-tied", "phi3", "mixtral", "gpt_oss", "deepseek_v3"])
def test_every_layout_of_files_gives_the_same_logits(family, tmp_path):
    tiny_hf(family, num_hidden_layers=4).save_pretrained(tmp_path)
    plain, (streamed, _) = load(tmp_path), smallest(tmp_path)
    assert all(one.is_meta for one in streamed.layers[3].parameters())
    for _ in range(2):  # the second call begins with blocks that the first one has read
        assert torch.equal(logits(streamed), logits(plain))


def test_pickled_weights_are_streamed(folder, tmp_path):
    save(load(folder), tmp_path / "meta", format="meta")
    plain, (streamed, _) = load(tmp_path / "meta"), smallest(tmp_path / "meta")
    assert torch.equal(logits(streamed), logits(plain))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_of_another_dtype_are_converted_on_the_way(folder, dtype):
    with collected_notices() as notices:
        streamed, _ = smallest(folder, dtype=dtype)
    assert "are converted each time" in notices[-1]
    assert torch.equal(logits(streamed), logits(load(folder, dtype=dtype)))


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.F16])
def test_gguf_files_are_streamed(kind, codes, tmp_path):
    if kind == Type.F16 and codes:
        return
    model = tiny_hf("llama-tied", **WIDE, num_hidden_layers=4)
    file = write_gguf(model, tmp_path / "tiny.gguf", tmp_path / "hf", kind=kind)
    options = {"dtype": "float32" if kind == Type.Q4_0 else None, "keep_quantized": codes}
    plain, (streamed, _) = load(file, **options), smallest(file, **options)
    assert torch.equal(logits(streamed), logits(plain))


@pytest.mark.parametrize("format", ["hf", "native"])
@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_quantized_folders_are_streamed(kind, format, tmp_path):
    model = random_model(tiny_args(hidden_dim=64, n_layers=4, vocab_size=99), std=0.1)
    save(quantize_model(model, QuantizeArgs(kind=kind, group=32)), tmp_path, format)
    plain, (streamed, _) = load(tmp_path), smallest(tmp_path)
    assert quantized_leaves(streamed).keys() == quantized_leaves(plain).keys()
    assert torch.equal(logits(streamed), logits(plain))
    made = [generate(one, TOKENS, 6) for one in (plain, streamed)]
    assert torch.equal(*made)


def test_proposed_tokens_share_a_reading(folder):
    plain, (streamed, offload) = load(folder), smallest(folder)
    prompt = [[5, 9, 30, 5, 9, 30, 5, 9]]
    expected = generate(plain, prompt, 12)
    counts = []
    for number in (None, 4):
        before = offload.stream.bytes_read
        made = generate(streamed, prompt, 12, prompt_lookup_num_tokens=number)
        assert torch.equal(made, expected)
        counts.append(offload.stream.bytes_read - before)
    assert counts[1] <= counts[0]


def test_a_batch_has_the_same_tokens_and_reads_each_block_once_per_call(folder):
    plain, (streamed, offload) = load(folder), smallest(folder)
    made = [generate(one, TOKENS, 9, prefill_step_size=4) for one in (plain, streamed)]
    assert torch.equal(*made)
    blocks = sum(one.nbytes for one in plain.layers.parameters())
    calls = 2 + 8  # two pieces of the prompts; the last token is not run
    assert offload.stream.bytes_read == calls * blocks


def test_neighbours_in_a_file_are_one_read(folder, monkeypatch):
    streamed, _ = smallest(folder)
    given, places = SourceFile.read_into, set()

    def note(self, out, offset):
        places.add(offset)
        given(self, out, offset)

    monkeypatch.setattr(SourceFile, "read_into", note)
    logits(streamed)
    logits(streamed)
    assert len(places) == len(streamed.layers)


def test_only_the_experts_that_tokens_choose_are_read(tmp_path):
    model = random_model(tiny_args(n_layers=4, **MOE))
    save(model, tmp_path / "native")
    save(model, tmp_path / "hf", format="hf")  # one tensor per expert
    ids = torch.tensor([[5]])
    expected = logits(model, ids)
    experts = sum(
        one.nbytes for layer in model.layers for one in layer.feed_forward.experts.parameters()
    )
    rest = sum(one.nbytes for one in model.layers.parameters()) - experts
    for name in ("native", "hf"):
        streamed, offload = smallest(tmp_path / name)
        assert torch.equal(logits(streamed, ids), expected)
        assert offload.stream.bytes_read == rest + experts * 2 // 8


def adapted(folder, out, **fields):
    """Write an adapter on a model into `out`; return the model with it."""
    plain = load(folder)
    apply_lora(plain, LoraArgs(rank=2, **{"targets": TARGETS, **fields}), quiet=True)
    with torch.no_grad():
        for name, one in plain.named_parameters():
            if ".lora.default" in name and not name.endswith(".magnitude"):
                one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    save_adapter(plain, out, base=str(folder))
    return plain


ADAPTERS = {
    "lora": {},
    "dora": {"dora": True},
    "saved": {"targets": ("wq",), "modules_to_save": ("ffn_norm", "wo")},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_stays_in_memory_and_counts(folder, tmp_path, kind):
    plain = adapted(folder, tmp_path / "adapter", **ADAPTERS[kind])
    streamed, _ = smallest(tmp_path / "adapter")
    assert torch.equal(logits(streamed), logits(plain.eval()))
    assert not torch.equal(logits(streamed), logits(load(folder)))
    later, _ = smallest(folder)
    load_adapter(later, tmp_path / "adapter")
    assert torch.equal(logits(later), logits(plain))


def test_weights_from_memory_pass_through_the_same_buffers(folder, monkeypatch):
    """As on a GPU with `cpu`: the CPU plays both parts."""
    plain, taken = load(folder), []
    monkeypatch.setattr(Offload, "attach", lambda self, model, blocks: taken.append(blocks))
    model, _ = smallest(folder)
    made = WeightStream(model, taken[-1], "cpu")
    for _ in range(2):
        assert torch.equal(logits(model), logits(plain))
    assert made.bytes_read == 2 * sum(one.nbytes for one in plain.layers.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_call_after_an_interrupted_one_is_right(folder, error, layer):
    plain, (streamed, _) = load(folder), smallest(folder)

    def fail(*_):
        handle.remove()
        raise error

    handle = streamed.layers[layer].feed_forward.register_forward_hook(fail)
    with pytest.raises(error):
        logits(streamed)
    for _ in range(2):
        assert torch.equal(logits(streamed), logits(plain))


def test_a_file_that_was_replaced_or_deleted_is_read_to_the_end(folder, tmp_path):
    own = tmp_path / "model"
    save(load(folder), own)
    streamed, _ = smallest(own)
    (own / WEIGHTS).unlink()
    (own / WEIGHTS).write_bytes(b"another")
    assert torch.equal(logits(streamed), logits(load(folder)))


@pytest.mark.parametrize(("format", "name"), [("hf", WEIGHTS), ("meta", "consolidated.00.pth")])
def test_a_file_that_became_shorter_is_one_sentence(format, name, folder, tmp_path):
    own = tmp_path / "model"
    save(load(folder), own, format=format)
    streamed, _ = smallest(own)
    logits(streamed)
    size = (own / name).stat().st_size
    os.truncate(own / name, size // 8)
    for _ in range(2):
        with pytest.raises(WorkError, match=rf"{name}: the file ends at byte [\d,]+ while"):
            logits(streamed)


@pytest.mark.parametrize("kind", ["converted", "int4", "gguf", "gguf codes"])
def test_weights_that_are_converted_are_not_read_from_maps(kind, tmp_path):
    """A map of a file that became shorter would end this process with SIGBUS."""
    options, opened = {}, tmp_path / "model"
    model = random_model(tiny_args(hidden_dim=64, n_layers=4, vocab_size=99), std=0.1)
    if kind.startswith("gguf"):
        opened = tmp_path / "tiny.gguf"
        hf = tiny_hf("llama-tied", **WIDE, num_hidden_layers=4)
        write_gguf(hf, opened, tmp_path / "hf", kind=Type.Q4_0)
        options = {"dtype": "float32", "keep_quantized": kind == "gguf codes"}
    elif kind == "int4":
        save(quantize_model(model, QuantizeArgs(kind="int4", group=32)), opened, "hf")
    else:
        save(model, opened)
        options = {"dtype": "bfloat16"}
    streamed, _ = smallest(opened, **options)
    logits(streamed)
    file = opened if opened.is_file() else opened / WEIGHTS
    os.truncate(file, file.stat().st_size // 8)
    with pytest.raises((WorkError, RequestError), match=f"{file}: (the file ends|cannot|not a)"):
        logits(streamed)


def test_weights_that_are_not_in_memory_can_be_neither_saved_nor_trained(folder, tmp_path):
    streamed, _ = smallest(folder)
    with pytest.raises(RequestError, match="got a call that records gradients"):
        streamed(TransformerInput(random_ids()))
    with pytest.raises(RequestError, match="device: got 'meta'; expected weights on a device"):
        save(streamed, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(RequestError, match="compile: got True; expected False"):
        generate(streamed, TOKENS, 2, compile=True)


@pytest.mark.parametrize(
    ("source", "memory", "message"),
    [
        ("ram", None, "offload: got 'ram'; expected cpu or disk"),
        ("cpu", None, "offload: got 'cpu'; expected disk on the CPU"),
        ("disk", "6 parsecs", "max_memory: got '6 parsecs'; expected a size like"),
        ("disk", "20kB", r"max_memory: got 0\.02 MB; expected 0\.07 MB for the weights"),
    ],
)
def test_what_cannot_be_is_one_sentence(folder, source, memory, message):
    with pytest.raises(RequestError, match=message):
        load(folder, offload=Offload(source, memory))


@pytest.mark.parametrize("kind", [None, *ADAPTERS])
def test_the_placement_is_known_before(folder, tmp_path, kind):
    opened = folder
    if kind is not None:
        opened = tmp_path / "adapter"
        adapted(folder, opened, **ADAPTERS[kind])
    whole, layer = memory_answer(describe_model(str(opened)), 48, 2).plan, load(folder).layers[0]
    size = whole.total - PROGRAM_BYTES - sum(one.nbytes for one in layer.parameters())
    planned, made = Offload("disk", size), Offload("disk", size)
    answer = memory_answer(describe_model(str(opened)), 48, 2, offload=planned)
    assert answer.plan.needed <= size
    device, decode = torch.device("cpu"), DecodeArgs()

    def needed(plan):
        return check_memory(plan.args, 2, 48, plan.dtype, device, decode, load=plan)

    model = load(opened, offload=made, before_weights=needed)
    present = sum(one.nbytes for one in model.parameters() if not one.is_meta)
    if kind != "saved":  # what a saved module replaces stays in memory, and is no parameter
        assert present == answer.placement.resident_bytes
    assert answer.placement == made.placement and made.placement.streamed
    most = memory_answer(describe_model(str(opened)), answer.most_tokens, 2, offload=planned)
    assert most.plan.needed <= size
    if answer.most_tokens < model.args.max_seq_len:
        with pytest.raises(RequestError, match="max_memory: got"):
            memory_answer(describe_model(str(opened)), answer.most_tokens + 1, 2, offload=planned)


def test_layers_that_do_not_fit_into_the_memory_of_the_host_are_refused(folder, monkeypatch):
    plans, blocks = [], []
    monkeypatch.setattr(Offload, "attach", lambda self, model, given: blocks.append(given))
    smallest(folder)
    load(folder, before_weights=plans.append)
    plan = replace(plans[0], device=torch.device("cuda"))
    size = plan.weight_bytes
    monkeypatch.setattr(weight_streaming, "bytes_left", lambda device: size)
    monkeypatch.setattr(weight_streaming, "host_bytes_left", lambda: 50_000)
    with pytest.raises(RequestError, match=r"offload: got 'cpu' for 0\.\d+ MB with 0\.05 MB left"):
        Offload("cpu").place(plan, blocks[-1], lambda plan: size // 2)
    assert Offload("disk").place(plan, blocks[-1], lambda plan: size // 2)


def test_broken_logits_are_still_located(folder):
    streamed, _ = smallest(folder)
    with torch.no_grad():
        streamed.norm.weight[3] = float("nan")
    with pytest.raises(WorkError, match=r"weight norm\.weight is not finite"):
        generate(streamed, TOKENS, 2)


LARGE = """
import os, sys
from pathlib import Path
folder, group = sys.argv[1:]
os.environ["TRANSOM_OPS"] = "0"  # the compiler needs more memory than the model
if group:
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
import torch
from transom.checkpoints.load import load
from transom.inference.loop import generate
from transom.inference.weight_streaming import Offload
torch.set_num_threads(1)
offload = Offload("disk", "90MB", tokens=8) if group else None
print(generate(load(folder, offload=offload), [[1, 2, 3, 4, 5, 6]], 5).tolist())
"""


@pytest.fixture
def limited_group():
    """A control group of Linux with 300 MB of memory, page cache included."""
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = {one.split(":")[1]: one.split(":")[2].strip("/") for one in groups}
    kinds = (("memory", "memory", "memory.limit_in_bytes"), ("", "", "memory.max"))
    for controller, folder, limit in kinds:
        made = Path("/sys/fs/cgroup") / folder / own.get(controller, "") / f"transom-{os.getpid()}"
        with suppress(OSError):
            made.mkdir()
            try:
                (made / limit).write_text("300000000")
                yield made
            finally:
                made.rmdir()
            return
    pytest.skip("control groups cannot be made here")


@pytest.mark.slow
def test_a_model_four_times_larger_than_memory_has_the_same_tokens(tmp_path, limited_group):
    shape = {"dim": 1024, "n_heads": 16, "n_kv_heads": 8, "hidden_dim": 3072, "n_layers": 47}
    model = meta_model(tiny_args(**shape, vocab_size=8000)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for index, one in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(index)
            one.fill_(1.0) if one.ndim == 1 else one.normal_(0, 0.02, generator=generator)
    assert sum(one.nbytes for one in model.parameters()) > 4 * 300_000_000
    save(model, tmp_path / "large")
    del model

    def run(group):
        words = ["", str(tmp_path / "large"), str(group)]
        return run_python(f"import sys\nsys.argv = {words}" + LARGE)

    assert run(limited_group) == run("")
