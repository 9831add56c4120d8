"""The coarse stage: noised latents and the full prompt in, the U-Net's ε- or v-error out (paper eq. 4)."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from tiger import diffusion, flops
from tiger.cache import TextCache, to_device
from tiger.components import Components
from tiger.files import write_json
from tiger.model import compile_blocks
from tiger.optimizer import adamw
from tiger.pipeline import TigerPipeline
from tiger.stage import Losses, Noised, SampleNoise, draw, image_grid, noised
from tiger.tokenizer import MAX_LENGTH, encode_text, forget_calls, token_ids

LAYOUT = {  # of the finished model: folder -> (library, class)
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # the layers that LoRA adapts, as in diffusers' examples


class CoarseModel(nn.Module):
    """The U-Net, and the text encoder where it is trained too, in one module."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel | None):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """noisy (B, C, h, w); text: token ids (B, L) where the text encoder is trained, else its states (B, L, D)."""
        states = text if self.text_encoder is None else self.text_encoder(text)[0]
        return self.unet(noisy, timesteps, states).sample


class CoarseStage:
    """Trains `components.unet` in place. See stage.Stage."""

    def __init__(
        self,
        components: Components,
        shown: list[dict[str, Any]],
        device: torch.device,
        *,
        train_text_encoder: bool,
        lora_rank: int | None,
        lesion_weight: float,
        learning_rate: float,
        weight_decay: float,
        snr_gamma: float | None,
        noise_offset: float,
        text_dropout: float,
        text_cache_size: int,
        validation_inference_steps: int,
        use_8bit_adam: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ):
        """shown: dataset items with images, for the validation grid. lora_rank: None to train the whole U-Net."""
        self.components = components
        self.shown = shown
        self.device = device
        self.lora_rank = lora_rank
        self.lesion_weight = lesion_weight
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.text_dropout = text_dropout
        self.validation_inference_steps = validation_inference_steps
        components.to(device)
        components.unet.requires_grad_(lora_rank is None)
        if lora_rank is not None:  # Hu et al. 2021, https://arxiv.org/abs/2106.09685
            components.unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=ATTENTION))
        components.text_encoder.requires_grad_(train_text_encoder)
        self.model = CoarseModel(components.unet, components.text_encoder if train_text_encoder else None).train()
        self.trainable: nn.Module = self.model
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = [adamw(trained, learning_rate, weight_decay, use_8bit_adam)]
        if gradient_checkpointing:
            components.unet.enable_gradient_checkpointing()
        if compile:
            compile_blocks(components.unet)
        # What the model takes in place of prompts: states of a frozen text encoder, token ids for one in training.
        self.read_text: Callable[[list[str]], torch.Tensor] = TextCache(self.encode, text_cache_size, device)
        if train_text_encoder:
            self.read_text = lambda texts: to_device(token_ids(texts, components.tokenizer), device)

    def encode(self, texts: list[str]) -> torch.Tensor:
        """(B,) prompts -> (B, L, D) hidden states."""
        return encode_text(texts, self.components.tokenizer, self.components.text_encoder)

    def begin_step(self, texts: Sequence[dict[str, str]]) -> None:
        """Nothing here depends on the whole batch."""

    def loss(self, batch: dict[str, Any], noise: SampleNoise, step: int) -> Losses:
        """Mean squared error of the prediction; prompts are dropped at random."""
        return self.losses(self.inputs(batch, noise), step)

    def inputs(self, batch: dict[str, Any], noise: SampleNoise) -> tuple[Noised, torch.Tensor, torch.Tensor | None]:
        """On the device: noised latents, what stands for the prompts (see `text`), and how much each pixel counts."""
        z = noised(
            self.components, to_device(batch["moments"], self.device), noise, self.snr_gamma,
            noise_offset=self.noise_offset,
        )  # fmt: skip
        emphasis = None
        if self.lesion_weight != 1:
            emphasis = 1 + (self.lesion_weight - 1) * to_device(batch["region"], self.device)
        return z, self.text(batch["text"], noise.rand() < self.text_dropout), emphasis

    def losses(self, given: tuple[Noised, torch.Tensor, torch.Tensor | None], step: int) -> Losses:
        """`loss` from tensors alone."""
        z, text, emphasis = given
        loss = diffusion.loss(self.trainable(z.latents, z.timesteps, text), z.target, z.weights, emphasis)
        return loss, {"loss": loss.detach()}

    def flops(self, side: int) -> float:
        """FLOPs of training on one image of `side` pixels, counted."""
        unet = self.components.unet.config
        cells = side // self.components.vae_scale_factor

        def step() -> torch.Tensor:
            latents = torch.empty(1, unet["in_channels"], cells, cells)
            text = torch.empty(1, MAX_LENGTH, unet["cross_attention_dim"])
            if self.model.text_encoder is not None:
                text = torch.zeros(1, MAX_LENGTH, dtype=torch.long)
            return self.losses((Noised(latents, torch.zeros(1).long(), latents, None), text, None), 0)[0]

        return flops.count(step, [self.model])

    def text(self, prompts: list[str], dropped: torch.Tensor) -> torch.Tensor:
        """What the model takes for B prompts, (B, …); for the empty prompt where `dropped` (B,)."""
        read = self.read_text([*prompts, ""])
        return torch.where(dropped.view(-1, *[1] * (read.ndim - 1)), read[-1:], read[:-1])

    def save(self, folder: Path) -> None:
        """Weights in diffusers' layout; of LoRA only the adapters."""
        if self.lora_rank is None:
            self.model.unet.save_pretrained(str(folder / "unet"))
        else:
            save_file(get_peft_model_state_dict(self.model.unet), str(folder / "unet_lora.safetensors"))
        if self.model.text_encoder is not None:
            self.model.text_encoder.save_pretrained(str(folder / "text_encoder"))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        if self.lora_rank is None:
            self.model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(str(folder / "unet")).state_dict())
        else:
            set_peft_model_state_dict(self.model.unet, load_file(str(folder / "unet_lora.safetensors")))
        if self.model.text_encoder is not None:
            saved = CLIPTextModel.from_pretrained(str(folder / "text_encoder"))
            self.model.text_encoder.load_state_dict(saved.state_dict())

    def validate(self) -> Image.Image:
        """Above real images, below what the model draws from their prompts."""
        parts = self.components
        pipeline = TigerPipeline(parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, parts.scheduler)
        real = torch.stack([item["image"] for item in self.shown])  # (B, 3, H, W)
        size = {"height": real.shape[2], "width": real.shape[3]}
        drawn = draw(pipeline, self.shown, self.validation_inference_steps, branches="none", **size)
        return image_grid([real / 2 + 0.5, drawn])

    def export(self, folder: Path) -> None:
        """A plain StableDiffusionPipeline, LoRA merged into its U-Net; the adapters too, for `load_lora_weights`.

        Written part by part: that class, when it is built, changes the scheduler's steps_offset.
        """
        parts = self.components
        if self.lora_rank is not None:
            adapters: Any = get_peft_model_state_dict(parts.unet)
            StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=adapters)
            parts = dataclasses.replace(parts, unet=merged(parts.unet))
        forget_calls(parts.tokenizer)
        for name in LAYOUT:
            getattr(parts, name).save_pretrained(str(folder / name))
        absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), (None, None))
        index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
        write_json(folder / "model_index.json", index | LAYOUT | absent | {"requires_safety_checker": False})


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of a U-Net with its LoRA adapters added to the weights they adapt."""
    whole = copy.deepcopy(unet)
    whole.fuse_lora()
    whole.unload_lora()
    return whole
