"""The vocabulary: parsing, composing, sampling, term classes, and the errors of a bad knowledge base."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tiger.errors import InputError
from tiger.knowledge import KNOWLEDGE_DIR, Knowledge

ROOT = Path(__file__).resolve().parents[1]
ORGANS = ("thyroid", "breast", "chest_xray", "skin")


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


@pytest.mark.parametrize(
    ("text", "attributes", "unknown"),
    [
        ("no evidence of halo, solid", {"composition": "solid", "halo": "no halo"}, []),
        ("No microcalcification, swelling or extrathyroidal extension.",
         {"calcification": "no calcification", "extension": "no extension"}, ["swelling"]),
        ("macrocalcification is not seen", {"calcification": "no calcification"}, []),
        ("not cystic or spongiform, solid", {"composition": "solid"}, ["not cystic or spongiform"]),
        ("no calcification, solid or not", {"calcification": "no calcification", "composition": "solid"}, ["not"]),
        ("without any extrathyroidal extension but microcalcification",
         {"extension": "no extension", "calcification": "microcalcification"}, ["but"]),
        ("semi-solid, solid-ish, 'hypoechoic'", {"echogenicity": "hypoechoic"}, ["semi-solid", "solid-ish"]),
        ("solid/cystic masses", {"composition": "mixed"}, []),
    ],
)  # fmt: skip
def test_parse_understands_negation(thyroid: Knowledge, text: str, attributes: dict[str, str], unknown: list[str]):
    parsed = thyroid.parse(text)
    assert (parsed.attributes, parsed.unknown, parsed.contradictions) == (attributes, unknown, [])


def test_absent_findings_are_no_attributes():
    chest = Knowledge.load("chest_xray")
    parsed = chest.parse("No pleural effusion, pneumothorax or consolidation. Cardiomegaly. Bilateral opacities.")
    assert parsed.attributes == {"opacity": "lung opacity", "heart size": "cardiomegaly"}
    assert parsed.absent == ["pleural effusion", "pneumothorax", "consolidation"]
    assert parsed.unknown == [] and parsed.contradictions == []
    assert chest.term_classes("no consolidation") == ()
    denied = chest.parse("consolidation. no consolidation")
    assert denied.contradictions == ["consolidation: 'consolidation' and its negation"]
    assert [span.term for span in chest.term_classes("abnormal, pneumonia, no edema, consolidation")] == [
        "abnormal", "pneumonia", "consolidation",
    ]  # fmt: skip


# Findings and diseases as VinDr-PCXR spells them, and CheXpert's; each must be known.
VINDR_PCXR = """
Boot-shaped heart, Peribronchovascular interstitial opacity, Reticulonodular opacity, Bronchial thickening,
Enlarged PA, Cardiomegaly, Diffuse aveolar opacity, Other opacity, Other lesion, Consolidation, Mediastinal
shift, Anterior mediastinal mass, Dextro cardia, Pleural effusion, Stomach on the right side, Atelectasis,
Lung hyperinflation, Egg on string sign, Interstitial lung disease - ILD, Infiltration, Lung cavity,
Pneumothorax, Edema, Pleural thickening, Other nodule/mass, Clavicle fracture, Chest wall mass, Lung cyst,
Emphysema, Bronchectasis, Expanded edges of the anterior ribs, Pulmonary fibrosis, Paraveterbral mass, Aortic
enlargement, Calcification, Intrathoracic digestive structure
"""
CHEXPERT = """
Enlarged Cardiomediastinum, Cardiomegaly, Lung Opacity, Lung Lesion, Edema, Consolidation, Atelectasis,
Pneumothorax, Pleural Effusion, Pleural Other, Fracture, Support Devices
"""


def test_published_findings_are_known():
    chest, skin = Knowledge.load("chest_xray"), Knowledge.load("skin")
    names = [" ".join(name.split()) for name in f"{VINDR_PCXR}, {CHEXPERT}".split(",")]
    assert len(names) == 36 + 12
    for name in names:
        parsed = chest.parse(name)
        assert (len(parsed.attributes), parsed.unknown) == (1, []), name
    labels = {
        name: chest.parse(name).label for name in ("Bronchitis", "Brocho-pneumonia", "Bronchiolitis", "Pneumonia")
    }
    assert list(labels.values()) == ["bronchitis", "broncho-pneumonia", "bronchiolitis", "pneumonia"]
    assert chest.parse("No Finding").label == "normal"
    assert [skin.parse(name).label for name in ("MEL", "NV", "BCC", "AK", "AKIEC", "BKL", "DF", "VASC", "SCC")] == [
        "MEL", "NV", "BCC", "AK", "AK", "BKL", "DF", "VASC", "SCC",
    ]  # fmt: skip


@pytest.mark.parametrize("organ", ORGANS)
def test_no_draw_is_impossible_or_too_long(organ: str):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ROOT / "assets" / "tiny-base" / "tokenizer" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    knowledge, rng = Knowledge.load(organ), np.random.default_rng(0)
    longest = 0
    for label, subtype in knowledge.subtypes.items():
        for _ in range(300):
            attributes = knowledge.sample(label, rng)
            assert knowledge.impossible(attributes) == []
            for key, row in subtype.frequencies.items():
                assert (
                    attributes.get(key) in row if key in attributes else knowledge.categories[key].optional or not row
                )
                assert key not in attributes or row[attributes[key]] > 0
            longest = max(longest, len(tokenizer.encode(", ".join(knowledge.compose(label, attributes))).ids))
    assert longest <= 77


def test_optional_findings_are_drawn_as_often_as_they_are_seen():
    chest, rng = Knowledge.load("chest_xray"), np.random.default_rng(0)
    draws = [chest.sample("pneumonia", rng) for _ in range(1000)]
    assert np.mean(["consolidation" in draw for draw in draws]) == pytest.approx(0.62, abs=0.05)
    assert not any("ribs" in draw for draw in draws)
    assert {draw["view"] for draw in draws} == {"posteroanterior view"}


NEW_ORGAN = """
organ: knee
background: x-ray
status: {normal: [], abnormal: []}
categories:
  gap: {role: fg, terms: {wide gap: [], narrow gap: [joint space narrowing]}}
  spurs: {role: fg, optional: true, terms: {bone spurs: [osteophyte]}}
