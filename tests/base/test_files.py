"""Files and JSON."""

import json
import math

from transom.base.files import json_text


def test_json_has_null_where_a_number_is_not_finite(capsys):
    document = {"loss": math.inf, "rows": [1.5, math.nan, (-math.inf, 2)], "name": "NaN"}
    text = json_text(document)

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(text, parse_constant=refuse) == {
        "loss": None,
        "rows": [1.5, None, [None, 2]],
        "name": "NaN",
    }
    assert "3 NaN or infinite numbers" in capsys.readouterr().err


def test_json_of_finite_numbers_says_nothing(capsys):
    assert json_text({"é": [1.5]}, ensure_ascii=False) == '{"é": [1.5]}'
    assert capsys.readouterr().err == ""
