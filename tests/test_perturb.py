"""Changed frequencies: still a knowledge base, and changed by no more than asked for."""

import pytest

from benchmarks import perturb
from tiger.errors import InputError
from tiger.knowledge import Knowledge


def test_frequencies_change_by_no_more_than_asked_and_the_file_stays_valid(tmp_path):
    perturb.main(["--by", "0.3", "--seed", "1", str(tmp_path / "changed.yaml")])
    before, after = Knowledge.load("thyroid"), Knowledge.load(tmp_path / "changed.yaml")
    assert before.terms == after.terms
    ratios = [
        after.subtypes[label].frequencies[category][term] / value
        for label, subtype in before.subtypes.items()
        for category, table in subtype.frequencies.items()
        for term, value in table.items()
        if value
    ]
    assert 0.7 / 1.3 <= min(ratios) < 0.8 and 1.2 < max(ratios) <= 1.3 / 0.7
    for subtype in after.subtypes.values():
        assert sum(subtype.frequencies["echogenicity"].values()) == pytest.approx(1)


def test_other_seeds_change_it_otherwise_and_by_0_nothing(tmp_path):
    for name, flags in {"a": ["--seed", "1"], "b": ["--seed", "2"], "c": ["--by", "0"]}.items():
        perturb.main([*flags, str(tmp_path / f"{name}.yaml")])
    a, b, c = (Knowledge.load(tmp_path / f"{name}.yaml").subtypes["FTC"].frequencies for name in "abc")
    assert a != b
    table = Knowledge.load("thyroid").subtypes["FTC"].frequencies
    assert {term: pytest.approx(value) for term, value in table["halo"].items()} == c["halo"]


def test_more_than_all_is_refused(tmp_path):
    with pytest.raises(InputError, match="--by 1.0"):
        perturb.main(["--by", "1", str(tmp_path / "a.yaml")])
    assert not list(tmp_path.iterdir())
