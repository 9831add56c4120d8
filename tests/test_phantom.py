"""The phantom: exact truth, visible attributes, class tables that are what they claim, data sets that resume."""

import time
from collections import Counter

import cv2
import numpy as np
import pytest
from PIL import Image

from data import phantom
from tiger import manifest
from tiger.conditions import read_gray, sobel_map
from tiger.errors import InputError
from tiger.knowledge import Knowledge

PLAIN = {
    "composition": "solid",
    "echogenicity": "hypoechoic",
    "echotexture": "homogeneous",
    "calcification": "no calcification",
    "aspect": "round",
    "shape": "regular shape",
    "margin": "clear",
    "halo": "no halo",
    "diameter": "large",
    "location": "middle pole",
    "extension": "no extension",
    "direction": "longitudinal plane",
    "definition": "definition",
    "detail": "detail",
    "brightness": "bright",
}
REPEATS = range(12)


def renders(**changes: str) -> list[phantom.Phantom]:
    return [phantom.render(PLAIN | changes, np.random.default_rng([5, i])) for i in REPEATS]


def inside(cases: list[phantom.Phantom], statistic=np.mean) -> float:
    """Mean over images of a statistic of the nodule's grey values, away from its edge."""
    core = [cv2.erode(case.nodule, np.ones((5, 5))) > 0 for case in cases]
    return float(np.mean([statistic(case.image[mask]) for case, mask in zip(cases, core, strict=True)]))


def boxes(cases: list[phantom.Phantom]) -> np.ndarray:
    """(N, 4) x, y, width, height of each nodule."""
    return np.array([cv2.boundingRect(case.nodule) for case in cases])


def test_deterministic_and_exact_truth():
    first, again = phantom.render(PLAIN, np.random.default_rng(1)), phantom.render(PLAIN, np.random.default_rng(1))
    assert np.array_equal(first.image, again.image)
    assert first.image.shape == (128, 128) and first.image.dtype == np.uint8
    assert set(np.unique(first.nodule)) == {0, 255} and set(np.unique(first.thyroid)) == {0, 255}
    assert ((first.nodule > 0) & (first.thyroid > 0)).sum() > 0.95 * (first.nodule > 0).sum()


def test_echogenicity_orders_the_grey_levels():
    terms = ["hyperechoic", "isoechoic", "hypoechoic", "markedly hypoechoic"]
    levels = [inside(renders(echogenicity=term)) for term in terms]
    assert levels == sorted(levels, reverse=True) and min(-np.diff(levels)) > 5


def test_composition_makes_fluid():
    dark = {c: inside(renders(composition=c, echogenicity="isoechoic"), lambda v: np.mean(v < 25)) for c in
            ("solid", "mixed", "spongiform", "cystic")}  # fmt: skip
    assert dark["solid"] < 0.02 and dark["cystic"] > 0.9
    assert 0.1 < dark["mixed"] < 0.75 and 0.1 < dark["spongiform"] < 0.75


def test_echotexture_changes_the_spread():
    assert inside(renders(echotexture="heterogeneous"), np.std) > 1.3 * inside(renders(), np.std)


def test_calcifications_are_bright_and_coarse_ones_cast_shadows():
    bright = {c: inside(renders(calcification=c), np.max) for c in
              ("no calcification", "microcalcification", "macrocalcification")}  # fmt: skip
    assert bright["microcalcification"] > bright["no calcification"] + 60
    assert bright["macrocalcification"] > bright["no calcification"] + 60

    def darkest_column_below(case: phantom.Phantom) -> float:
        x, y, width, height = cv2.boundingRect(case.nodule)
        below = case.image[y + height + 2 : y + height + 14, x : x + width].astype(float)
        return float((np.median(below) - below.mean(0).min()) / (np.median(below) + 1))

    depth = {c: np.mean([darkest_column_below(case) for case in renders(calcification=c)]) for c in bright}
    assert depth["macrocalcification"] > depth["no calcification"] + 0.1


