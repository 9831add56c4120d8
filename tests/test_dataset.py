"""Items, the order of rows, and the two caches."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import make_vae
from safetensors import safe_open
from safetensors.torch import save_file
from training_samples import SIDE, save_data

from tiger import cache as cache_module
from tiger import manifest
from tiger.cache import TextCache
from tiger.dataset import (
    StepSampler,
    TigerDataset,
    batch_indices,
    cache_latents,
    mirror_text,
    sample_latents,
)
from tiger.errors import InputError
from tiger.knowledge import Knowledge, Placement

THYROID = Knowledge.load("thyroid").placement


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> manifest.Manifest:
    return manifest.read(save_data(tmp_path_factory.mktemp("data")))


def test_an_item(rows):
    item = TigerDataset(rows, SIDE, with_conditions=True)[4]
    assert item["image"].shape == (3, SIDE, SIDE) and -1 <= item["image"].min() < -0.9 < 0.9 < item["image"].max() <= 1
    assert item["mask"].shape == item["sobel"].shape == (1, SIDE, SIDE)
    assert set(item["mask"].unique().tolist()) == {0.0, 1.0}
    assert item["sobel"][item["mask"] == 1].max() == 0 and item["sobel"].max() > 0.9
    assert item["label"] == "FTC" and item["text"] == f"{item['text_fg']}, {item['text_bg']}"
    full = TigerDataset(rows, SIDE, with_conditions=True, blank_nodule=False)[4]
    assert full["sobel"][full["mask"] == 1].max() > 0.9


def test_the_mirrored_half(rows):
    dataset = TigerDataset(rows, SIDE, with_conditions=True, random_flip=True, placement=THYROID)
    plain, mirrored = dataset[5], dataset[5 + len(rows.rows)]
    assert len(list(dataset)) == 2 * len(rows.rows)
    for key in ("image", "mask", "sobel"):
        assert torch.equal(plain[key].flip(-1), mirrored[key])
    assert "inferior pole" in plain["text_fg"] and "upper pole" in mirrored["text_fg"]
    assert "upper pole" in mirrored["text"] and dataset.content_key(5) != dataset.content_key(5 + len(rows.rows))


def test_mirrored_words():
    text = "upper pole, left side, middle pole"
    for plane in ("longitudinal", None):
        assert mirror_text(text, plane, THYROID) == "inferior pole, right side, middle pole"
    kidney = Placement(
        parts=("upper pole", "lower pole"), axis={"longitudinal": "vertical", "transverse": "horizontal"}
    )
    assert mirror_text(text, "longitudinal", kidney) == "upper pole, right side, middle pole"
    assert mirror_text("upper pole", "transverse", kidney) == "lower pole"
    assert mirror_text(text, None, Placement()) == "upper pole, right side, middle pole"


def test_an_epoch_is_a_permutation_and_each_is_another():
    first = np.concatenate([batch_indices(0, step, 4, 12) for step in range(3)])
    second = np.concatenate([batch_indices(0, step, 4, 12) for step in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(12)) and list(first) != list(second)
    assert list(batch_indices(1, 0, 12, 12)) != list(batch_indices(0, 0, 12, 12))


def test_batches_run_on_across_epochs_and_may_exceed_the_data():
    assert len(batch_indices(0, 7, 5, 12)) == 5
    assert sorted(batch_indices(0, 0, 24, 12)) == sorted([*range(12), *range(12)])


def test_weighted_drawing_balances_classes(rows):
    weights = manifest.row_weights(rows, 1.0)
    drawn = np.concatenate([batch_indices(0, step, 16, len(rows.rows), weights) for step in range(300)])
    shares = [np.mean([rows.rows[i].label == label for i in drawn]) for label in ("PTC", "FTC", "benign")]
    assert np.allclose(shares, 1 / 3, atol=0.03)
    assert manifest.row_weights(rows, 0) is None
    halfway = manifest.row_weights(rows, 0.5)
    assert np.isclose(sum(w for w, row in zip(halfway, rows.rows, strict=True) if row.label == "PTC"), 2 / (2 + 2))


def test_balance_needs_labels(tmp_path):
    folder = save_data(tmp_path, 2)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    del lines[1]["label"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="1 have none, first file_name/1.png"):
        manifest.row_weights(manifest.read(folder), 0.5)


def batches(accumulation: int, world: int, size: int, start: int = 0) -> list[list[int]]:
    """Global batches of steps `start` to 3, put together from what each process gets."""
    ranks = [
        list(StepSampler(30, None, seed=3, batch_size=size, accumulation=accumulation, rank=rank, world=world,
                         start=start, stop=3))
        for rank in range(world)
    ]  # fmt: skip
    steps = []
    for step in range(3 - start):
        cuts = [ranks[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world)]
        steps.append([row for cut in cuts for row in cut])
    return steps


def test_a_global_batch_is_the_same_however_it_is_cut():
    assert batches(1, 1, 8) == batches(2, 1, 4) == batches(2, 2, 2) == batches(1, 4, 2)
    assert batches(1, 1, 8, start=2) == batches(1, 1, 8)[2:]


class CountingVae:
    """A VAE that counts the images it encodes."""

    def __init__(self):
        self.vae = make_vae(4)
        self.count = 0
        encode = self.vae.encode

        def counted(images):
            self.count += len(images)
            return encode(images)

        self.vae.encode = counted  # type: ignore[method-assign]


def test_latents_are_encoded_once(rows, tmp_path):
    dataset = TigerDataset(rows, SIDE)
    first = CountingVae()
    cache = cache_latents(first.vae, dataset, tmp_path, batch_size=5)
    assert first.count == len(cache) == 12
    expected = first.vae.encode(torch.stack([dataset[i]["image"] for i in range(12)])).latent_dist.parameters
    assert torch.allclose(torch.stack([cache[i] for i in range(12)]), expected, atol=2e-3)  # stored in half precision
    second = CountingVae()
    again = cache_latents(second.vae, TigerDataset(rows, SIDE), tmp_path)
    assert second.count == 0 and torch.equal(again[7], cache[7])


def test_the_same_weights_that_do_other_things_are_another_model(text_encoder):
    other = copy.deepcopy(text_encoder)
    assert cache_module.model_key(other) == cache_module.model_key(text_encoder)
    other.config.hidden_act = "relu"
    assert cache_module.model_key(other) != cache_module.model_key(text_encoder)


def test_a_cache_is_never_stale(rows, tmp_path):
    cache_latents(make_vae(4), TigerDataset(rows, SIDE), tmp_path)
    other = CountingVae()
    with torch.no_grad():
        next(other.vae.parameters()).add_(0.1)
    cache_latents(other.vae, TigerDataset(rows, SIDE), tmp_path)  # another model
    assert other.count == 12
    smaller = CountingVae()
    cache_latents(smaller.vae, TigerDataset(rows, SIDE // 2), tmp_path)  # another size
    assert smaller.count == 12


def test_a_changed_image_is_encoded_again_and_a_copy_is_not(tmp_path):
    data = manifest.read(save_data(tmp_path / "data", 3))
    cache_latents(make_vae(4), TigerDataset(data, SIDE), tmp_path / "cache")
    images = tmp_path / "data" / "file_name"
    (images / "1.png").write_bytes((images / "0.png").read_bytes())
    counting = CountingVae()
    cache = cache_latents(counting.vae, TigerDataset(data, SIDE), tmp_path / "cache")
    assert counting.count == 0 and torch.equal(cache[0], cache[1]) and not torch.equal(cache[0], cache[2])
    (images / "2.png").write_bytes((tmp_path / "data" / "condition_bg" / "2.png").read_bytes())
    cache_latents(counting.vae, TigerDataset(data, SIDE), tmp_path / "cache")
    assert counting.count == 1


def test_a_damaged_cache_file_is_made_again(rows, tmp_path, capsys):
    cache_latents(make_vae(4), TigerDataset(rows, SIDE), tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    counting = CountingVae()
    cache_latents(counting.vae, TigerDataset(rows, SIDE), tmp_path)
    assert counting.count == 12 and str(path) in capsys.readouterr().err


def test_a_cache_file_of_other_tensors_is_made_again(rows, tmp_path):
    cache_latents(make_vae(4), TigerDataset(rows, SIDE), tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        save_file({"other": file.get_tensor(cache_module.TENSOR)}, path, metadata=file.metadata())
    assert len(cache_latents(make_vae(4), TigerDataset(rows, SIDE), tmp_path)[3]) == 8


def test_each_process_encodes_its_share(rows, tmp_path):
    first, second = CountingVae(), CountingVae()

    def encode(counting: CountingVae, rank: int, wait):
        return cache_latents(counting.vae, TigerDataset(rows, SIDE), tmp_path, rank=rank, world=2, wait=wait)

    def other_process() -> None:
        with pytest.raises(StopIteration):  # it would wait here for the first one
            encode(second, 1, wait=lambda: next(iter(())))

    cache = encode(first, 0, wait=other_process)
    assert first.count + second.count == len(cache) == 12 and first.count and second.count


def test_an_interrupted_run_goes_on_where_it_stopped(rows, tmp_path, monkeypatch):
    """Files hold four images each here; the third is interrupted."""
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 4)
    interrupted = CountingVae()
    encode = interrupted.vae.encode

    def interruptible(images):
        if interrupted.count >= 8:
            raise KeyboardInterrupt
        return encode(images)

    interrupted.vae.encode = interruptible  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cache_latents(interrupted.vae, TigerDataset(rows, SIDE), tmp_path, batch_size=2)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    resumed = CountingVae()
    cache = cache_latents(resumed.vae, TigerDataset(rows, SIDE), tmp_path, batch_size=2)
    assert resumed.count == 4 and len(cache) == 12
    whole = cache_latents(make_vae(4), TigerDataset(rows, SIDE), tmp_path / "other", batch_size=2)
    assert all(torch.equal(cache[index], whole[index]) for index in range(12))


def test_memory_is_bounded_while_encoding_and_reading(rows, tmp_path, monkeypatch):
    """At most one file's images are held while encoding, and none while reading: they stay in the mapped files."""
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 4)
    saved: list[int] = []
    save = cache_module.save_file

    def recording(tensors, *args, **options):
        saved.append(len(tensors[cache_module.TENSOR]))
        save(tensors, *args, **options)

    monkeypatch.setattr(cache_module, "save_file", recording)
    cache = cache_latents(make_vae(4), TigerDataset(rows, SIDE), tmp_path)
    assert saved == [4, 4, 4]
    for index in range(12):
        cache[index]
    assert len(cache.files) == 3 and not any(isinstance(value, torch.Tensor) for value in vars(cache).values())
    assert not any(isinstance(file, torch.Tensor) for file in cache.files.values())


