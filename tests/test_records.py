"""The JSON beside the input of an example."""

import json

import pytest

from kd_dist.errors import DataError
from kd_dist.tasks.records import encoded, label_in, naming


def test_a_record_and_its_label():
    members = encoded({"label": [0.5, -1], "metadata": {"name": "ä"}})
    assert members == {"json": b'{"label":[0.5,-1],"metadata":{"name":"\\u00e4"}}'}
    assert json.loads(members["json"])["metadata"]["name"] == "ä"
    assert label_in(members) == [0.5, -1] and label_in(encoded({"label": None})) is None


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"png": b""}, "it has no json member, only png"),
        ({}, "it has no json member, only nothing"),
        ({"json": b"[]"}, "its json member has no 'label'"),
        ({"json": b"{}"}, "its json member has no 'label'"),
    ],
)
def test_a_record_without_a_label(members, problem):
    with pytest.raises(DataError, match=f"^{problem}$"):
        label_in(members)


def test_an_error_names_the_example():
    for error in (DataError("it is odd"), ValueError("it is odd")):
        with (
            pytest.raises(DataError, match="^example 'a/b': it is odd; correct the source and pack again$"),
            naming("a/b"),
        ):
            raise error
