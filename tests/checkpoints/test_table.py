"""The page of checkpoints lists the families that are compared with their makers' code, and no others."""

from tests.checkpoints.consolidated import PARAMS
from tests.checkpoints.families import FAMILIES as COMPARED
from tests.checkpoints.table import BEGIN, END, META, NAMES, PAGE, family_of, written
from transom.checkpoints.families.registry import FAMILIES

# A config around gemma3_text; test_text_of_a_multimodal_gemma3 compares it.
WRAPPERS = {"gemma3"}


def test_the_table_of_the_readme_is_that_of_the_tests():
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text == written(text), "run `python -m tests.checkpoints.table`"


def test_every_family_that_is_read_is_compared():
    assert set(FAMILIES) - WRAPPERS == set(map(family_of, COMPARED)) == set(NAMES)
    assert set(PARAMS) == set(META)
