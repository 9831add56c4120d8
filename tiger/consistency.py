"""The distilled stage: LoRA teaches a copy of the U-Net to name the clean latents at once, from any noise level.

Latent consistency distillation (Luo et al. 2023, https://arxiv.org/abs/2310.04378), of adapters alone (LCM-LoRA, Luo
et al. 2023, https://arxiv.org/abs/2311.05556). The teacher, a fine-tuned model, takes one guided DDIM step; where the
student gets to from before that step should be where it gets to from behind it. Control encoders and fusion stay as
they are and serve both.
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tiger import diffusion, flops
from tiger.cache import TextCache, to_device
from tiger.coarse import merged
from tiger.components import Components
from tiger.errors import InputError
from tiger.fine import HALF, FineInputs, conditions_grid, read_prompts
from tiger.knowledge import Knowledge
from tiger.model import DualControlNet, Residuals, compile_blocks, unet_with_residuals
from tiger.optimizer import adamw
from tiger.pipeline import TigerPipeline
from tiger.stage import Losses, SampleNoise, noised
from tiger.terms import token_weights
from tiger.tokenizer import encode_text, forget_calls

HUBER = 1e-3  # where the pseudo-Huber loss turns from square to absolute, as in diffusers' LCM-LoRA example
# The layers that LoRA adapts: attention and its feed-forward part, and the convolutions.
ADAPTED = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
]  # fmt: skip


class Student(nn.Module):
    """The U-Net with its adapters, as a module that takes the residuals of the control encoders."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, residuals: Residuals
    ) -> torch.Tensor:
        """(B, C, h, w) noised latents -> (B, C, h, w), ε or v."""
        return unet_with_residuals(self.unet, latents, timesteps, states, residuals)


class ConsistencyStage:
    """Trains adapters on a copy of `components.unet`; `components` are a fine-tuned model's. See stage.Stage."""

    def __init__(
        self,
        components: Components,
        shown: list[dict[str, Any]],
        accelerator: Accelerator,
        *,
        lora_rank: int,
        guidance_scale: float,
        solver_steps: int,
        learning_rate: float,
        weight_decay: float,
        text_cache_size: int,
        validation_inference_steps: int,
        use_8bit_adam: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ):
        """shown: dataset items with images and conditions, for the validation grid.

        Raises InputError where the noise schedule does not allow it. In mixed precision the teacher is held in the
        lower one.
        """
        assert components.controlnet is not None
        self.components = components
        self.shown = shown
        self.accelerator = accelerator
        self.guidance_scale = guidance_scale
        self.validation_inference_steps = validation_inference_steps
        self.control: DualControlNet = components.controlnet
        self.knowledge = Knowledge.load(self.control.config["knowledge"])
        self.stride = stride_of(components, solver_steps)
        self.sampler: Any = LCMScheduler.from_config(components.scheduler.config, original_inference_steps=solver_steps)
        components.to(accelerator.device)
        self.read_text = TextCache(self.encode, text_cache_size, accelerator.device)
        unet = copy.deepcopy(components.unet)
        unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=ADAPTED))
        nn.Module.to(components.unet, dtype=HALF.get(accelerator.mixed_precision, torch.float32))
        self.model = Student(unet).train()
        self.trainable: nn.Module = self.model
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = [adamw(trained, learning_rate, weight_decay, use_8bit_adam)]
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if compile:
            for network in (components.unet, unet, self.control.fg, self.control.bg):
                compile_blocks(network)

    def encode(self, texts: list[str]) -> torch.Tensor:
        """(B,) prompts -> (B, L, D) hidden states."""
        return encode_text(texts, self.components.tokenizer, self.components.text_encoder)

    def begin_step(self, texts: Sequence[dict[str, str]]) -> None:
        """Nothing here depends on the whole batch: terms weigh as they do when images are drawn."""

    def loss(self, batch: dict[str, Any], noise: SampleNoise, step: int) -> Losses:
        """How far apart the student's two answers are."""
        return self.losses(*self.inputs(batch, noise))

    def inputs(self, batch: dict[str, Any], noise: SampleNoise) -> tuple[FineInputs, torch.Tensor]:
        """What the models take, on the device, and the empty prompt's states (1, L, D)."""
        device = self.accelerator.device
        names = ("moments", "mask", "region", "sobel")
        moments, mask, region, sobel = (to_device(batch[name], device) for name in names)
        z = noised(self.components, moments, noise, None, stride=self.stride)
        states, fg_states, bg_states, empty = read_prompts(self.read_text, batch)
        weights = self.term_weights(batch["text_fg"])
        return FineInputs(z, mask, region, sobel, states, fg_states, bg_states, weights), empty

    def term_weights(self, texts: list[str]) -> torch.Tensor | None:
        """Weights (B, L) of the FG prompts' tokens, as in the pipeline. None if off."""
        if self.control.term_weighting == "off":
            return None
        frequencies = self.control.term_frequencies
        weights = token_weights(texts, self.components.tokenizer, self.knowledge, frequencies)
        return to_device(weights, self.accelerator.device)

    def losses(self, given: FineInputs, empty: torch.Tensor) -> Losses:
        """`loss` from tensors alone: z at t, the teacher's z at t − stride, and what the student makes of each."""
        z, t = given.z.latents, given.z.timesteps
        before = (t - self.stride).clamp(min=0)
        with torch.no_grad(), self.control.embedded_conditions(given.mask, given.sobel) as (mask, sobel):
            given = dataclasses.replace(given, mask=mask, sobel=sobel)
            residuals = self.residuals(given, z, t)
            earlier = ddim_step(self.schedule, self.teach(given, empty, residuals), z, t, before)
            target = self.consistent(given, earlier, before, self.residuals(given, earlier, before))
        loss = pseudo_huber(self.consistent(given, z, t, residuals) - target)
        return loss, {"loss": loss.detach()}

    def residuals(self, given: FineInputs, latents: torch.Tensor, timesteps: torch.Tensor) -> Residuals:
        """What the control encoders add to the U-Net."""
        with self.accelerator.autocast():
            return self.control(
                latents, timesteps, given.fg_states, given.bg_states, given.mask, given.sobel,
                term_weights=given.term_weights,
            )  # fmt: skip

    def teach(self, given: FineInputs, empty: torch.Tensor, residuals: Residuals) -> torch.Tensor:
        """The teacher's guided ε or v (eq. 13: no control and no prompt in the unconditional branch)."""
        unet, z = self.components.unet, given.z
        cond = unet_with_residuals(unet, z.latents, z.timesteps, given.states, residuals).float()
        if self.guidance_scale == 1:
            return cond
        uncond = unet_with_residuals(unet, z.latents, z.timesteps, empty.expand_as(given.states), None).float()
        return torch.lerp(uncond, cond, self.guidance_scale)

    def consistent(
        self, given: FineInputs, latents: torch.Tensor, timesteps: torch.Tensor, residuals: Residuals
    ) -> torch.Tensor:
        """The student's clean latents: `c_skip·z_t + c_out·x₀`, which at t = 0 are z_t itself (paper eq. 9)."""
        output = self.trainable(latents, timesteps, given.states, residuals)
        clean, _ = clean_and_noise(self.schedule, output.float(), latents, timesteps)
        c_skip, c_out = self.sampler.get_scalings_for_boundary_condition_discrete(timesteps.view(-1, 1, 1, 1))
        return c_skip * latents + c_out * clean

    @property
    def schedule(self) -> diffusion.Scheduler:
        """The noise schedule of the teacher's training."""
        return self.components.noise_schedule

    def flops(self, side: int) -> float:
        """FLOPs of training on one image of `side` pixels, counted."""

        def step() -> torch.Tensor:
            given = FineInputs.empty(self.components, side, self.control.term_weighting)
            return self.losses(given, given.states)[0]

        return flops.count(step, [self.model, self.components.unet, self.control])

    def save(self, folder: Path) -> None:
        """The adapters."""
        save_file(get_peft_model_state_dict(self.model.unet), str(folder / "unet_lora.safetensors"))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        set_peft_model_state_dict(self.model.unet, load_file(str(folder / "unet_lora.safetensors")))

    def pipeline(self, unet: UNet2DConditionModel) -> TigerPipeline:
        """The whole model with a U-Net in the teacher's place."""
        parts = self.components
        return TigerPipeline(parts.vae, parts.text_encoder, parts.tokenizer, unet, self.sampler, self.control)

    def validate(self) -> Image.Image:
        """From above: real images, masks, Sobel maps, and what the student makes of those and the prompts."""
        with self.accelerator.autocast():
            pipeline = self.pipeline(self.model.unet)
            return conditions_grid(pipeline, self.shown, self.validation_inference_steps, guidance_scale=1.0)

    def export(self, folder: Path) -> None:
        """A TigerPipeline, the adapters merged into its U-Net; the adapters too, for `load_lora_weights`."""
        adapters: Any = get_peft_model_state_dict(self.model.unet)
        StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=adapters)
        forget_calls(self.components.tokenizer)
        self.pipeline(merged(self.model.unet)).save_pretrained(str(folder))


