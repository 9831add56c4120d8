"""Load the parts of a diffusers-format base: a local folder or a hub id."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiger import checkpoint
from tiger.errors import InputError
from tiger.files import read_json

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

NEEDED = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")


@dataclass
class Components:
    """A text-to-image base in float32. The scheduler holds the base's noise schedule and prediction type."""

    vae: "AutoencoderKL"
    unet: "UNet2DConditionModel"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    scheduler: "DDIMScheduler"

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def resolution(self, wanted: int | None) -> int:
        """Image side in pixels: `wanted`, or what the U-Net was made for. Raises InputError if the networks cannot take it."""
        side = wanted or self.unet.config.sample_size * self.vae_scale_factor
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if side % multiple:
            raise InputError(f"--resolution {side}: this base needs a multiple of {multiple} pixels, "
                             f"such as {round(side / multiple + 0.5) * multiple}")  # fmt: skip
        return side


def check_base(name: str) -> None:
    """Refuse what can be seen, without loading it, not to be a usable base. Raises InputError."""
    folder = Path(name).expanduser()
    if not folder.exists():
        first = folder.parts[0] if folder.parts else ""
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or first in {".", ".."} or Path(first).exists():
            raise InputError(f"--pretrained_model {name}: no such folder")
        return  # a hub id
    if not (folder / "model_index.json").is_file():
        raise InputError(f"--pretrained_model {name} {describe_folder(folder)}")
    index = read_json(folder / "model_index.json")
    missing = [part for part in NEEDED if not (folder / part).is_dir()]
    if missing:
        raise InputError(
            f"--pretrained_model {name} lacks {', '.join(missing)}: a base has the folders {', '.join(NEEDED)}"
        )
    if "text_encoder_2" in index:
        raise InputError(f"--pretrained_model {name} has two text encoders (SDXL or later); "
                         "Tiger takes bases laid out as SD-1.5 or SD-2.1")  # fmt: skip


def describe_folder(folder: Path) -> str:
    """Why something without model_index.json is no base."""
    if folder.is_file():
        return "is a file: give a diffusers folder, one with a model_index.json"
    steps = sorted(checkpoint.step_of(path) for path in checkpoint.checkpoints(folder))
    if steps:
        return (f"holds checkpoints up to step {steps[-1]} but no finished model: run the command that made them again, "
                "it resumes and finishes")  # fmt: skip
    return "has no model_index.json: give a diffusers folder"


def load_components(name: str) -> Components:
    """Load a base. Raises InputError if it cannot be read."""
    import diffusers
    import transformers
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    import torch

    check_base(name)
    name = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    single = {"torch_dtype": torch.float32, "use_safetensors": True}
    try:
        schedule = DDIMScheduler.load_config(name, subfolder="scheduler")
        schedule.setdefault("clip_sample", False)  # DDIM's own default, True, is for pixels
        return Components(
            vae=AutoencoderKL.from_pretrained(name, subfolder="vae", **single).requires_grad_(False),
            unet=UNet2DConditionModel.from_pretrained(name, subfolder="unet", **single).requires_grad_(False),
            text_encoder=CLIPTextModel.from_pretrained(
                name, subfolder="text_encoder", dtype=torch.float32
            ).requires_grad_(False),
            tokenizer=CLIPTokenizer.from_pretrained(name, subfolder="tokenizer"),
            scheduler=DDIMScheduler.from_config(schedule),
        )
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrained_model {name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
