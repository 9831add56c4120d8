"""The fine stage: FG-Encoder, BG-Encoder and fusion learn to steer the frozen coarse U-Net (paper eq. 5-15)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from tiger import diffusion, flops
from tiger.cache import TextCache, to_device
from tiger.components import Components, load_unet
from tiger.knowledge import Knowledge
from tiger.model import DualControlNet, Residuals, compile_blocks, separate_surrogate, unet_with_residuals
from tiger.optimizer import adamw
from tiger.pipeline import TigerPipeline
from tiger.stage import Losses, Noised, SampleNoise, draw, image_grid, noised
from tiger.terms import TermFrequencies, token_weights
from tiger.tokenizer import MAX_LENGTH, encode_text, forget_calls

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # accelerate's name -> dtype


@dataclass(frozen=True)
class FineInputs:
    """What the models take for a batch, on the device."""

    z: Noised
    mask: torch.Tensor  # (B, 1, H, W), 0 or 1
    region: torch.Tensor  # (B, 1, H, W), 0 or 1: where the map says nothing and L_FG is taken
    sobel: torch.Tensor  # (B, 1, H, W) in [0, 1]
    states: torch.Tensor  # (B, L, D) of the joint prompt, for the U-Net
    fg_states: torch.Tensor
    bg_states: torch.Tensor
    term_weights: torch.Tensor | None  # (B, L), for the FG-Encoder
    fg_keep: torch.Tensor | None = None  # (B,) bool, False where a branch is dropped; None: nowhere
    bg_keep: torch.Tensor | None = None

    @classmethod
    def empty(cls, components: Components, side: int, term_weighting: str) -> "FineInputs":
        """For one image of `side` pixels, of no particular values, on torch's default device."""
        unet = components.unet.config
        cells = side // components.vae_scale_factor
        latents = torch.empty(1, unet["in_channels"], cells, cells)
        states = torch.empty(1, MAX_LENGTH, unet["cross_attention_dim"])
        condition = torch.empty(1, 1, side, side)
        keep = torch.empty(1, dtype=torch.bool)
        return cls(
            z=Noised(latents, torch.empty(1, dtype=torch.long), latents, None),
            mask=condition,
            region=condition,
            sobel=condition,
            states=states,
            fg_states=states,
            bg_states=states,
            term_weights=None if term_weighting == "off" else torch.empty(1, MAX_LENGTH),
            fg_keep=keep,
            bg_keep=keep,
        )