def test_mirrored_images_are_variants_of_their_own_in_the_cache(rows, tmp_path):
    plain, both = TigerDataset(rows, SIDE), TigerDataset(rows, SIDE, random_flip=True)
    cache_latents(make_vae(4), plain, tmp_path)
    counting = CountingVae()
    cache = cache_latents(counting.vae, both, tmp_path)
    assert counting.count == 12 and len(cache) == 24  # only the mirrored half was new
    both.latents = cache
    mirrored = make_vae(4).encode(plain[3]["image"].flip(-1)[None]).latent_dist.parameters[0]
    assert torch.allclose(both[3 + 12]["moments"], mirrored, atol=2e-3)
    assert not torch.allclose(both[3]["moments"], mirrored, atol=2e-3)


def test_moments_are_kept_so_that_sampling_stays_random(rows, tmp_path):
    vae = make_vae(4)
    cache = cache_latents(vae, TigerDataset(rows, SIDE), tmp_path)
    moments = cache[0][None]
    draws = [sample_latents(vae, moments, torch.randn(1, 4, 8, 8)) for _ in range(2)]
    assert moments.shape == (1, 8, 8, 8) and not torch.equal(*draws)


def test_sampled_latents_have_the_posteriors_mean_and_spread():
    vae = make_vae(4)
    vae.register_to_config(shift_factor=0.5)  # Stable Diffusion has none: training and pipeline leave it out alike
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2 * np.log(0.5))], dim=1)
    noise = torch.randn(1, 4, 2, 2)
    assert torch.allclose(sample_latents(vae, moments, noise), (3.0 + 0.5 * noise) * vae.config.scaling_factor)


