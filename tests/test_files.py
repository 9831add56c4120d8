"""Atomic writes."""

import json

import pytest

from tiger.files import atomic_path, read_json, write_json


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_is_strict(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"low": float("nan"), "all": [1.5, float("inf"), (2, "x")]})
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read_json(path) == {"low": None, "all": [1.5, None, [2, "x"]]}
