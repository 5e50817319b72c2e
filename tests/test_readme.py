"""The README's walk-through does what it shows; the tests that the list of faults names are there."""

import ast
import doctest
import re
from pathlib import Path

TESTS = Path(__file__).parent
README, FAULTS = TESTS.parent / "README.md", TESTS.parent / "launch" / "FAULTS.md"


def test_the_lines_of_the_walk_through_run():
    found = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted >= 25 and found.failed == 0


def test_every_fault_that_is_listed_has_its_test():
    rows = [line for line in FAULTS.read_text().splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(rows) >= 30
    named = [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for row in rows]
    assert all(named), "a fault without a test"
    pairs = {pair for found in named for pair in found}
    assert len(pairs) >= 40
    for file, function in sorted(pairs):
        tree = ast.parse((TESTS / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, function)
