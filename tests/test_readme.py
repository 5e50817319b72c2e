"""The README's walk-through does what it shows."""

import doctest
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_lines_of_the_walk_through_run():
    found = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted >= 25 and found.failed == 0
