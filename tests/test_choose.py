"""A name and its options: what is let through, and the sentence for each thing that is not."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, Literal, Optional

import numpy as np
import pytest

from kd_dist.choose import check_options, describe, entry, fits, hint, imported
from kd_dist.errors import RecipeError

TABLE = {"linear": 1, "cosine": 2, "step": 3}


# ---------------------------------------------------------------------------------------------------- names in tables


def test_entry_is_the_row_of_the_table():
    assert [entry(TABLE, "schedule", name) for name in TABLE] == [1, 2, 3]


@pytest.mark.parametrize(
    "name, message",
    [
        ("cosin", "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ("zzz", "unknown schedule 'zzz'; known: cosine, linear, step"),
        ("Linear", "unknown schedule 'Linear'; did you mean 'linear'?"),
        (3, "unknown schedule '3'; known: cosine, linear, step"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(name, message):
    with pytest.raises(RecipeError) as caught:
        entry(TABLE, "schedule", name)
    assert str(caught.value) == message


def test_a_hint_among_nothing_is_empty():
    assert hint("anything", []) == ""
    assert hint("anything", iter(["zebra", "apple"])) == "; known: apple, zebra"


# --------------------------------------------------------------------------------------------------- the user's code


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    """A folder of user code on the path, as a run from that folder has it. Returns a function that writes a module."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    return write


def test_a_factory_of_the_users_own_is_imported(user_code):
    user_code("choose_user_nets", "def tiny(width):\n    return width * 2\n")
    assert imported("choose_user_nets:tiny")(4) == 8


@pytest.mark.parametrize(
    "path, message",
    [
        ("choose_nowhere:f", "'choose_nowhere:f': no module 'choose_nowhere' can be imported; run from the folder"),
        ("choose_user:tinny", "'choose_user:tinny': module 'choose_user' has no 'tinny'; did you mean 'tiny'?"),
        ("choose_user:zzz", "'choose_user:zzz': module 'choose_user' has no 'zzz'; known: WIDTH, tiny"),
        ("choose_user:WIDTH", "'choose_user:WIDTH': 'WIDTH' is not a function or class that could be called"),
        ("choose_user_broken:f", "'choose_user_broken:f': no module 'choose_missing_part' can be imported"),
    ],
)
def test_what_cannot_be_imported_is_refused(user_code, path, message):
    user_code("choose_user", "WIDTH = 3\n_hidden = 1\ndef tiny():\n    pass\n")
    user_code("choose_user_broken", "import choose_missing_part\n")
    with pytest.raises(RecipeError) as caught:
        imported(path)
    assert str(caught.value).startswith(message)