def stride_of(components: Components, solver_steps: int) -> int:
    """Timesteps in a step of the teacher. Raises InputError where it cannot walk the noise schedule so."""
    schedule = components.noise_schedule
    count = schedule.config["num_train_timesteps"]
    if count % solver_steps:
        raise InputError(f"--solver_steps {solver_steps}: must divide the {count} timesteps of the noise schedule")
    if schedule.config["prediction_type"] == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise InputError(
            f"--pretrained_model {components.source}: its noise schedule ends at a signal of zero, where a model that "
            "predicts ε cannot start"
        )
    return count // solver_steps


def clean_and_noise(
    schedule: diffusion.Scheduler, output: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x₀ and ε of `z_t = √ᾱ·x₀ + √(1−ᾱ)·ε`, (B, C, h, w) each, by a U-Net's ε or v; the inverse of diffusion.target."""
    signal, sigma = shares(schedule, timesteps)
    if schedule.config["prediction_type"] == "epsilon":
        return (latents - sigma * output) / signal, output
    return signal * latents - sigma * output, sigma * latents + signal * output


def ddim_step(
    schedule: diffusion.Scheduler,
    output: torch.Tensor,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    """DDIM without noise from timesteps (B,) to those before (Song et al. 2020, https://arxiv.org/abs/2010.02502)."""
    clean, noise = clean_and_noise(schedule, output, latents, timesteps)
    signal, sigma = shares(schedule, before)
    return signal * clean + sigma * noise


def shares(schedule: diffusion.Scheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """√ᾱ and √(1−ᾱ) at timesteps (B,): (B, 1, 1, 1) each."""
    alpha_bar = schedule.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def pseudo_huber(difference: torch.Tensor) -> torch.Tensor:
    """Mean of `√(d² + c²) − c` (Song & Dhariwal 2023, https://arxiv.org/abs/2310.14189, eq. 7): outliers weigh less."""
    return ((difference.square() + HUBER**2).sqrt() - HUBER).mean()
