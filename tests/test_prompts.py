"""benchmarks/prompts.py: a base that does not read its prompts has no rise, one that does has."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import prompts
from benchmarks.autoencoder import reconstruct
from data import phantom
from eval.images import load_images
from tiger import diffusion
from tiger.components import load_components
from tiger.errors import InputError
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return phantom.write_dataset(tmp_path_factory.mktemp("data"), 24, 4, "balanced", workers=1)


class Reads(nn.Module):
    """A U-Net's stand-in: says the noise back, and what the prompt says as far as `weight` lets it."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(self, noisy: torch.Tensor, timestep: int, states: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=noisy + self.weight * states.mean((1, 2)).view(-1, 1, 1, 1))


def test_terms_are_replaced_by_others_that_occur(rows: Manifest) -> None:
    own = [row.attributes["halo"] for row in rows.rows]
    others = prompts.other_terms(rows, "halo", rows, np.random.default_rng(0))
    assert all(other != term for other, term in zip(others, own, strict=True)) and set(others) <= set(own)
    thick = Manifest(rows.path, tuple(row for row in rows.rows if row.attributes["halo"] == own[0]))
    assert own[0] not in prompts.other_terms(thick, "halo", rows, np.random.default_rng(0))  # as with --term


def test_only_a_network_that_reads_its_prompt_has_a_rise(rows: Manifest) -> None:
    parts, knowledge = load_components(str(ROOT / "assets/tiny-base")), Knowledge.load("thyroid")
    latents, found = prompts.latents_of(parts, rows), {}
    for weight in (0.0, 5.0):
        parts.unet = Reads(weight)  # type: ignore[assignment]
        found[weight] = prompts.rises(parts, rows, latents, knowledge, ["halo", "brightness"], rows)
    assert found[0.0] == {"halo": [0, 0], "brightness": [0, 0]}
    assert all(rise != 0 and error > 0 for rise, error in found[5.0].values())


def test_the_embedded_base_reads_what_an_image_plainly_shows(rows: Manifest) -> None:
    parts = load_components(str(ROOT / "assets/tiny-base"))
    latents, knowledge = prompts.latents_of(parts, rows), Knowledge.load("thyroid")
    ((rise, error),) = prompts.rises(parts, rows, latents, knowledge, ["brightness"], rows).values()
    assert rise > 3 * error > 0


def test_what_is_kept_is_all_where_the_prediction_is_right(rows: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "BATCH", 16)  # more than one batch
    parts = load_components(str(ROOT / "assets/tiny-base"))
    latents = prompts.latents_of(parts, rows)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    at = torch.full((len(latents),), prompts.KEPT_FROM)
    right = iter(diffusion.target(parts.noise_schedule, latents, noise, at).split(16))
    parts.unet = lambda noisy, timestep, states: SimpleNamespace(sample=next(right))  # type: ignore[assignment]
    images = load_images(rows, 128)
    whole = reconstruct(parts.vae, images).astype(int)
    assert np.abs(prompts.kept(parts, rows, latents) - whole).max() <= 1
    parts.unet = lambda noisy, timestep, states: SimpleNamespace(sample=torch.zeros_like(noisy))  # type: ignore[assignment]
    assert np.abs(prompts.kept(parts, rows, latents) - whole).mean() > 5  # noise stays


def test_a_term_that_no_row_has_is_refused(rows: Manifest) -> None:
    with pytest.raises(InputError, match="--term gritty: 0 rows of .* have it"):
        prompts.main(["--data_dir", str(rows.root), "--split", "train", "--term", "gritty"])
