"""The benchmark's reference steps: where the maths is ours, losses and gradients are ours too."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import awaken

from benchmarks import train_step
from benchmarks.train_step import Draws
from tiger import diffusion, flops
from tiger.stage import SampleNoise

SIZE = train_step.SIZES["tiny"]
BATCH = 3
TEXTS = ["malignant, solid", "benign, cystic", "malignant, solid"]


@pytest.fixture(scope="module")
def base() -> train_step.Components:
    return train_step.random_base(SIZE)


def batch_for(base: train_step.Components, mask: float) -> dict[str, Any]:
    """Images with their moments; the upper half of the masks is `mask`. Every prompt is the same for all branches."""
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(BATCH, 3, SIZE.side, SIZE.side, generator=generator) * 2 - 1
    masks = torch.zeros(BATCH, 1, SIZE.side, SIZE.side)
    masks[..., : SIZE.side // 2, :] = mask
    with torch.no_grad():
        moments = base.vae.encode(images).latent_dist.parameters
    texts: dict[str, Any] = dict.fromkeys(("text", "text_fg", "text_bg"), TEXTS)
    return texts | {"image": images, "moments": moments, "mask": masks, "region": masks, "sobel": images[:, :1].abs()}


def noise() -> SampleNoise:
    return SampleNoise(0, 0, range(BATCH), torch.device("cpu"))


def draws(base: train_step.Components) -> Draws:
    """What a stage draws from `noise()`."""
    source, shape = noise(), (base.unet.config["in_channels"], SIZE.side // 8, SIZE.side // 8)
    posterior, timesteps = source.randn(shape), diffusion.timesteps(source.rand(), 1000)
    return Draws(posterior, source.randn(shape), timesteps)


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """As one vector: before a normalisation some gradients are nothing but rounding."""
    own = dict(ours.named_parameters())
    pairs = [(own[name].grad, parameter.grad) for name, parameter in theirs.named_parameters()]
    assert all(a is not None and b is not None for a, b in pairs)
    mine, other = (torch.cat([gradient.flatten() for gradient in column]) for column in zip(*pairs, strict=True))
    assert (mine - other).norm() < 1e-5 * other.norm()


def fine(base: train_step.Components, **options: Any) -> train_step.FineStage:
    stage = train_step.fine_stage(base, Accelerator(cpu=True), term_weighting="off", text_dropout=0.0, **options)
    awaken(stage.model)
    return contiguous(stage)


def contiguous(stage: Any) -> Any:
    """A stage with weights laid out as the examples have them: other layouts sum in another order."""
    for module in (stage.model, stage.components.unet):
        torch.nn.Module.to(module, memory_format=torch.contiguous_format)
    return stage


def test_one_pass_of_diffusers_is_our_joint_step_with_summed_residuals_and_no_nodule(base):
    stage = fine(base, update="joint", fusion="sum", fg_dropout=0.0, bg_dropout=0.0)
    batch = batch_for(base, mask=0.0)  # no nodule: L_FG is 0 and L_BG is the mean over everything
    example = train_step.DiffusersControl(base, Accelerator(cpu=True))
    nets = example.trained[0].nets
    for net, own in zip(nets, (stage.model.fg, stage.model.bg), strict=True):
        net.load_state_dict(own.state_dict())
    (theirs,) = example.losses(example.tensors(batch), draws(base))
    ours, _ = stage.loss(batch, noise(), 0)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    for net, own in zip(nets, (stage.model.fg, stage.model.bg), strict=True):
        assert_same_gradients(own, net)


def test_two_passes_are_our_separate_step_with_one_branch_at_a_time(base):
    example = train_step.Published(base, Accelerator(cpu=True))
    batch = batch_for(base, mask=1.0)
    for branch, other, net in zip(("fg", "bg"), ("bg", "fg"), example.trained, strict=True):
        stage = fine(base, update="separate", fg_dropout=0.0, bg_dropout=0.0)
        setattr(stage, f"{other}_dropout", 1.0)  # the command line refuses this
        net.load_state_dict(getattr(stage.model, branch).state_dict())
        surrogate, logged = stage.loss(batch, noise(), 0)
        surrogate.backward()
        losses = list(example.losses(example.tensors(batch), draws(base)))
        mine = losses[0 if branch == "fg" else 1]
        torch.testing.assert_close(logged[f"loss_{branch}"], mine.detach())
        mine.backward()
        assert_same_gradients(getattr(stage.model, branch), net)


def test_text_to_image_is_our_coarse_step(base):
    stage = contiguous(train_step.coarse_stage(base, Accelerator(cpu=True), text_dropout=0.0))
    example = train_step.TextToImage(base, Accelerator(cpu=True))
    batch = batch_for(base, mask=0.0)
    (theirs,) = example.losses(example.tensors(batch), draws(base))
    ours, _ = stage.loss(batch, noise(), 0)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    assert_same_gradients(stage.model.unet, example.unet)


@pytest.mark.slow  # a minute and more on a slow processor
def test_the_others_do_more_work(base):
    """Two passes and no cache: more FLOPs than one pass and no cache, more than one pass and caches."""
    accelerator = Accelerator(cpu=True)
    published = train_step.Published(base, accelerator).flops(SIZE.side)
    control = train_step.DiffusersControl(base, accelerator)
    counted = control.flops(SIZE.side)
    assert published > counted > train_step.fine_stage(base, accelerator, update="joint").flops(SIZE.side)
    assert not control.schedule.alphas_cumprod.is_meta  # counting leaves no trace


@pytest.mark.slow  # seconds, on meta tensors
def test_mid_shares_its_work_out_as_stable_diffusion_does():
    """What caches save is the VAE and the text encoder: they must cost as much beside the U-Net."""

    def shares(size: train_step.Size) -> list[float]:
        cells = size.side // 8
        with torch.device("meta"):
            base = train_step.random_base(size)
        unet, vae, text = base.unet, base.vae, base.text_encoder
        for network in base.networks:
            network.requires_grad_(True)

        def denoised() -> torch.Tensor:
            states = torch.empty(1, train_step.MAX_LENGTH, size.text_width)
            return unet(torch.empty(1, 4, cells, cells), torch.zeros(1).long(), states).sample.sum()

        whole, encoded, read = (
            flops.count(run, [network])
            for run, network in (
                (denoised, unet),
                (lambda: vae.encode(torch.empty(1, 3, size.side, size.side)).latent_dist.mean.sum(), vae),
                (lambda: text(torch.zeros(1, train_step.MAX_LENGTH).long())[0].sum(), text),
            )
        )
        return [encoded / whole, read / whole]

    assert shares(train_step.SIZES["mid"]) == pytest.approx(shares(train_step.SIZES["sd21"]), rel=0.1)


@pytest.mark.slow  # a minute and more on a slow processor
def test_tables(capsys, monkeypatch):
    """Also: each variant counts its own steps, or "alternate" would always train the same encoder."""
    taken = []
    losses = train_step.FineStage.losses

    def noting(self, given, step, *scale):
        if not given.mask.is_meta:  # not while FLOPs are counted
            taken.append((self.update, step))
        return losses(self, given, step, *scale)

    monkeypatch.setattr(train_step.FineStage, "losses", noting)
    train_step.main(["--size", "tiny", "--repeats", "2", "--warmup", "0"])
    for update in train_step.UPDATES:  # as in training, and bare
        assert [step for name, step in taken if name == update] == [0, 0, 1, 1]
    printed = capsys.readouterr().out
    for name in ("published", "diffusers", "ours, separate", "ours, alternate", "ours, joint", "text2image"):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"| {name} |"))
        assert all(cell.strip() for cell in line.split("|")[2:6])