subtypes:
  arthrosis:
    name: arthrosis
    status: abnormal
    rare: false
    frequencies: {gap: {wide gap: 0.2, narrow gap: 0.8}, spurs: {bone spurs: 0.7}}
    sources: [{claim: made up for this test, reference: none, about: [gap, spurs], uncertain: true}]
"""


def test_a_new_organ_is_a_new_file(tmp_path: Path):
    path = tmp_path / "knee.yaml"
    path.write_text(NEW_ORGAN, encoding="utf-8")
    knee = Knowledge.load(path)
    assert knee.parse("Osteophytes and joint-space narrowing").attributes == {
        "gap": "narrow gap",
        "spurs": "bone spurs",
    }
    text_fg, text_bg = knee.compose("arthrosis", {"gap": "narrow gap"})
    assert (text_fg, text_bg) == ("abnormal, arthrosis, narrow gap", "x-ray")
    assert knee.sample("arthrosis", np.random.default_rng(0)).keys() >= {"gap"}
    assert (knee.placement.location, knee.placement.traits) == (None, ())


@pytest.mark.parametrize("organ", ORGANS)
def test_every_frequency_has_a_source(organ: str):
    knowledge = Knowledge.load(organ)
    for label, subtype in knowledge.subtypes.items():
        for source in subtype.sources:
            assert source.claim and source.reference and source.about
            assert source.uncertain or not source.reference.startswith("judgement"), f"{label}: {source}"


def test_placement_names_what_masks_show(thyroid: Knowledge):
    assert thyroid.placement.parts == ("upper pole", "middle pole", "inferior pole")
    assert thyroid.placement.axis == {"longitudinal": "horizontal", "transverse": "horizontal"}
    assert thyroid.placement.traits == ("diameter", "aspect", "shape", "margin")
    assert Knowledge.load("chest_xray").placement.parts == ()


@pytest.mark.parametrize("organ", ORGANS)
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
    with pytest.raises(InputError, match="label 'XTC'.*--knowledge"):
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


def test_emphasis_raises_what_sets_a_rare_subtype_apart(thyroid: Knowledge):
    """By hand: FTC has a thick halo in .38, none in .45 and an intermittent one in .17; the common two have these in a
    mean of .03, .78 and .19."""
    raw = np.array([0.45 * (0.45 / 0.78) ** 0.5, 0.17 * (0.17 / 0.19) ** 0.5, 0.38 * (0.38 / 0.03) ** 0.5])
    raised = thyroid.emphasised("FTC", "halo", 0.5)
    assert list(raised.values()) == pytest.approx(list(raw / raw.sum()))
    atc, plain = thyroid.emphasised("ATC", "diameter", 0.5), thyroid.subtypes["ATC"].frequencies["diameter"]
    assert atc["enormous"] > plain["enormous"] and atc["large"] < plain["large"]  # the highest ratio gains most
    assert thyroid.emphasised("FTC", "halo", 0) == thyroid.subtypes["FTC"].frequencies["halo"]
    assert thyroid.emphasised("PTC", "halo", 0.5) == thyroid.subtypes["PTC"].frequencies["halo"]
    assert thyroid.emphasised("FTC", "direction", 0.5) == pytest.approx(thyroid.emphasised("FTC", "direction", 0))
    rng = np.random.default_rng(0)
    draws = [thyroid.sample("FTC", rng, emphasis=0.5) for _ in range(1000)]
    assert not any(thyroid.impossible(attributes) for attributes in draws)
    thick = np.mean([attributes["halo"] == "uneven thick halo" for attributes in draws])
    assert thick == pytest.approx(raised["uneven thick halo"], abs=0.04)


def test_emphasis_counts_what_goes_unsaid(tmp_path: Path):
    """Spurs are seen in .7 of ruptures and .1 of arthroses: (.7 / .1)^1 against (.3 / .9)^1 for none."""
    path = tmp_path / "knee.yaml"
    row = "{gap: {wide gap: 0.2, narrow gap: 0.8}, spurs: {bone spurs: 0.1}}"
    head, common = NEW_ORGAN.replace("{gap: {wide gap: 0.2, narrow gap: 0.8}, spurs: {bone spurs: 0.7}}", row).split(
        "subtypes:\n"
    )
    rare = common.replace("arthrosis", "rupture").replace("rare: false", "rare: true").replace("0.1}}", "0.7}}")
    path.write_text(f"{head}subtypes:\n{common}{rare}", encoding="utf-8")
    raised = Knowledge.load(path).emphasised("rupture", "spurs", 1)
    assert raised == pytest.approx({"bone spurs": 4.9 / (4.9 + 0.1)})
    path.write_text(f"{head}subtypes:\n{rare}", encoding="utf-8")
    assert Knowledge.load(path).emphasised("rupture", "spurs", 1) == {"bone spurs": 0.7}


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


# What is in the line that an error names, where that is not the line that was changed.
ELSEWHERE = {
    "must be a text, found nothing": "PTC:",
    "'large' already means diameter 'small'": "large: [",
    "has no source: name it under `about`": "location: {",
    "must be the terms of the location": "parts: [",
    "leave no likely echogenicity for a benign that is cystic": "exclusions:",
}


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
        ("        about: [location]", "        about: [place]", "'place' is not a category"),
        ("        about: [location]", "        about: [margin]", "has no source: name it under `about`"),
        ("        reference: judgement\n", "        referenc: judgement\n", "unknown key"),
        ("  location: location", "  location: direction", "must be the terms of the location"),
        ("longitudinal: horizontal", "longitudinal: diagonal", "must be horizontal or vertical"),
        ("  extension: extension   #", "  extension: growth   #", "'growth' is not a term"),
        (
            "  - [cystic, isoechoic]",
            "  - [cystic, hypoechoic]\n  - [cystic, isoechoic]\n  - [cystic, markedly hypoechoic]",
            "leave no likely echogenicity for a benign that is cystic",
        ),
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
        told = path.read_text(encoding="utf-8").splitlines()[line - 1]
        if message in ELSEWHERE:
            assert ELSEWHERE[message] in told
        else:
            assert new.strip() in told or told.strip() in new
    assert "\n" not in str(error.value)


def test_a_schema_error_names_the_very_line(tmp_path: Path):
    text = (KNOWLEDGE_DIR / "thyroid.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "echotexture: {homogeneous: 0.28" in line)
    lines[number - 1] = lines[number - 1].replace("0.28", "1.28")
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(
        InputError, match=rf"mine.yaml:{number}: subtypes.FTC.frequencies.echotexture.homogeneous: must"
    ):
        Knowledge.load(path)


def test_terms_that_only_together_leave_no_way_on_are_found(tmp_path: Path):
    tree = yaml.safe_load(NEW_ORGAN)
    tree["categories"] = {
        "a": {"role": "fg", "terms": {"a1": [], "a2": []}}, "b": {"role": "fg", "terms": {"b1": [], "b2": []}},
        "c": {"role": "fg", "terms": {"c1": [], "c2": []}},
    }  # fmt: skip
    tree["exclusions"] = [["a1", "c1"], ["b1", "c2"]]
    arthrosis = tree["subtypes"]["arthrosis"]
    arthrosis["frequencies"] = {key: {f"{key}1": 0.5, f"{key}2": 0.5} for key in "abc"}
    arthrosis["sources"][0]["about"] = ["a", "b", "c"]
    path = tmp_path / "knee.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    with pytest.raises(InputError, match="leave no likely c for a arthrosis that is a1 and b1"):
        Knowledge.load(path)
    tree["exclusions"].append(["a1", "b1"])  # now the two never meet
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    Knowledge.load(path)


def test_unknown_knowledge_base_lists_the_known():
    with pytest.raises(InputError, match="breast, chest_xray, skin, thyroid"):
        Knowledge.load("liver")


def test_light_modules_do_without_torch():
    code = (
        "import sys, tiger.config, tiger.knowledge, tiger.manifest, tiger.conditions; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