def test_an_error_inside_the_users_module_is_not_hidden(user_code):
    user_code("choose_user_faulty", "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        imported("choose_user_faulty:f")


# ------------------------------------------------------------------------------------------------------------ options


def build(image: np.ndarray, width: int, *, scale: float = 1.0, mode: Literal["a", "b"] = "a", tag: str | None = None):
    return image, width, scale, mode, tag


class Net:
    width: str  # an attribute of the class: not the parameter of the same name

    def __init__(self, width: int, scale: float = 1.0):
        self.width = str(width * scale)


def open_ended(first: int, **others: Any):
    return first, others


def untyped(first, second=2):
    return first, second


SOUND = [
    (build, {"width": 3}, ["image"]),
    (build, {"width": 3, "scale": 2, "mode": "b", "tag": None}, ["image"]),
    (build, {"width": 3, "tag": "x"}, ["image"]),
    (build, {"scale": 2}, ["width", "image"]),
    (Net, {"width": 3, "scale": 0.5}, []),
    (functools.partial(Net, 3), {"scale": 0.5}, []),
    (open_ended, {"first": 1, "anything": "goes"}, []),
    (untyped, {"first": "text"}, []),
    (untyped, {"second": [1]}, ["first"]),
]


@pytest.mark.parametrize("function, options, given", SOUND)
def test_options_that_pass_can_be_called(function, options, given):
    check_options(function, options, given=iter(given))
    function(**options, **dict.fromkeys(given))


WRONG = [
    (build, {}, "option 'width' is missing"),
    (build, {"widht": 3}, "unknown option 'widht'; did you mean 'width'?"),
    (build, {"width": 3, "zzz": 1}, "unknown option 'zzz'; known: beside_it, mode, scale, tag, width"),
    (build, {"width": 3, "besideit": 1}, "unknown option 'besideit'; did you mean 'beside_it'?"),
    (build, {"width": 3, "image": 1}, "unknown option 'image'; known: beside_it, mode, scale, tag, width"),
    (build, {"width": 3, 4: 1}, "unknown option '4'; known: beside_it, mode, scale, tag, width"),
    (build, {"width": 3.5}, "option 'width' must be a whole number, not 3.5"),
    (build, {"width": True}, "option 'width' must be a whole number, not True"),
    (build, {"width": 3, "scale": "wide"}, "option 'scale' must be a number, not 'wide'"),
    (build, {"width": 3, "mode": "c"}, "option 'mode' must be one of 'a', 'b', not 'c'"),
    (build, {"width": 3, "tag": 5}, "option 'tag' must be a text or null, not 5"),
    (Net, {"width": "3"}, "option 'width' must be a whole number, not '3'"),
    (Net, {"scale": 1.0}, "option 'width' is missing"),
    (functools.partial(Net, 3), {"scale": "x"}, "option 'scale' must be a number, not 'x'"),
    (open_ended, {"first": 1, "image": 2}, "unknown option 'image'; known: beside_it, first"),
]


@pytest.mark.parametrize("function, options, message", WRONG, ids=[message for _, _, message in WRONG])
def test_options_that_could_not_be_called_are_refused(function, options, message):
    with pytest.raises(RecipeError) as caught:
        check_options(function, options, given=["image"], beside=["beside_it"])
    assert str(caught.value) == message


def test_what_the_caller_reads_itself_is_let_through_unchecked():
    check_options(build, {"width": 3, "weight": object()}, given=["image"], beside=["weight"])


def test_annotations_written_as_text_are_read(user_code):
    user_code("choose_user_text", "from __future__ import annotations\ndef f(width: int = 3):\n    pass\n")
    with pytest.raises(RecipeError, match="option 'width' must be a whole number, not 'x'"):
        check_options(imported("choose_user_text:f"), {"width": "x"})


def test_annotations_for_type_checkers_only_are_not_checked(user_code):
    text = "from __future__ import annotations\ndef f(net: SomewhereElse, width: int = 3):\n    pass\n"
    user_code("choose_user_checkers", text)
    function = imported("choose_user_checkers:f")
    check_options(function, {"net": "x"})
    with pytest.raises(RecipeError, match="unknown option 'wdth'; did you mean 'width'?"):
        check_options(function, {"net": "x", "wdth": 2})


# -------------------------------------------------------------------------------------------------------------- types


FITS = [
    (int, [0, -3, 10**30], [1.0, True, "1", None, []], "a whole number"),
    (float, [0, 1.5, float("inf")], [False, "1.5", None], "a number"),
    (bool, [True, False], [0, 1, "true", None], "true or false"),
    (str, ["", "x"], [1, None, ["x"]], "a text"),
    (type(None), [None], [0, ""], "null"),
    (dict, [{}, {"a": 1}], [[], "a", None], "a mapping"),
    (list, [[], [1, "x"], (1,)], [1, "x", None, {}], "a list"),
    (tuple, [[], [1, "x"], (1,)], [1, "x", None, {}], "a list"),
    (list[int], [[], [1, 2], (1,)], [1, [1.5], ["x"], [True], "12", None], "a list, each a whole number"),
    (tuple[int, int], [[1, 2], (1, 2)], [[1], [1, 2, 3], [1, "x"], 1], "a list of 2 (a whole number, a whole number)"),
    (tuple[float, ...], [[], [1, 2.5]], [["x"], 1.0], "a list, each a number"),
    (int | None, [3, None], [1.5, "x"], "a whole number or null"),
    (Optional[float], [3, None], ["x"], "a number or null"),  # noqa: UP045 - the other spelling of it
    (int | tuple[int, int], [3, [3, 4]], [[3], "x"], "a whole number or a list of 2 (a whole number, a whole number)"),
    (Literal["a", 1], ["a", 1], ["b", True, 1.0, None, ["a"]], "one of 'a', 1"),
    (list[Literal["a"] | None], [["a", None]], [["b"], "a"], "a list, each one of 'a' or null"),
]


@pytest.mark.parametrize("wanted, good, bad, words", FITS, ids=str)
def test_fits_and_describe(wanted, good, bad, words):
    assert [value for value in good if not fits(value, wanted)] == []
    assert [value for value in bad if fits(value, wanted)] == []
    assert describe(wanted) == words


@pytest.mark.parametrize("wanted", [Any, np.ndarray, Sequence[int], "Forward", inspect.Parameter.empty], ids=str)
def test_a_type_that_yaml_cannot_write_is_let_through(wanted):
    assert all(fits(value, wanted) for value in (1, "x", None, [1], {"a": 1}))
