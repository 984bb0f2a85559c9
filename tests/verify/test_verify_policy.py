"""`verify policy`: a folder's own weights in every precision, and what no backend could do is
said.
"""

from __future__ import annotations

import json

from tests.helpers import random_model, tiny_args
from transom.checkpoints.save import save
from transom.cli.main import main


def test_a_folder_is_compared_in_every_precision_and_the_rest_is_said(tmp_path, capsys):
    save(
        random_model(tiny_args(layer_pattern="SF", sliding_window=7, attn_sinks=True)),
        tmp_path / "model",
    )
    assert main(["verify", "policy", str(tmp_path / "model"), "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out.splitlines()[-1])
    assert {row["comparison"] for row in told["comparisons"]} == {
        f"{what}, {backend}"
        for what in (
            "largest gap, float32",
            "median gap, bfloat16 products",
            "median gap, bfloat16",
        )
        for backend in ("blockwise", "reference")
    }
    assert {row["cases"] for row in told["comparisons"]} == {2}, "one of each temperature"
    assert "sdpa in bfloat16: nothing was compared (computes neither" in printed.err
