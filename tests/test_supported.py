import importlib
from pathlib import Path

import pytest

from wemoe_fast.families import FAMILIES
from wemoe_fast.supported import table

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_is_up_to_date():
    regenerate = "put what `python -c 'from wemoe_fast.supported import table; print(table())'` prints into README.md"
    assert table() in README.read_text(encoding="utf-8"), regenerate


@pytest.mark.parametrize("example", [name for family in FAMILIES for name in family.examples])
def test_examples_exist(example):
    module, _, name = example.rpartition(".")
    assert hasattr(pytest.importorskip(module.partition(".")[0]) and importlib.import_module(module), name)
