"""Reading images, the Sobel recipe against the published maps, and mask placement."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tiger import conditions
from tiger.conditions import POLES, centroid, extend_mask, place_mask, pole_bounds, read_gray, read_mask, vary_mask
from tiger.errors import InputError

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiger_thyroid"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the published samples are not here")


def ellipse(size: int, center: tuple[int, int], axes: tuple[int, int], angle: float = 0) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    cv2.ellipse(mask, center, axes, angle, 0, 360, 255, -1)
    return mask


ORGAN = ellipse(128, (66, 60), (56, 24), 4)


@needs_samples
def test_sobel_recipe_reproduces_the_published_maps():
    correlations = []
    for path in sorted((SAMPLES / "init_image").glob("*.[pj]*g")):
        published = read_gray(SAMPLES / "condition_BG" / f"{path.stem}.png")
        made = conditions.sobel_map(read_gray(path))
        correlations.append(np.corrcoef(made.ravel(), published.ravel())[0, 1])
        assert np.abs(made.astype(int) - published).mean() < 4
    assert len(correlations) == 7
    assert sum(r >= 0.99 for r in correlations) >= 4, correlations


def test_sobel_map_of_a_step():
    image = np.zeros((40, 40), np.uint8)
    image[:, 20:] = 40
    edges = conditions.sobel_map(image)
    assert edges.dtype == np.uint8
    assert edges[:, :8].max() == 0 and edges[:, 32:].max() == 0
    # a vertical step of 40 has summed |Sobel| 8 * 40 a row, spread over the 7 columns of the box by the same sum
    assert edges[20].astype(float).sum() == pytest.approx(1.5 * 8 * 40, rel=0.02)
    assert conditions.sobel_map(np.full((9, 9), 200, np.uint8)).max() == 0


def test_blank_nodule_zeroes_the_inside_and_a_rim_of_a_twentieth_of_the_side():
    edges = np.full((100, 100), 9, np.uint8)
    mask = ellipse(100, (50, 40), (20, 20))
    blanked = conditions.blank_nodule(edges, mask)
    distance = np.hypot(*(np.mgrid[:100, :100] - np.array([40, 50])[:, None, None]))
    assert blanked[distance < 24.5].max() == 0
    assert blanked[distance > 26].min() == 9
    assert edges.min() == 9


def test_remove_nodule_leaves_neither_hole_nor_outline_and_keeps_the_organs_edge():
    organ, mask = np.zeros((96, 96), np.uint8), np.zeros((96, 96), np.uint8)
    cv2.ellipse(organ, (48, 48), (40, 24), 0, 0, 360, 255, -1)
    cv2.circle(mask, (48, 38), 11, 255, -1)  # 3 px below the organ's upper edge
    image = 40 + organ // 4 + mask // 5
    removed = conditions.remove_nodule(conditions.sobel_map(image), mask, organ)
    assert np.ptp(removed[mask > 0]) == 0
    lower_rim = (slice(48, 56), slice(40, 56))  # well inside the organ
    assert removed[lower_rim].max() < 0.2 * conditions.sobel_map(image)[lower_rim].max()
    upper_edge = (slice(16, 26), slice(40, 56))
    assert np.array_equal(removed[upper_edge], conditions.sobel_map(image)[upper_edge])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
def test_read_gray_takes_every_mode(tmp_path: Path, mode: str):
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (8, 1))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(ramp).convert(mode).save(path)
    gray = read_gray(path)
    assert gray.shape == (8, 16) and gray.dtype == np.uint8
    if mode != "1":
        assert np.abs(gray.astype(int) - ramp).max() <= 3


def test_no_deep_image_is_scaled_by_its_own_brightest(tmp_path: Path):
    """A dim image of 12 bits beside a bright one stays dim; read alone, files of 16 bits are divided by 257."""
    images = []
    for name, values in (("dim", [0, 1000, 2000]), ("bright", [0, 2048, 4095])):
        Image.fromarray(np.array([values], np.uint16)).save(tmp_path / f"{name}.png")
        images.append(conditions.open_image(tmp_path / f"{name}.png"))
        assert read_gray(tmp_path / f"{name}.png").tolist() == [[round(value / 257) for value in values]]
    white = conditions.white_level(map(conditions.brightest, images))
    assert [conditions.to_gray(image, white).tolist() for image in images] == [[[0, 62, 125]], [[0, 128, 255]]]
    assert [conditions.white_level([0, top]) for top in (1, 2, 256, 4095, 4096, 16384)] == [
        1, 255, 1023, 4095, 16383, 65535
    ]  # fmt: skip
    assert conditions.brightest(Image.fromarray(np.full((1, 1), 200, np.uint8))) == 0


@pytest.mark.parametrize(("kind", "most"), [(np.int32, 65535), (np.float32, 1)])
def test_values_of_unknown_meaning_are_refused(tmp_path: Path, kind: type, most: int):
    Image.fromarray(np.array([[0, most]], kind)).save(tmp_path / "a.tif")
    assert read_gray(tmp_path / "a.tif").tolist() == [[0, 255]]
    Image.fromarray(np.array([[0, most * 2]], kind)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif: has values above {most}: convert it"):
        read_gray(tmp_path / "a.tif")


def test_reading_resizes_images_smoothly_and_masks_sharply(tmp_path: Path):
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checker).save(tmp_path / "a.png")
    assert np.abs(read_gray(tmp_path / "a.png", 16).astype(int) - 128).max() < 40  # antialiased
    assert set(np.unique(read_mask(tmp_path / "a.png", 48))) <= {0, 255}
    speck = np.zeros((64, 64), np.uint8)
    speck[5, 9] = 255
    assert np.argwhere(conditions.resize_mask(speck, 16)).tolist() == [[1, 2]]


def test_bad_image_files_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        read_gray(tmp_path / "none.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    with pytest.raises(InputError, match="bad.png: cannot be read as an image"):
        read_mask(tmp_path / "bad.png")


def test_border_bars_are_told_from_lesions():
    lesion = ellipse(100, (0, 50), (60, 30))  # reaches the left border
    assert conditions.border_bars(lesion) == {}
    barred = lesion.copy()
    barred[-4:] = 255
    assert conditions.border_bars(barred) == {"bottom": 4}
    assert np.array_equal(conditions.remove_bars(barred), lesion)
    assert conditions.border_bars(np.full((50, 50), 255, np.uint8)) == {}
    dome = np.tril(np.full((100, 100), 255, np.uint8))[::-1]  # fills its first rows and narrows slowly
    assert conditions.border_bars(dome) == {}


@pytest.mark.parametrize("location", POLES)
@pytest.mark.parametrize("plane", ["longitudinal plane", "transverse", None])
def test_place_mask_puts_the_centroid_in_the_asked_third(location: str, plane: str | None):
    rng = np.random.default_rng(0)
    for _ in range(120):
        nodule = ellipse(128, (64, 64), (int(rng.integers(3, 30)), int(rng.integers(3, 22))), rng.uniform(0, 90))
        placed = place_mask(nodule, ORGAN, location, plane, rng)
        axis, low, high = pole_bounds(ORGAN, location, plane)
        assert low <= centroid(placed)[axis] < high
        inside = np.count_nonzero(placed & ORGAN) / np.count_nonzero(placed)
        assert inside >= 0.7
        assert set(np.unique(placed)) == {0, 255}


def test_place_mask_keeps_shape_and_varies_place():
    rng = np.random.default_rng(0)
    nodule = ellipse(128, (20, 100), (9, 6), 30)
    places = {centroid(place_mask(nodule, ORGAN, "middle pole", "longitudinal", rng)) for _ in range(30)}
    assert len(places) > 20
    enormous = place_mask(ellipse(128, (64, 64), (60, 50)), ORGAN, "inferior pole", "longitudinal", rng)
    assert np.count_nonzero(enormous & ORGAN) >= 0.7 * np.count_nonzero(enormous) > 0
    placed = place_mask(nodule, ORGAN, "upper pole", "longitudinal", rng)
    assert np.count_nonzero(placed) == np.count_nonzero(nodule)
    assert centroid(placed)[0] < 128 / 2  # the head is at the left


def test_place_mask_errors():
    rng, nodule = np.random.default_rng(0), ellipse(128, (20, 100), (9, 6))
    with pytest.raises(InputError, match="location 'isthmus'"):
        place_mask(nodule, ORGAN, "isthmus", "longitudinal", rng)
    with pytest.raises(InputError, match="plane 'oblique'"):
        place_mask(nodule, ORGAN, "upper pole", "oblique", rng)
    with pytest.raises(InputError, match="organ mask is empty"):
        place_mask(nodule, np.zeros_like(ORGAN), "upper pole", "longitudinal", rng)
    with pytest.raises(InputError, match="mask is empty"):
        place_mask(np.zeros_like(ORGAN), ORGAN, "upper pole", "longitudinal", rng)


@pytest.mark.parametrize("size", [128, 512])
def test_extend_mask_crosses_the_upper_edge(size: int):
    rng = np.random.default_rng(0)
    organ = cv2.resize(ORGAN, (size, size), interpolation=cv2.INTER_NEAREST)
    nodule = ellipse(size, (size // 2, size // 2), (size // 10, size // 14))
    crossings = []
    for _ in range(40):
        extended = extend_mask(nodule, organ, rng, size)
        columns = np.flatnonzero(extended.any(0))
        assert np.array_equal(columns, np.flatnonzero(nodule.any(0)))
        assert np.count_nonzero(extended) == np.count_nonzero(nodule)
        rise = np.argmax(organ[:, columns] > 0, axis=0) - np.argmax(extended[:, columns] > 0, axis=0)
        crossings.append(rise.max())
    assert min(crossings) >= 1
    assert max(crossings) <= 10 * size / 512
    if size == 512:
        assert len(set(crossings)) >= 5
    with pytest.raises(InputError, match="no column"):
        extend_mask(ellipse(128, (3, 60), (2, 2)), ORGAN, rng, 128)


def test_vary_mask_changes_the_outline_but_not_much():
    rng = np.random.default_rng(0)
    nodule = ellipse(128, (60, 60), (20, 13), 20)
    nodule[2:4, 2:4] = 255  # a stray speck is dropped
    area = np.count_nonzero(conditions.largest_component(nodule))
    changed = 0
    for _ in range(100):
        varied = vary_mask(nodule, rng)
        assert 0.7 * area <= np.count_nonzero(varied) <= 1.3 * area
        assert cv2.connectedComponents((varied > 0).astype(np.uint8))[0] == 2
        assert np.hypot(*np.subtract(centroid(varied), (60, 60))) < 6
        changed += not np.array_equal(varied, conditions.largest_component(nodule))
    assert changed >= 99
    tiny = np.zeros((128, 128), np.uint8)
    tiny[5, 5] = 255
    assert np.count_nonzero(vary_mask(tiny, rng)) == 1


def random_organ(rng: np.random.Generator) -> np.ndarray:
    """One or two overlapping ellipses, anywhere in a 96 px frame."""
    organ = np.zeros((96, 96), np.uint8)
    x, y = (int(v) for v in rng.integers(32, 64, 2))
    for _ in range(int(rng.integers(1, 3))):
        axes = int(rng.integers(18, 30)), int(rng.integers(10, 22))
        organ |= ellipse(96, (x + int(rng.integers(-6, 7)), y), axes, rng.uniform(-20, 20))
    return organ


@pytest.mark.parametrize(
    ("parts", "axis"),
    [(POLES, {"longitudinal": "horizontal", "transverse": "horizontal"}),
     (("upper zone", "lower zone"), {"longitudinal": "vertical", "transverse": "horizontal"})],
)  # fmt: skip
def test_place_and_overlap_hold_for_random_organs_and_nodules(parts: tuple[str, ...], axis: dict[str, str]):
    rng = np.random.default_rng(5)
    for draw in range(2000):
        organ = random_organ(rng)
        size = (int(rng.integers(1, 14)), int(rng.integers(1, 14)))
        nodule = ellipse(96, (48, 48), size, rng.uniform(0, 180))
        plane = ("longitudinal", "transverse")[draw % 2]
        location = (*parts, None)[int(rng.integers(len(parts) + 1))]
        placed = conditions.place_mask(nodule, organ, location, plane, rng, parts, axis)
        along, low, high = pole_bounds(organ, location, plane, parts, axis)
        assert low <= centroid(placed)[along] < high
        assert np.count_nonzero(placed & organ) >= 0.75 * np.count_nonzero(placed) > 0 or max(size) <= 4
        assert along == (1 if axis[plane] == "vertical" and location else 0) or location is None
        try:
            extended = extend_mask(placed, organ, rng, 512)
        except InputError:
            continue  # a speck beside the organ
        columns = np.flatnonzero(extended.any(0) & organ.any(0))
        rise = (np.argmax(organ[:, columns] > 0, axis=0) - np.argmax(extended[:, columns] > 0, axis=0)).max()
        assert 1 <= rise <= 10 or extended[0].any()  # the image ends above
        assert np.array_equal(extended.any(0), placed.any(0))  # the same third


def test_parts_of_an_organ_are_equal_and_in_order():
    organ = np.zeros((100, 60), np.uint8)
    organ[10:90, 5:55] = 255
    bounds = [pole_bounds(organ, part, None, "abcd", {"longitudinal": "vertical"}) for part in "abcd"]
    assert bounds == [(1, 10, 30), (1, 30, 50), (1, 50, 70), (1, 70, 90)]
    assert pole_bounds(organ, None, "oblique", (), {}) == (0, 5, 55)  # an organ without parts
    with pytest.raises(InputError, match="location 'e' is not one of a, b, c, d"):
        pole_bounds(organ, "e", None, "abcd", {"longitudinal": "vertical"})


def test_boundary_map_draws_around_the_mask():
    image, mask = np.full((64, 64), 90, np.uint8), ellipse(64, (30, 30), (12, 8))
    edges = conditions.boundary_map(image, mask)
    assert set(np.unique(edges)) == {0, 255}
    assert not edges[mask > 0].any()
    assert np.array_equal(conditions.blank_nodule(edges, mask), edges)
    filled = np.asarray(cv2.morphologyEx(edges | mask, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)))
    assert cv2.connectedComponents(255 - filled)[0] == 2  # a closed line: outside is one piece
    assert np.count_nonzero(edges) == pytest.approx(2 * np.pi * 13, rel=0.4)  # the rim is 3 px wide
    with pytest.raises(InputError, match="make them agree"):
        conditions.boundary_map(image, mask[:32])


@pytest.mark.parametrize("area", [60, 400, 4000])
def test_scaled_mask_has_the_area_and_the_proportions(area):
    mask = np.zeros((128, 128), np.uint8)
    cv2.ellipse(mask, (30, 90), (20, 10), 0, 0, 360, 255, -1)
    scaled = conditions.scale_mask(mask, area)
    assert scaled.shape == mask.shape and set(np.unique(scaled)) == {0, 255}
    assert np.count_nonzero(scaled) == pytest.approx(area, rel=0.15)
    y, x = np.nonzero(scaled)
    assert np.ptp(x) / np.ptp(y) == pytest.approx(2, rel=0.25)


def test_scaled_mask_stays_in_the_image():
    mask = np.zeros((64, 64), np.uint8)
    mask[10:20, 10:50] = 255
    scaled = conditions.scale_mask(mask, 64 * 64)
    assert scaled.shape == (64, 64) and scaled.any()
