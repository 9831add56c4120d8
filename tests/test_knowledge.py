"""The vocabulary: parsing, composing, sampling, term classes, and the errors of a bad knowledge base."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiger.errors import InputError
from tiger.knowledge import KNOWLEDGE_DIR, Knowledge

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def thyroid() -> Knowledge:
    return Knowledge.load("thyroid")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Micro-calcifications", {"calcification": "microcalcification"}),
        ("sand-like white points", {"calcification": "microcalcification"}),
        ("MARKEDLY HYPO-ECHOIC", {"echogenicity": "markedly hypoechoic"}),
        ("extremely low echo", {"echogenicity": "markedly hypoechoic"}),
        ("wider than tall", {"aspect": "wider-than-tall"}),
        ("well\u2010defined margins", {"margin": "clear"}),
        ("unclear", {"margin": "unclear"}),
        ("irregular margin", {"margin": "irregular margin"}),
        ("irregular", {"shape": "irregular shape"}),
        ("partially cystic", {"composition": "mixed"}),
        ("no halo", {"halo": "no halo"}),
        ("sonogram transverse middle, middle", {"direction": "transverse plane", "diameter": "middle"}),
        ("less definition, more detail", {"definition": "less definition", "detail": "more detail"}),
    ],
)
def test_parse_takes_the_longest_phrase(thyroid: Knowledge, text: str, expected: dict[str, str]):
    parsed = thyroid.parse(text)
    assert parsed.attributes == expected
    assert not parsed.unknown and not parsed.contradictions


def test_parse_reads_status_and_subtype(thyroid: Knowledge):
    parsed = thyroid.parse("Malignant, papillary nodules, solid")
    assert (parsed.status, parsed.label) == ("malignant", "PTC")
    assert thyroid.parse("follicular adenoma").label == "benign"
    assert thyroid.parse("follicular variant of papillary thyroid carcinoma").label == "PTC"
    assert thyroid.parse("benign").label == "benign"
    assert thyroid.parse("malignant").label is None
    assert thyroid.parse("medullary").status == "malignant"


def test_parse_reports_what_it_cannot_take(thyroid: Knowledge):
    parsed = thyroid.parse("papillary nodule, irregular, solid, unclear, regular, pulsating, not cystic, 2.5 cm")
    assert parsed.attributes["shape"] == "irregular shape"
    assert parsed.contradictions == ["shape: 'irregular shape' and 'regular shape'"]
    assert parsed.ambiguous == ["irregular", "regular"]
    assert parsed.unknown == ["pulsating", "not cystic", "2.5 cm"]
    assert thyroid.parse("benign, medullary").contradictions == ["status: 'benign' and MTC (malignant)"]
    assert thyroid.parse("non-solid, nuclear, semisolid, smallish").attributes == {}


def test_split_separates_foreground_from_background(thyroid: Knowledge):
    fg, bg = thyroid.split("Sonogram longitudinal plane shows a benign nodule, solid, low echo; high brightness.")
    assert fg == "benign, solid, hypoechoic"
    assert bg == "sonogram longitudinal plane, high bright"


@pytest.mark.parametrize("organ", ["thyroid", "breast"])
def test_composed_prompts_parse_back(organ: str):
    knowledge, rng = Knowledge.load(organ), np.random.default_rng(0)
    for label in knowledge.subtypes:
        for _ in range(20):
            attributes = knowledge.sample(label, rng)
            text_fg, text_bg = knowledge.compose(label, attributes)
            parsed = knowledge.parse(f"{text_fg}, {text_bg}")
            assert (parsed.label, parsed.attributes) == (label, attributes)
            assert parsed.unknown == [] and parsed.contradictions == []
            assert knowledge.split(f"{text_bg}, {text_fg}") == (text_fg, text_bg)


def test_compose_refuses_unknown_words(thyroid: Knowledge):
    with pytest.raises(InputError, match="label 'XTC'"):
        thyroid.compose("XTC", {})
    with pytest.raises(InputError, match="composition 'gas'"):
        thyroid.compose("PTC", {"composition": "gas"})
    with pytest.raises(InputError, match="attribute 'colour'"):
        thyroid.compose("PTC", {"colour": "solid"})


def test_sample_follows_frequencies_and_exclusions(thyroid: Knowledge):
    rng = np.random.default_rng(0)
    draws = [thyroid.sample("benign", rng) for _ in range(1000)]
    for attributes in draws:
        assert list(attributes) == list(thyroid.categories)
        terms = set(attributes.values())
        assert not any(pair <= terms for pair in thyroid.exclusions)
    spongiform = np.mean([attributes["composition"] == "spongiform" for attributes in draws])
    assert spongiform == pytest.approx(0.12, abs=0.03)
    assert thyroid.sample("FTC", rng, mode="names") == {}
    assert thyroid.compose("FTC", {}) == ("malignant, follicular", "sonogram")


def test_particular_terms_are_commoner_in_their_rare_subtype(thyroid: Knowledge):
    common = [subtype for subtype in thyroid.subtypes.values() if not subtype.rare]
    for label, terms in (
        ("FTC", {"uneven thick halo", "extracapsular"}),
        ("MTC", {"macrocalcification", "markedly hypoechoic"}),
    ):
        subtype = thyroid.subtypes[label]
        assert subtype.particular == terms
        for term in terms:
            category = next(key for key, c in thyroid.categories.items() if term in c.terms)
            own = subtype.frequencies[category][term]
            assert all(own > 1.5 * other.frequencies[category][term] for other in common)


def test_term_classes_give_spans_and_kinds(thyroid: Knowledge):
    text = "malignant, follicular, solid, irregular margins, uneven thick halo, macrocalcification, clear"
    spans = thyroid.term_classes(text)
    assert [(text[s.start : s.end], s.term, s.kind) for s in spans] == [
        ("malignant", "malignant", "common"),
        ("follicular", "follicular", "common"),
        ("solid", "solid", "joint"),
        ("irregular margins", "irregular margin", "common"),
        ("uneven thick halo", "uneven thick halo", "particular"),
        ("macrocalcification", "macrocalcification", "common"),
        ("clear", "clear", "joint"),
    ]
    assert {span.kind for span in thyroid.term_classes("solid, uneven thick halo")} == {"common"}
    assert {span.term for span in spans} <= set(thyroid.terms)


def test_longest_prompts_fit_the_text_encoder(thyroid: Knowledge):
    from tiger.tokenizer import build_clip_tokenizer

    tokenizer = build_clip_tokenizer()
    for knowledge in (thyroid, Knowledge.load("breast")):
        longest = {
            key: max(category.terms, key=lambda term: len(tokenizer(term)["input_ids"]))
            for key, category in knowledge.categories.items()
        }
        for label in knowledge.subtypes:
            assert len(tokenizer(", ".join(knowledge.compose(label, longest)))["input_ids"]) <= 77


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{solid: 0.91, mixed: 0.07", "{solid: 0.95, mixed: 0.07", "sums to 1.04"),
        ("{solid: 0.91, mixed: 0.07", "{firm: 0.91, mixed: 0.07", "is not a term of composition"),
        ("    name: papillary\n", "", "must be a text, found nothing"),
        ("    status: malignant\n    rare: false", "    status: evil\n    rare: false", "must be one of"),
        ("      small: [mini]", "      small: [mini, large]", "'large' already means diameter 'small'"),
        ("  - [cystic, isoechoic]", "  - [cystic, solid]", "one category"),
        ("particular: [uneven thick halo", "particular: [thick halo", "is not a foreground term"),
        ("organ: thyroid", "organ: thyroid\norgan: breast", "appears twice"),
        ("organ: thyroid", "organ: [thyroid", "not valid YAML"),
        ("ignore:", "ignored:", "unknown key"),
    ],
)
def test_schema_errors_name_the_line(tmp_path: Path, old: str, new: str, message: str):
    text = (KNOWLEDGE_DIR / "thyroid.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        Knowledge.load(path)
    if "not valid YAML" not in message:
        line = int(str(error.value).removeprefix(f"{path}:").split(":")[0])
        assert line > 1
    assert "\n" not in str(error.value)


def test_unknown_knowledge_base_lists_the_known():
    with pytest.raises(InputError, match="breast, thyroid"):
        Knowledge.load("liver")


def test_light_modules_do_without_torch():
    code = (
        "import sys, tiger.config, tiger.knowledge, tiger.manifest, tiger.conditions; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
