"""Load the parts of a diffusers-format base: a local folder or a hub id."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiger import checkpoint
from tiger.errors import InputError
from tiger.files import read_json

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from tiger.model import DualControlNet

NEEDED = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")


@dataclass
class Components:
    """A text-to-image base, frozen and in float32. Schedulers keep the base's noise schedule and prediction type."""

    vae: "AutoencoderKL"
    unet: "UNet2DConditionModel"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    scheduler: "DDIMScheduler"  # for sampling, and saved with the model
    noise_schedule: "DDPMScheduler"  # the same for training
    source: str = ""  # the folder or hub id it was loaded from
    controlnet: "DualControlNet | None" = None  # of a fine-tuned model

    def to(self, device: "torch.device") -> None:
        """Move the networks, convolutions in the memory format that is fastest for them."""
        import torch

        for network in self.networks:
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def networks(self) -> "tuple[torch.nn.Module, ...]":
        """Everything with parameters."""
        base = self.vae, self.unet, self.text_encoder
        return base if self.controlnet is None else (*base, self.controlnet)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def resolution(self, wanted: int | None) -> int:
        """Image side in pixels: `wanted`, or what the U-Net was made for. InputError if the networks cannot take it."""
        side = wanted or self.unet.config["sample_size"] * self.vae_scale_factor
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        if side % multiple:
            raise InputError(
                f"--resolution {side}: this base needs a multiple of {multiple} pixels, such as "
                f"{round(side / multiple + 0.5) * multiple}"
            )
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
        raise InputError(
            f"--pretrained_model {name} has two text encoders (SDXL or later); give a base laid out as SD-1.5 or SD-2.1"
        )
    if is_distilled(folder):
        raise InputError(f"--pretrained_model {name} was distilled to draw in few steps: give what it was made from")


def is_distilled(folder: Path) -> bool:
    """Whether a diffusers folder holds a student that distill.sh made."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return scheduler.is_file() and read_json(scheduler).get("_class_name") == "LCMScheduler"


def describe_folder(folder: Path) -> str:
    """Why something without model_index.json is no base."""
    if folder.is_file():
        return "is a file: give a diffusers folder, one with a model_index.json"
    steps = sorted(checkpoint.step_of(path) for path in checkpoint.checkpoints(folder))
    if steps:
        return (
            f"holds checkpoints up to step {steps[-1]} but no finished model: run the command that made them again, it "
            "resumes and finishes"
        )
    return "has no model_index.json: give a diffusers folder"


def load_components(name: str) -> Components:
    """Load a base. Raises InputError if it cannot be read."""
    import diffusers
    import torch
    import transformers
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    check_base(name)
    name = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    options: Any = {"torch_dtype": torch.float32, "use_safetensors": True}
    try:
        schedule: Any = DDIMScheduler.load_config(name, subfolder="scheduler")
        schedule.setdefault("clip_sample", False)  # DDIM's own default, True, is for pixels
        vae = AutoencoderKL.from_pretrained(name, subfolder="vae", **options)
        unet = load_unet(name)
        text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        what = "cannot be loaded" if Path(name).exists() else "is no folder, and cannot be loaded as a hub id"
        raise InputError(f"--pretrained_model {name} {what}: {' '.join(str(error).split())[:300]}") from error
    for network in (vae, unet, text_encoder):
        network.requires_grad_(False).eval()
    sampler: Any = DDIMScheduler.from_config(schedule)
    noise_schedule: Any = DDPMScheduler.from_config(schedule)
    return Components(vae, unet, text_encoder, tokenizer, sampler, noise_schedule, name)


def load_unet(source: str) -> "UNet2DConditionModel":
    """The U-Net of a base, in float32."""
    import torch
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(
        source, subfolder="unet", torch_dtype=torch.float32, use_safetensors=True
    )
