"""What each arm draws its batches from under each policy, and what it does to images."""

import re

import numpy as np
import pytest
import torch

from eval import arms, classify
from eval.arms import EXTRA, REAL, Mixing, augmentation_of, draw_batch, phases_of
from tiger.errors import InputError

LABELS = ["benign", "FTC"]


def pools(**counts: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(y, origin) of so many images of the two classes from each source."""
    y = np.concatenate([np.repeat([0, 1], count) for count in counts.values()])
    return y, np.repeat(list(counts), [sum(count) for count in counts.values()])


def draws(arm: str, y: np.ndarray, origin: np.ndarray, mixing: Mixing = Mixing(), phase: int = 0) -> np.ndarray:  # noqa: B008
    """(batches, 8) row indices"""
    groups = phases_of(arm, mixing, y, origin, LABELS)[phase]
    return np.stack([draw_batch(groups, 8, np.random.default_rng([0, i])) for i in range(300)])


def test_titles() -> None:
    titles = {
        "tiger_f": "Tiger-F",
        "tiger_f_0": "Tiger-F, generator 0",
        "tiger_f_0, 100 a class": "Tiger-F, generator 0, 100 a class",
        "sd_controlnet_12": "Stable Diffusion + ControlNet, generator 12",
        "another_0": "another_0",  # no method of ours
        "mixup_0": "mixup_0",  # a set of that name is no mixup
    }
    assert {arm: arms.title(arm) for arm in titles} == titles


def test_every_class_gets_the_same_synthetic_share_in_every_batch() -> None:
    y, origin = pools(real=(50, 5), tiger_f=(10, 40), sd=(7, 7))
    rows = draws("tiger_f", y, origin)
    for label in (0, 1):
        assert set((y[rows] == label).sum(1)) == {4}
        assert set(((y[rows] == label) & (origin[rows] == "tiger_f")).sum(1)) == {1}  # a quarter of four, always
    assert set(np.unique(rows)) == set(range(105))  # all of its own, none of the other set
    assert np.array_equal(rows, draws("tiger_f", y, origin))


def test_shares_that_do_not_fit_a_batch_are_right_on_average() -> None:
    y, origin = pools(real=(2, 2), tiger_f=(1, 1))
    rows = draws("tiger_f", y, origin, Mixing(share=0.1))
    synthetic = origin[rows] == "tiger_f"
    assert set(synthetic.sum(1)) <= {0, 1, 2}
    for label in (0, 1):
        assert (synthetic & (y[rows] == label)).mean() == pytest.approx(0.05, abs=0.015)


def test_arms_draw_from_their_own_images() -> None:
    y, origin = pools(real=(30, 10), tiger_f=(5, 5), extra_real=(5, 5))
    assert y[draws("none", y, origin)].mean() == pytest.approx(0.25, abs=0.03)
    expected = {"none": {REAL}, "oversampling": {REAL}, "cutmix": {REAL}, "tiger_f": {REAL, "tiger_f"}}
    for arm, origins in (expected | {"real_upper": {REAL, EXTRA}}).items():
        rows = draws(arm, y, origin)
        assert set(np.unique(origin[rows])) == origins
        if arm != "none":
            assert set((y[rows] == 1).sum(1)) == {4}
    assert np.array_equal(draws("oversampling", y, origin), draws("mixup", y, origin))  # nothing but the images differs


def test_policies() -> None:
    y, origin = pools(real=(30, 10), tiger_f=(20, 20))
    rare = draws("tiger_f", y, origin, Mixing("rare", 0.5, ("FTC",)))
    synthetic = origin[rare] == "tiger_f"
    assert set((synthetic & (y[rare] == 1)).sum(1)) == {2} and not (synthetic & (y[rare] == 0)).any()
    pooled = draws("tiger_f", y, origin, Mixing("pooled"))
    assert np.bincount(pooled.ravel(), minlength=80) / pooled.size == pytest.approx(1 / 80, abs=0.008)
    first, second = (draws("tiger_f", y, origin, Mixing("pretrain"), phase) for phase in (0, 1))
    assert set(origin[first.ravel()]) == {"tiger_f"} and set(origin[second.ravel()]) == {REAL}
    assert set((y[first] == 1).sum(1)) == set((y[second] == 1).sum(1)) == {4}


def test_synthetic_shares_say_whether_looks_tell_the_label() -> None:
    y, origin = pools(real=(30, 10), tiger_f=(20, 20))
    for policy, expected in (("share", [0.25, 0.25]), ("rare", [0, 0.25]), ("pooled", [20 / 50, 20 / 30])):
        (groups,) = phases_of("tiger_f", Mixing(policy, rare=("FTC",)), y, origin, LABELS)
        assert arms.synthetic_shares(groups, y, origin, 2) == pytest.approx(expected)


def test_batches_are_shuffled() -> None:
    y, origin = pools(real=(8, 8))
    rows = draws("oversampling", y, origin)
    neighbours = (y[rows] != y[np.roll(rows, 1, axis=1)]).mean()
    assert neighbours == pytest.approx(4 / 7, abs=0.03)  # mixup mixes these


def test_a_class_without_images_is_refused() -> None:
    y, origin = pools(real=(1, 1), tiger_f=(0, 3))
    with pytest.raises(InputError, match="arm tiger_f: no images of class benign"):
        phases_of("tiger_f", Mixing(), y, origin, LABELS)
    phases_of("tiger_f", Mixing("rare", rare=("FTC",)), y, origin, LABELS)  # needs none of them


def test_labels_are_mixed_as_images_are() -> None:
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 0, 1])
    images = y.float().view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()  # an image's level is its label
    for arm in ("mixup", "cutmix"):
        mix = augmentation_of(arm, 8, 2).batch
        assert mix is not None
        mixed, target = mix(images, y)
        assert target.shape == (4, 2) and target.sum(1).tolist() == pytest.approx([1] * 4)
        assert mixed.mean((1, 2, 3)).tolist() == pytest.approx(target[:, 1].tolist(), abs=1e-5)
        assert ((mixed > 0) & (mixed < 1)).any() == (arm == "mixup")  # CutMix pastes a box


def test_image_augmentations_change_each_image_by_itself() -> None:
    torch.manual_seed(0)
    image = torch.linspace(0, 1, 256).view(1, 16, 16)
    for arm in ("basic", "erasing"):
        change = augmentation_of(arm, 16, 2).image
        assert change is not None
        changed = torch.stack([change(image) for _ in range(20)])
        assert changed.shape == (20, 1, 16, 16) and changed.min() >= 0 and changed.max() <= 1
        assert len(torch.unique(changed.view(20, -1), dim=0)) > 5
    erased = (changed == arms.MEAN_GREY).flatten(1).float().mean(1)
    assert 0.2 < (erased > 0).float().mean() < 0.8  # half of them


def test_arms_and_policies_are_described_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        classify.main(["--help"])
    told = capsys.readouterr().out
    for name in (*arms.PLAIN, arms.UPPER, *arms.POLICIES):
        assert len(re.findall(rf"^    {name} +\w", told, re.MULTILINE)) == 1
    assert "variant" in arms.title("features")  # not DeVries & Taylor's autoencoder and neighbours


def test_features_go_away_from_another_of_the_class() -> None:
    torch.manual_seed(0)
    features = torch.tensor([[0.0], [2.0], [10.0]])
    pushed = arms.extrapolate(features, torch.tensor([0, 0, 1]))
    assert pushed.tolist() == [[-1.0], [3.0], [10.0]]  # the one of class 1 is alone