class CountingEncoder:
    """A stand-in text encoder, which remembers what it encoded: the state of a text is its length."""

    def __init__(self):
        self.calls: list[list[str]] = []

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.calls.append(texts)
        return torch.tensor([[[float(len(text))]] for text in texts])


def test_stored_texts_are_encoded_once_for_all_runs(tmp_path):
    texts, first, second = ["a", "bb", "ccc", "bb"], CountingEncoder(), CountingEncoder()
    cache = TextCache(first, limit=10)
    cache.store(texts, tmp_path)
    assert cache(texts).flatten().tolist() == [1, 2, 3, 2]
    assert [sorted(call) for call in first.calls] == [["a", "bb", "ccc"]]
    later = TextCache(second, limit=10)
    later.store([*texts, "dddd"], tmp_path)
    assert later(["dddd", "a", "eeeee"]).flatten().tolist() == [4, 1, 5]
    assert second.calls == [["dddd"], ["eeeee"]]


def test_a_stored_text_is_bit_equal_and_stays_on_disk(tmp_path):
    states = {text: torch.randn(3, 5) for text in "ab"}
    cache = TextCache(lambda texts: torch.stack([states[text] for text in texts]), limit=10)
    cache.store(["a", "b"], tmp_path)
    assert torch.equal(cache(["b", "a"]), torch.stack([states["b"], states["a"]])) and not cache.states


def test_two_processes_share_out_the_texts(tmp_path):
    texts = [f"text {number}" for number in range(12)]
    first, second = CountingEncoder(), CountingEncoder()

    def other_process() -> None:
        TextCache(second, limit=20).store(texts, tmp_path, rank=1, world=2)

    TextCache(first, limit=20).store(texts, tmp_path, rank=0, world=2, wait=other_process)
    shares = [[text for call in encoder.calls for text in call] for encoder in (first, second)]
    assert all(shares) and sorted(shares[0] + shares[1]) == sorted(texts)


def test_no_more_texts_are_stored_than_the_limit(tmp_path):
    encode = CountingEncoder()
    cache = TextCache(encode, limit=2)
    cache.store(["a", "bb", "ccc"], tmp_path)
    assert sorted(encode.calls[0]) == ["a", "bb"] and cache(["ccc", "a"]).flatten().tolist() == [3, 1]


def test_texts_are_encoded_once_and_memory_is_bounded():
    encode = CountingEncoder()
    calls = encode.calls
    cache = TextCache(encode, limit=2)
    assert cache(["a", "bb", "a", "ccc"]).flatten().tolist() == [1, 2, 1, 3]
    assert cache(["bb", "a"]).flatten().tolist() == [2, 1]
    assert cache(["ccc"]).flatten().tolist() == [3]
    assert calls == [["a", "bb", "ccc"], ["ccc"]] and len(cache.states) == 2