class FineStage:
    """Trains a DualControlNet made from `components.unet`. See stage.Stage."""

    def __init__(
        self,
        components: Components,
        shown: list[dict[str, Any]],
        knowledge: Knowledge,
        accelerator: Accelerator,
        *,
        knowledge_name: str,
        term_weighting: str,
        fusion: str,
        fusion_gain: float,
        update: str,
        bg_region: str,
        learning_rate: float,
        weight_decay: float,
        snr_gamma: float | None,
        timestep_sampling: str,
        noise_offset: float,
        text_dropout: float,
        fg_dropout: float,
        bg_dropout: float,
        text_cache_size: int,
        validation_inference_steps: int,
        use_8bit_adam: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ):
        """shown: dataset items with images and conditions, for the validation grid.

        In mixed precision the U-Net, which is frozen and runs at every step, is held in the lower one; encoders, fusion
        and losses stay in float32. So do the VAE and the text encoder: they encode each image and prompt once.
        """
        self.components = components
        self.shown = shown
        self.knowledge = knowledge
        self.accelerator = accelerator
        self.update = update
        self.bg_region = bg_region
        self.snr_gamma = snr_gamma
        self.timestep_sampling = timestep_sampling
        self.noise_offset = noise_offset
        self.text_dropout, self.fg_dropout, self.bg_dropout = text_dropout, fg_dropout, bg_dropout
        self.validation_inference_steps = validation_inference_steps
        components.to(accelerator.device)
        self.read_text = TextCache(self.encode, text_cache_size, accelerator.device)
        self.model = DualControlNet.from_unet(
            components.unet,
            term_weighting=term_weighting,
            fusion=fusion,
            fusion_gain=fusion_gain,
            vae_scale_factor=components.vae_scale_factor,
            knowledge=knowledge_name,
        ).train()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # diffusers' wrapper hides `self`
        # Now that its encoder was copied. diffusers' own `to` would warn of parts to keep in float32, and list none.
        nn.Module.to(components.unet, dtype=HALF.get(accelerator.mixed_precision, torch.float32))
        if gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if compile:
            for network in (components.unet, self.model.fg, self.model.bg):
                compile_blocks(network)
        self.trainable: nn.Module = self.model
        groups = [list(part.parameters()) for part in (self.model.fg, self.model.bg, self.model.fusion)]
        self.optimizers = [
            adamw(parameters, learning_rate, weight_decay, use_8bit_adam)
            for parameters in groups
            if parameters  # a plain sum has none
        ]
        self.frequencies = TermFrequencies()  # τ of the current global batch

    def encode(self, texts: list[str]) -> torch.Tensor:
        """(B,) prompts -> (B, L, D) hidden states."""
        return encode_text(texts, self.components.tokenizer, self.components.text_encoder)

    def begin_step(self, texts: Sequence[dict[str, str]]) -> None:
        """Count the terms of the global batch for this step, and add them to the table that inference will use."""
        if self.model.term_weighting != "off":
            self.frequencies = TermFrequencies.of([text["text_fg"] for text in texts], self.knowledge)
            self.model.term_frequencies.update(self.frequencies)

    def loss(self, batch: dict[str, Any], noise: SampleNoise, step: int) -> Losses:
        """L_FG over the nodule's region and L_BG over the rest, each for the parameters that `update` gives it."""
        return self.losses(self.inputs(batch, noise), step, self.gradient_scale())

    def inputs(self, batch: dict[str, Any], noise: SampleNoise) -> "FineInputs":
        """What the models take, on the device: noised latents, conditions, prompts; what is dropped is drawn."""
        device = self.accelerator.device
        moments, mask, region, sobel = (
            to_device(batch[name], device) for name in ("moments", "mask", "region", "sobel")
        )
        z = noised(self.components, moments, noise, self.snr_gamma, self.timestep_sampling, self.noise_offset)
        dropped = noise.rand() < self.text_dropout
        states, fg_states, bg_states = self.states(batch, dropped)
        return FineInputs(
            z=z,
            mask=mask,
            region=region,
            sobel=sobel,
            states=states,
            fg_states=fg_states,
            bg_states=bg_states,
            term_weights=self.term_weights(batch["text_fg"], dropped),
            fg_keep=noise.rand() >= self.fg_dropout,
            bg_keep=noise.rand() >= self.bg_dropout,
        )

    def losses(self, given: "FineInputs", step: int, scale: float | torch.Tensor = 1.0) -> Losses:
        """`loss` from tensors alone. scale: see separate_surrogate."""
        z = given.z

        def control(paths: str) -> Any:
            return self.trainable(
                z.latents, z.timesteps, given.fg_states, given.bg_states, given.mask, given.sobel,
                term_weights=given.term_weights, fg_keep=given.fg_keep, bg_keep=given.bg_keep, paths=paths,
            )  # fmt: skip

        def decode(residuals: Residuals) -> torch.Tensor:
            return unet_with_residuals(self.components.unet, z.latents, z.timesteps, given.states, residuals)

        def losses(prediction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return diffusion.masked_losses(prediction, z.target, given.region, self.bg_region, z.weights)

        if self.update == "separate":
            for_fg, for_bg = control("split")
            loss, l_fg, l_bg = separate_surrogate(for_fg, for_bg, decode, losses, scale)
        elif self.update == "alternate":
            branch = "fg" if step % 2 == 0 else "bg"
            l_fg, l_bg = losses(decode(control(branch)))
            loss = l_fg if branch == "fg" else l_bg
        else:
            l_fg, l_bg = losses(decode(control("both")))
            loss = l_fg + l_bg
        l_fg, l_bg = l_fg.detach(), l_bg.detach()
        return loss, {"loss": l_fg + l_bg, "loss_fg": l_fg, "loss_bg": l_bg}

    def gradient_scale(self) -> float | torch.Tensor:
        """fp16's gradient scale, as a tensor: reading its value would wait for the device. 1 without fp16."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.accelerator.device))  # type: ignore

    def flops(self, side: int) -> float:
        """FLOPs of training on one image of `side` pixels, counted. Both steps of "alternate" have as many."""

        def step() -> torch.Tensor:
            return self.losses(FineInputs.empty(self.components, side, self.model.term_weighting), 0)[0]

        return flops.count(step, [self.model, self.components.unet])

    def states(self, batch: dict[str, Any], dropped: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hidden states (B, L, D) of the joint, FG and BG prompts; of the empty prompt where `dropped` (B,)."""
        *kinds, empty = read_prompts(self.read_text, batch)
        return tuple(torch.where(dropped[:, None, None], empty, states) for states in kinds)

    def term_weights(self, texts: list[str], dropped: torch.Tensor) -> torch.Tensor | None:
        """Weights (B, L) of the FG prompts' tokens; of the empty prompt's where `dropped` (B,). None if off."""
        if self.model.term_weighting == "off":
            return None
        weights = token_weights([*texts, ""], self.components.tokenizer, self.knowledge, self.frequencies)
        weights = to_device(weights, dropped.device)
        return torch.where(dropped[:, None], weights[-1:], weights[:-1])

    def save(self, folder: Path) -> None:
        """Encoders, fusion and term frequencies, each ControlNet in diffusers' layout."""
        self.model.save_pretrained(folder / "controlnet")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        saved = DualControlNet.from_pretrained(folder / "controlnet")
        self.model.load_state_dict(saved.state_dict())
        self.model.term_frequencies = saved.term_frequencies

    def pipeline(self) -> TigerPipeline:
        """The whole model as it stands."""
        parts = self.components
        return TigerPipeline(parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, parts.scheduler, self.model)

    def validate(self) -> Image.Image:
        """From above: real images, their masks, their Sobel maps, and what the model makes of those and the prompts."""
        with self.accelerator.autocast():
            return conditions_grid(self.pipeline(), self.shown, self.validation_inference_steps)

    def export(self, folder: Path) -> None:
        """A TigerPipeline, with the U-Net as it was loaded, not as mixed precision rounded it."""
        pipeline = self.pipeline()
        if self.components.unet.dtype != torch.float32:
            pipeline.register_modules(unet=load_unet(self.components.source))
        forget_calls(pipeline.tokenizer)
        pipeline.save_pretrained(str(folder))


def read_prompts(read_text: TextCache, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Hidden states of a batch's joint, FG and BG prompts, (B, L, D) each, and of the empty one, (1, L, D)."""
    return read_text([*batch["text"], *batch["text_fg"], *batch["text_bg"], ""]).split(len(batch["text"]))


def conditions_grid(
    pipeline: TigerPipeline, shown: Sequence[dict[str, Any]], steps: int, **options: Any
) -> Image.Image:
    """From above: real images, their masks, their Sobel maps, and what the model makes of those and the prompts."""
    real, masks, maps = (torch.stack([item[key] for item in shown]) for key in ("image", "mask", "sobel"))
    drawn = draw(pipeline, shown, steps, masks=masks, maps=maps, **options)
    return image_grid([real / 2 + 0.5, masks, maps, drawn])
