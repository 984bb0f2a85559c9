"""The loop: a batch equals its rows alone, whatever the layers, the chunks and the neighbours."""

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError, WorkError
from transom.base.runtime import one_thread
from transom.inference.decode_args import DecodeArgs
from transom.inference.forward import not_finite, prefill
from transom.inference.loop import generate, stream, truncate_after_interrupt
from transom.inference.sampling import SamplingArgs
from transom.layers.inputs import TransformerInput
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs

KINDS = {
    "full": {},
    "window": {"sliding_window": 5},
    "chunk": {"attention_chunk_size": 6, "nope_layer_interval": 2, "n_layers": 4},
    "only-chunks": {"attention_chunk_size": 6},
    "experts": {"moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 32}},
}
PROMPTS = [list(range(1, 20)), [7], [5, 9, 30, 2], [8] * 50]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def model_of(kind="full", **changes):
    return random_model(tiny_args(**KINDS[kind], **changes)).double()


def rows_of(steps):
    """Per row the tokens that a stream yielded, and None from where it was finished."""
    return [list(row) for row in zip(*steps, strict=True)]


def uncached(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(
            int(model(TransformerInput(torch.tensor([ids])), inference=True).logits[0, -1].argmax())
        )
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step_size", [1, 3, 512])
def test_unequal_prompts_equal_each_alone(kind, step_size):
    model = model_of(kind)
    got = rows_of(stream(model, PROMPTS, max_new_tokens=12, decode=DecodeArgs(step_size)))
    assert got == [uncached(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", KINDS)
def test_with_8_bits_tokens_do_not_depend_on_the_calls(kind):
    model, decode = model_of(kind), [DecodeArgs(size, kv_bits=8) for size in (512, 3)]
    first, other = (
        rows_of(stream(model, PROMPTS, max_new_tokens=12, decode=one)) for one in decode
    )
    assert first == other
    sampling = SamplingArgs(temperature=1.0)
    probs = [[], []]
    for one, out in zip(({}, {"decode": DecodeArgs(kv_bits=8)}), probs, strict=True):
        list(stream(model, PROMPTS, max_new_tokens=2, sampling=sampling, log_probs=out, **one))
    assert not torch.equal(*map(torch.stack, probs)), "keys and values must have been rounded"


def test_long_windows_turn_the_ring_many_times():
    model = model_of(
        "window", max_seq_len=16
    )  # a limit for layers that keep every token, not for these
    prompt = [(7 * i) % 61 for i in range(90)]
    (got,) = rows_of(stream(model, [prompt], max_new_tokens=60, decode=DecodeArgs(50)))
    roomy = model_of("window", max_seq_len=512)
    assert got == uncached(roomy, prompt, 60)


def test_a_sampled_row_does_not_depend_on_its_neighbours():
    model = model_of()
    sampling = SamplingArgs(
        temperature=1.0, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3
    )
    together = rows_of(
        stream(model, PROMPTS, max_new_tokens=20, sampling=sampling, seeds=[4, 5, 6, 7])
    )
    for row, prompt in enumerate(PROMPTS):
        alone = rows_of(
            stream(model, [prompt], max_new_tokens=20, sampling=sampling, seeds=[4 + row])
        )
        assert alone == [together[row]]


@pytest.mark.parametrize("kind", ["full", "window", "experts"])
def test_a_stop_token_ends_its_row_only(kind):
    model = model_of(kind)
    free = rows_of(stream(model, PROMPTS, max_new_tokens=12))
    stop, cache = free[2][4], model.make_cache(4, 70)
    got = rows_of(stream(model, PROMPTS, max_new_tokens=12, stop_tokens=[stop], cache=cache))
    said = [len(tokens) - tokens.count(None) for tokens in got]
    stored = [len(prompt) + count - 1 for prompt, count in zip(PROMPTS, said, strict=True)]
    assert min(said) < 12 and cache.lengths_B.tolist() == stored
    for row, tokens in zip(free, got, strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        assert [id for id in tokens if id is not None] == row[:end]
        assert all(id is None for id in tokens[end:])


def test_the_stream_ends_with_its_last_row():
    model = model_of()
    (free,) = rows_of(stream(model, [[1, 2, 3]], max_new_tokens=12))
    assert (
        rows_of(stream(model, [[1, 2, 3]], max_new_tokens=12, stop_tokens=free[:3]))[0] == free[:1]
    )


def test_generate_fills_finished_rows():
    model = model_of()
    tokens = torch.tensor([[1, 2, 3], [9, 8, 7]])
    free = generate(model, tokens, 8)
    assert free.shape == (2, 11) and torch.equal(free[:, :3], tokens)
    stop = int(free[0, 5])
    got = generate(model, tokens, 8, stop_tokens=[stop], pad_token=60)
    for row in (0, 1):
        new = free[row, 3:].tolist()
        end = new.index(stop) + 1 if stop in new else 8
        assert got[row, 3:].tolist() == new[:end] + [60] * (8 - end)


def test_generate_takes_lists_of_different_lengths():
    model = model_of()
    rows = [[1, 2, 3, 4], [9, 8]]
    lists = generate(model, rows, 6, pad_token=55)
    assert lists[:, :4].tolist() == [[1, 2, 3, 4], [9, 8, 55, 55]]
    assert lists[:, 4:].tolist() == [uncached(model, row, 6) for row in rows]


@pytest.mark.parametrize("kind", ["full", "window", "chunk"])
def test_a_cache_is_continued(kind):
    model = model_of(kind)
    cache = model.make_cache(2, 100)
    prompts = [[1, 2, 3], [4, 5]]
    first = rows_of(stream(model, prompts, max_new_tokens=5, cache=cache))
    assert cache.lengths_B.tolist() == [7, 6]  # all but the last token of each row
    longer = [prompts[0] + first[0] + [9], prompts[1] + first[1] + [9, 10, 11]]
    second = rows_of(stream(model, longer, max_new_tokens=5, cache=cache))
    assert second == [uncached(model, prompt, 5) for prompt in longer]
    with pytest.raises(RequestError, match="more than the cache's"):
        stream(model, prompts, max_new_tokens=5, cache=cache)


@pytest.mark.parametrize("kind", ["full", "window", "chunk"])
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 9])
def test_an_interrupted_cache_is_settled(kind, cut, monkeypatch):
    """Ctrl-C in the middle of a forward, while some layers have stored its tokens and others have
    not.
    """
    model = model_of(kind)
    prompt = [(5 * i) % 61 for i in range(130)]
    size = 50  # tokens per call: more than a ring can take without losing what it needs
    cache, calls = model.make_cache(1, 180), []
    attention = model.layers[1].attention
    forward = attention.forward

    def interrupt(*args):
        calls.append(None)
        if len(calls) == cut + 1:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(attention, "forward", interrupt)
    got = []
    with pytest.raises(KeyboardInterrupt):
        got += (
            ids[0]
            for ids in stream(
                model, [prompt], max_new_tokens=20, cache=cache, decode=DecodeArgs(size)
            )
        )
    text = prompt + got
    truncate_after_interrupt(cache, at_most=len(text), in_flight=1 if got else size)
    if kind == "full" or got:  # nothing was lost
        assert int(cache.lengths_B[0]) == len(prompt[: size * cut]) + max(len(got) - 1, 0)
    text.append(3)
    (after,) = rows_of(
        stream(model, [text], max_new_tokens=8, cache=cache, decode=DecodeArgs(size))
    )
    assert after == uncached(model, text, 8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": []}, "prompts: got"),
        ({"prompts": [[1], []]}, "prompt 1: got"),
        ({"prompts": [[1, 61]]}, "prompt 0: got token 61; expected 0 to 60"),
        ({"prompts": [[-1]]}, "token -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_new_tokens": 255}, "a prompt of 2 tokens and 255 new"),
        ({"seeds": [1, 2]}, "seeds: got 2"),
    ],
)
def test_a_wrong_request_is_refused_before_the_model_runs(changes, sentence, monkeypatch):
    model = random_model(tiny_args())
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(RequestError, match=sentence):
        stream(model, **{"prompts": [[1, 2]], "max_new_tokens": 4, **changes})


def test_an_unknown_option_or_a_value_out_of_bounds_is_refused():
    model = random_model(tiny_args())
    with pytest.raises(RequestError, match="prefill_step_size: got 0"):
        generate(model, [[1, 2]], 4, prefill_step_size=0)
    with pytest.raises(TypeError, match="beam_width"):
        generate(model, [[1, 2]], 4, beam_width=2)


def test_the_whole_context_can_be_used():
    model = model_of(max_seq_len=16)
    assert generate(model, torch.ones(1, 6, dtype=torch.int64), 10).shape == (1, 16)


def test_a_cache_that_is_too_small_is_refused():
    model = model_of()
    assert (
        len(list(stream(model, [[1, 2, 3]], max_new_tokens=6, cache=model.make_cache(1, 8)))) == 6
    )
    with pytest.raises(RequestError, match="cache: got '9 tokens'"):
        stream(model, [[1, 2, 3]], max_new_tokens=7, cache=model.make_cache(1, 8))


def test_which_rows_give_no_token():
    inf = float("inf")
    rows_BV = torch.tensor([[0.0, -inf], [0.0, inf], [-inf, -inf], [0.0, float("nan")]])
    assert not_finite(rows_BV).tolist() == [False, True, True, True]


def test_nan_logits_are_not_sampled():
    model = model_of()
    model.output.weight.data[0, 0] = float("nan")
    with pytest.raises(WorkError, match=r"logits: got NaN.* the weight output\.weight is not"):
        generate(model, torch.tensor([[1, 2]]), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_where_numbers_overflow_is_named(kind):
    """The weights are finite, and only a token that is generated later makes them overflow."""
    model = model_of(kind, embedding_scale=2.0).float()
    prompt = [[3] * 20, [7]]
    first = int(generate(model, [prompt[0]], 1)[0, -1])
    model.tok_embeddings.weight.data[first] = 3e38
    before = r"logits: got NaN or infinite values in float32; the output of "
    with pytest.raises(WorkError, match=before + r"layers\.0\.attention_norm is the first"):
        generate(model, prompt, 4, prefill_step_size=8)
    model = model_of().float()
    model.layers[1].feed_forward.w_out.weight.data.fill_(3e38)
    with pytest.raises(WorkError, match=before + r"layers\.1\.feed_forward\.w_out is the first"):
        generate(model, prompt, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("stop_tokens", [(), (60,)])
def test_logits_that_break_while_decoding_are_not_sampled(bad, stop_tokens):
    """The prompt is fine; the row of the first token that is drawn, met at the second call, is
    not.
    """
    model = model_of()
    prompt = torch.tensor([[1, 2]])
    first = int(generate(model, prompt, 1)[0, -1])
    assert first not in (1, 2, *stop_tokens)
    model.tok_embeddings.weight.data[first] = bad
    with pytest.raises(WorkError, match="logits: got NaN"):
        generate(model, prompt, 4, stop_tokens=stop_tokens)


def test_broken_logits_of_a_finished_row_do_not_end_the_others():
    model = model_of()
    prompts = [[1, 2], [3, 4, 5]]
    first = [int(generate(model, torch.tensor([prompt]), 1)[0, -1]) for prompt in prompts]
    alone = generate(model, torch.tensor([prompts[1]]), 4)[0, 3:].tolist()
    assert first[0] not in alone
    model.tok_embeddings.weight.data[first[0]] = float("nan")
    rows = list(stream(model, prompts, max_new_tokens=4, stop_tokens=[first[0]]))
    assert [row[1] for row in rows] == alone


def test_only_the_last_logits_of_a_chunked_prompt_are_computed(monkeypatch):
    model = model_of()
    asked, forward = [], model.forward

    def spy(inputs, cache, **options):
        asked.append(inputs.logits)
        return forward(inputs, cache, **options)

    monkeypatch.setattr(model, "forward", spy)
    with torch.inference_mode():
        prefill(model, model.make_cache(2, 20), [[1] * 10, [2] * 4], 3)
    assert asked == ["none", "last", "none", "last"]


def test_the_caller_stays_out_of_inference_mode():
    model = model_of()
    for _ in stream(model, [[1, 2]], max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()
    assert not generate(model, torch.tensor([[1, 2]]), 2).is_inference()


@pytest.mark.parametrize(
    "fields", [{}, {"moe_args": {"num_experts": 4, "top_k": 2, "expert_capacity": 0.5}}]
)
def test_a_model_in_training_mode_generates_without_dropout_and_capacities(fields):
    model = model_of(**fields)
    apply_lora(model, LoraArgs(rank=4, dropout=0.5), quiet=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora." in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    expected = generate(model.eval(), prompts, 12)
    model.train().norm.eval()
    assert torch.equal(generate(model, prompts, 12), expected)
    assert [module for module in model.modules() if not module.training] == [model.norm]


@pytest.mark.parametrize("pattern", [{}, {"layer_pattern": "SF", "sliding_window": 5}])
@pytest.mark.parametrize("bits", [8, 16])
def test_what_all_prompts_share_runs_once(pattern, bits, ran):
    model = random_model(tiny_args(**pattern)).double()
    shared, decode = random_tokens(1, 70)[0].tolist(), DecodeArgs(64, kv_bits=bits)
    prompts = [[*shared, 1, 2, 3], [*shared, 4], [*shared, 5, 6]]
    alone = [list(stream(model, [one], max_new_tokens=4, decode=decode)) for one in prompts]
    ran.clear()
    rows = list(stream(model, prompts, max_new_tokens=4, decode=decode))
    assert [[ids[row] for ids in rows] for row in range(3)] == [
        [id for (id,) in one] for one in alone
    ]
    assert ran[:3] == [64, 6, 3]
