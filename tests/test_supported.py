from pathlib import Path

import pytest
from family_models import HUGGING_FACE, OTHERS

from wemoe_fast.families import FAMILIES
from wemoe_fast.supported import table

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_is_up_to_date():
    regenerate = "put what `python -c 'from wemoe_fast.supported import table; print(table())'` prints into README.md"
    assert table() in README.read_text(encoding="utf-8"), regenerate


EXAMPLES = [name for family in FAMILIES for name in family.examples if not name.startswith("torch.")]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_tested(example):
    package, _, name = example.rpartition(".")
    tested = {cls for cls, _ in HUGGING_FACE.values()} if package == "transformers" else set(OTHERS)
    assert (name if package == "transformers" else package.partition(".")[0]) in tested
