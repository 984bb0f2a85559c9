"""A setting that has no effect under the others is refused, not ignored."""

import pytest

from tests.training.finetune.runs import base_folder, chats
from transom.base.errors import RequestError
from transom.base.fields import field_types
from transom.cli.main import main
from transom.training.config import TrainArgs, read_config
from transom.training.effects import EFFECTS, check_effects
from transom.training.loop.setup import open_run

FINETUNE = {"base": "somewhere", "finetune": {}}
# A field and other words: what is refused, whatever the value is.
REFUSED = {
    "finetune.lora.rank=16": ["finetune.method=full"],
    "finetune.lora.dropout=0.1": ["finetune.method=full"],
    "finetune.reward=exact": [],
    "finetune.group=4": ["finetune.objective=dpo"],
    "finetune.alpha=0.5": [],
    "finetune.reverse=true": ["finetune.objective=grpo"],
    "finetune.temperature=2": ["finetune.objective=kto"],
    "finetune.desirable_weight=1": ["finetune.objective=dpo"],
    "finetune.train_on=all": ["finetune.objective=dpo"],
    "finetune.truncate=drop": ["finetune.objective=grpo"],
    "finetune.packing=true": ["finetune.objective=dpo"],
    "finetune.scores=3": ["eval_every=4"],
    "steps=3": ["finetune.epochs=2"],
    "eval_tokens=10": [],
    "data.cache_dir=x": [],
}
TRAIN_REFUSED = {
    "short_rows_split=2": [],
    "contrastive_temperature=0.1": [],
    "loss_chunk=5": ["model.head={kind: classification}", "model.layer_pattern=BBBB"],
    "sample_prompts=[a]": [],
    "sample_tokens=64": ["sample_every=0"],
    "eval_tokens=10": [],
    "eval_every=3": ["data.held_out=0"],
    "optimizer.muon_lr=0.1": [],
    "tokenizer.vocab_size=300": ["tokenizer.kind=chars"],
    "schedule.decay=0.1": ["schedule.kind=cosine"],
    "schedule.final=0.1": ["schedule.kind=constant"],
}
BY_VALUE = {
    "lora": ({"method": "full", "lora": {"rank": 4}}, "finetune.lora.rank"),
    "targets": ({"method": "full", "lora": {"targets": ["attention"]}}, "finetune.lora.targets"),
    "reward": ({"reward": "number"}, "finetune.reward"),
    "reverse": ({"objective": "dpo", "reverse": True}, "finetune.reverse"),
    "weight": ({"undesirable_weight": 2.0}, "finetune.undesirable_weight"),
}


def refused(words, base):
    args = read_config(None, words, base=base)
    with pytest.raises(RequestError) as told:
        check_effects(args, [word.partition("=")[0] for word in words])
    return str(told.value)


@pytest.mark.parametrize("word", REFUSED)
def test_words_of_fine_tuning_without_an_effect_are_refused(word):
    assert refused([*REFUSED[word], word], FINETUNE).startswith(f"{word.partition('=')[0]}: got ")


@pytest.mark.parametrize("word", TRAIN_REFUSED)
def test_words_of_training_without_an_effect_are_refused(word):
    assert refused([*TRAIN_REFUSED[word], word], {}).startswith(f"{word.partition('=')[0]}: got ")


@pytest.mark.parametrize("case", BY_VALUE)
def test_values_of_another_method_are_refused_in_a_file(case):
    finetune, field = BY_VALUE[case]
    with pytest.raises(RequestError, match=f"^{field}: got "):
        check_effects(read_config(None, base={"base": "somewhere", "finetune": finetune}))


def test_a_run_that_goes_on_keeps_the_values_it_began_with():
    args = read_config(
        None, base={"base": "somewhere", "finetune": {"method": "full", "lora": {"rank": 4}}}
    )
    check_effects(args, by_value=False)


def test_a_config_may_keep_what_a_switch_turns_off():
    optimizer = {"name": "adamw", "muon_lr": 0.5}
    check_effects(
        read_config(None, ["eval_every=0"], base={"optimizer": optimizer, "sample_prompts": ["a"]})
    )


@pytest.mark.parametrize(
    "words",
    [
        [
            "finetune.lora.rank=4",
            "finetune.objective=dpo",
            "finetune.beta=0.2",
            "finetune.label_smoothing=0.1",
        ],
        [
            "finetune.objective=grpo",
            "finetune.group=4",
            "finetune.temperature=0.5",
            "finetune.reward=number",
            "finetune.beta=0.1",
        ],
        [
            "finetune.objective=distill",
            "finetune.teacher=x",
            "finetune.alpha=1",
            "finetune.temperature=2",
            "finetune.packing=true",
        ],
        ["finetune.packing=false", "finetune.objective=dpo", "finetune.teacher=null"],
        ["steps=4", "finetune.method=full", "finetune.train_on=all", "finetune.scores=2"],
    ],
)
def test_words_with_an_effect_are_accepted(words):
    check_effects(
        read_config(None, words, base=FINETUNE), [word.partition("=")[0] for word in words]
    )


def test_every_field_of_the_table_is_a_field():
    from transom.base.fields import type_at

    names = [name for effect in EFFECTS for name in effect.fields.split()]
    assert all(type_at(TrainArgs, name.split(".")) for name in names) and len(set(names)) == len(
        names
    )
    assert all(name.split(".")[0] in field_types(TrainArgs) for name in names)


def test_the_verbs_refuse_them(tmp_path, capsys):
    base, rows = base_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl")
    words = ["finetune", str(base), "--data", str(rows), "--out", str(tmp_path / "run")]
    assert main([*words, "--method", "full", "--rank", "16"]) == 2
    assert "finetune.lora.rank: got 16" in capsys.readouterr().err
    assert main(["train", f"data.sources={rows}", f"out={tmp_path}/run", "sample_tokens=3"]) == 2
    assert "sample_tokens: got 3" in capsys.readouterr().err
    assert (
        main(["demo", f"out={tmp_path}/run", "optimizer.name=adamw", "optimizer.muon_lr=0.1"]) == 2
    )
    assert "optimizer.muon_lr" in capsys.readouterr().err
    args = read_config(
        None,
        base={"base": str(base), "finetune": {"reward": "number"}, "out": str(tmp_path / "run")},
    )
    with pytest.raises(RequestError, match=r"^finetune\.reward"):
        open_run(args, quiet=True)
    assert not (tmp_path / "run").exists()