def test_geometry_follows_aspect_diameter_shape_and_margin():
    ratio = {a: np.mean(boxes(renders(aspect=a))[:, 2] / boxes(renders(aspect=a))[:, 3]) for a in
             ("wider-than-tall", "round", "taller-than-wide")}  # fmt: skip
    assert ratio["wider-than-tall"] > 1.4 and 0.9 < ratio["round"] < 1.1 and ratio["taller-than-wide"] < 0.72
    area = [np.mean([(case.nodule > 0).sum() for case in renders(diameter=d)]) for d in
            ("small", "middle", "large", "enormous")]  # fmt: skip
    assert area == sorted(area) and min(np.array(area[1:]) / area[:-1]) > 1.5

    def roughness(case: phantom.Phantom) -> float:  # perimeter² / area, 4π for a circle
        contours, _ = cv2.findContours(case.nodule, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        return cv2.arcLength(contours[0], True) ** 2 / cv2.contourArea(contours[0])

    smooth = np.mean([roughness(case) for case in renders()])
    for changed in ({"shape": "irregular shape"}, {"margin": "irregular margin"}, {"margin": "extracapsular"}):
        assert np.mean([roughness(case) for case in renders(**changed)]) > 1.1 * smooth


def test_margin_and_halo_change_the_rim():
    def ring(case: phantom.Phantom, inner: int, outer: int) -> float:
        distance = cv2.distanceTransform(255 - case.nodule, cv2.DIST_L2, 5)
        return float(case.image[(distance > inner) & (distance <= outer) & (case.thyroid > 0)].mean())

    halo = np.mean([ring(case, 0, 4) - ring(case, 7, 12) for case in renders(halo="uneven thick halo")])
    none = np.mean([ring(case, 0, 4) - ring(case, 7, 12) for case in renders()])
    assert halo < none - 25


def test_location_and_extension():
    thirds = {"upper pole": 0, "middle pole": 1, "inferior pole": 2}
    for term, third in thirds.items():
        for case in renders(location=term, diameter="small"):
            x, _, width, _ = cv2.boundingRect(case.thyroid)
            centre = np.nonzero(case.nodule)[1].mean()
            assert abs((centre - x) / width * 3 - third - 0.5) < 0.6
    outside = [((case.nodule > 0) & (case.thyroid == 0)).sum() for case in renders(extension="extension")]
    assert np.mean(np.array(outside) > 0) > 0.8
    assert sum(((case.nodule > 0) & (case.thyroid == 0)).sum() for case in renders()) < 0.2 * sum(outside)


def test_view_terms_change_the_image():
    grey = [
        np.mean([case.image.mean() for case in renders(brightness=b)]) for b in ("low bright", "bright", "high bright")
    ]
    assert min(np.diff(grey)) > 8

    def grain(case: phantom.Phantom) -> float:
        image = case.image.astype(np.float32)
        return float((image - cv2.GaussianBlur(image, (0, 0), 2))[case.thyroid > 0].std())

    detail = [np.mean([grain(case) for case in renders(detail=d)]) for d in ("less detail", "detail", "more detail")]
    assert detail == sorted(detail) and detail[2] > 1.5 * detail[0]

    def sharpness(case: phantom.Phantom) -> float:
        image = case.image.astype(np.float32)
        fine = (image - cv2.GaussianBlur(image, (0, 0), 0.8))[case.thyroid > 0].std()
        return float(fine / grain(case))

    definition = [np.mean([sharpness(case) for case in renders(definition=d)]) for d in
                  ("less definition", "definition", "more definition")]  # fmt: skip
    assert definition == sorted(definition)


def test_class_tables_are_distributions_and_rare_classes_own_their_terms():
    knowledge = Knowledge.load("thyroid")
    for label, tables in phantom.CLASS_ATTRIBUTES.items():
        for category, table in tables.items():
            assert sum(table.values()) == pytest.approx(1), (label, category)
            assert set(table) == set(knowledge.categories[category].terms)
    for label in ("FTC", "MTC"):
        for term in knowledge.subtypes[label].particular:
            category = next(c for c, t in phantom.CLASS_ATTRIBUTES[label].items() if term in t)
            others = [phantom.CLASS_ATTRIBUTES[other][category][term] for other in ("benign", "PTC")]
            assert phantom.CLASS_ATTRIBUTES[label][category][term] > 0.4 and max(others) <= 0.03


def test_knowledge_base_is_not_the_generators_own_table():
    """Prompts for rare classes come from the knowledge base; a copy of the truth there would beg the question."""
    knowledge = Knowledge.load("thyroid")
    for label in ("FTC", "MTC"):
        truth, believed = phantom.CLASS_ATTRIBUTES[label], knowledge.subtypes[label].frequencies
        gap = [abs(believed[c].get(t, 0.0) - p) for c, table in truth.items() for t, p in table.items()]
        assert np.mean(gap) > 0.03


def test_common_preset_holds_no_rare_subtype_and_no_particular_term():
    subtypes = Knowledge.load("thyroid").subtypes
    particular = frozenset[str]().union(*(subtypes[label].particular for label in ("FTC", "MTC")))
    assert len(particular) >= 4
    cases = phantom.plan(4000, 0, "common", particular)
    assert {case.label for case in cases} == {"benign", "PTC"}
    assert not {term for case in cases for term in case.attributes.values()} & particular


@pytest.mark.parametrize("preset", ["longtail", "study"])
def test_a_plan_with_rare_classes(preset):
    cases = phantom.plan(1200, 0, preset, frozenset())
    train = Counter(case.label for case in cases if case.split == "train")
    test = Counter(case.label for case in cases if case.split == "test")
    assert train["benign"] > 8 * train["FTC"] and train["FTC"] >= 20 and len(set(test.values())) == 1
    splits = {}
    for case in cases:
        assert splits.setdefault(case.patient_id, case.split) == case.split
    assert 1.5 < len(cases) / len(splits) < 3.5


def test_write_dataset_makes_a_valid_manifest_and_resumes(tmp_path):
    written = phantom.write_dataset(tmp_path / "d", count=12, seed=3, workers=1)
    data = manifest.read(tmp_path / "d")
    assert written == data
    manifest.check(data, conditions=True)
    image, mask, edges = (read_gray(data.file(data.rows[0], c)) for c in ("file_name", "condition_fg", "condition_bg"))
    assert np.array_equal(edges, sobel_map(image)) and edges[mask > 0].any()  # whole maps; training blanks them
    before = {p: p.read_bytes() for p in (tmp_path / "d").rglob("*.png")}
    gone, kept = data.file(data.rows[0], "file_name"), data.file(data.rows[1], "file_name")
    gone.unlink()
    stamp = kept.stat().st_mtime_ns
    phantom.write_dataset(tmp_path / "d", count=12, seed=3, workers=1)
    assert {p: p.read_bytes() for p in (tmp_path / "d").rglob("*.png")} == before
    assert kept.stat().st_mtime_ns == stamp
    assert Image.open(gone).mode == "L"


def test_a_folder_with_another_data_set_is_refused(tmp_path):
    phantom.write_dataset(tmp_path, count=2, seed=3, size=32, workers=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="--seed was 3, is 4, --count was 2, is 6, --size was 32, is 64"):
        phantom.write_dataset(tmp_path, count=6, seed=4, size=64, workers=1)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "phantom.json").unlink()
    with pytest.raises(InputError, match="without phantom.json"):
        phantom.write_dataset(tmp_path, count=2, seed=3, size=32, workers=1)


@pytest.mark.parametrize(("count", "preset"), [(0, "longtail"), (5, "nonesuch")])
def test_bad_arguments(tmp_path, count, preset):
    with pytest.raises(InputError, match="--count|--preset"):
        phantom.write_dataset(tmp_path, count, 0, preset)


@pytest.mark.slow
def test_rate():
    """At least 25 images a second on one core at 128 pixels; benchmarks/RESULTS.md records the figure."""
    cv2.setNumThreads(1)
    start = time.perf_counter()
    for i in range(50):
        phantom.render(PLAIN, np.random.default_rng(i))
    assert 50 / (time.perf_counter() - start) > 25
