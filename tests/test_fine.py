"""What a training step must not do: wait for the device, remember what nobody needs, lose precision or memory."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import awaken
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from training_samples import SIDE, differing, save_base, save_data

from benchmarks import train_step
from tiger import manifest
from tiger.components import load_components
from tiger.dataset import TigerDataset
from tiger.stage import SampleNoise

SIZE = train_step.SIZES["tiny"]
BATCH = 3
STAGES = ("separate", "alternate", "joint", "coarse")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base() -> train_step.Components:
    return train_step.random_base(SIZE)


@pytest.fixture
def bf16() -> Iterator[Accelerator]:
    """An accelerator in mixed precision; accelerate allows one precision a process, hence the resets."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


def make_stage(base: train_step.Components, kind: str, accelerator: Accelerator | None = None, **options: Any) -> Any:
    """The coarse stage, or the fine one with one of its updates, all parts awake."""
    accelerator = accelerator or Accelerator(cpu=True)
    if kind == "coarse":
        return train_step.coarse_stage(base, accelerator, **options)
    torch.manual_seed(0)
    stage = train_step.fine_stage(base, accelerator, update=kind, **options)
    awaken(stage.model)
    return stage


def make_batch(base: train_step.Components) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    cells, channels = SIZE.side // 8, base.unet.config["in_channels"]
    mask = torch.zeros(BATCH, 1, SIZE.side, SIZE.side)
    mask[..., 10:30, 20:50] = 1
    texts = ["malignant, papillary, solid", "benign, cystic", "malignant, follicular, uneven thick halo"]
    return {
        "moments": torch.randn(BATCH, 2 * channels, cells, cells, generator=generator),
        "mask": mask,
        "region": mask,
        "sobel": torch.rand(mask.shape, generator=generator),
        "text": texts, "text_fg": texts, "text_bg": ["more detail"] * BATCH,
    }  # fmt: skip


def noise() -> SampleNoise:
    return SampleNoise(0, 0, range(BATCH), CPU)


def gradients(stage: Any, batch: dict[str, Any], step: int = 0) -> dict[str, torch.Tensor]:
    stage.model.zero_grad()
    stage.loss(batch, noise(), step)[0].backward()
    return {name: p.grad.clone() for name, p in stage.model.named_parameters() if p.grad is not None}


class NoReading(TorchDispatchMode):
    """Raises where the host wants to know a value, for which it would wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITS:
            raise AssertionError(f"{func} reads a value")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_reading() -> Iterator[None]:
    """The same for methods that read memory without an operator."""
    with pytest.MonkeyPatch.context() as patch, NoReading():
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"):

            def refuse(*_: Any, name: str = name, **__: Any) -> None:
                raise AssertionError(f"Tensor.{name} reads a value")

            patch.setattr(torch.Tensor, name, refuse)
        yield


@pytest.mark.parametrize("kind", STAGES)
def test_no_step_waits_for_the_device(kind, base):
    stage, batch = make_stage(base, kind, snr_gamma=5.0), make_batch(base)
    parameters = list(stage.model.parameters())
    texts = [{"text_fg": text} for text in batch["text_fg"]]

    def step() -> None:
        stage.begin_step(texts)
        stage.loss(batch, noise(), 0)[0].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in stage.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step()  # fills the text cache
    with no_reading():
        step()


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, lambda x: x.nonzero(), lambda x: x.cpu()])
def test_reading_is_noticed(read: Callable[[torch.Tensor], Any]):
    with pytest.raises(AssertionError, match="reads a value"), no_reading():
        read(torch.ones(()))


@contextlib.contextmanager
def counting_saved(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, int]]:
    """How many tensors each of some modules keeps for the backward pass."""
    counts, inside = dict.fromkeys(modules, 0), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for name in inside:
            counts[name] += 1
        return tensor

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(module.register_forward_hook(lambda *_, name=name: inside.remove(name)))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("update", train_step.UPDATES)
def test_the_frozen_encoder_keeps_nothing_for_the_backward_pass(update, base):
    stage = make_stage(base, update)
    unet, model = stage.components.unet, stage.model
    down = {f"down {index}": block for index, block in enumerate(unet.down_blocks)}
    rest = {"middle": unet.mid_block, "up": unet.up_blocks[-1], "fg": model.fg, "bg": model.bg}
    with counting_saved(down | rest) as counts:
        stage.loss(make_batch(base), noise(), 0)
    assert not any(counts[name] for name in down)
    assert counts["middle"] == 0  # residuals join behind it
    assert counts["up"] and counts["fg"] and bool(counts["bg"]) is (update != "alternate")


@pytest.mark.parametrize("kind", ["separate", "coarse"])
def test_convolutions_lie_as_gpus_like_them_and_adamw_is_one_kernel(kind, base):
    stage = make_stage(base, kind)
    for network in (*stage.components.networks, stage.model):
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(optimizer.defaults["fused"] for optimizer in stage.optimizers)


@pytest.mark.parametrize("kind", STAGES)
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(kind, base):
    plain = make_stage(base, kind)
    saving = make_stage(base, kind, gradient_checkpointing=True)
    saving.model.load_state_dict(plain.model.state_dict())
    batch, kept, expected = make_batch(base), [], []
    for stage in (plain, saving):
        with counting_saved({"model": stage.model}) as counts:
            expected.append(gradients(stage, batch))
        kept.append(counts["model"])
    assert kept[1] < kept[0] / 2
    assert expected[0].keys() == expected[1].keys()
    for name, gradient in expected[0].items():
        assert torch.equal(gradient, expected[1][name])


@pytest.mark.parametrize("kind", ["separate", "joint", "coarse"])
def test_bf16_holds_what_is_frozen_low_and_what_is_trained_high(kind, base, bf16):
    exact, batch = make_stage(base, kind, bf16), make_batch(base)  # not prepared: no autocast
    if kind != "coarse":
        torch.nn.Module.to(exact.components.unet, torch.float32)
    _, expected = exact.loss(batch, noise(), 0)
    stage = make_stage(base, kind, bf16)
    stage.trainable = bf16.prepare(stage.trainable)
    loss, logged = stage.loss(batch, noise(), 0)
    bf16.backward(loss)
    assert logged["loss"].dtype == torch.float32
    torch.testing.assert_close(logged, expected, rtol=0.05, atol=0.0)
    assert logged["loss"] != expected["loss"]  # it did run in bf16
    frozen = torch.float32 if kind == "coarse" else torch.bfloat16
    assert {p.dtype for p in stage.components.unet.parameters()} == {frozen}
    for parameter in stage.model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or (parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all())


def test_bf16_draws_its_grid_and_saves_the_u_net_as_it_was_loaded(bf16, tmp_path):
    source = save_base(tmp_path / "base")
    stage = train_step.fine_stage(load_components(str(source)), bf16)
    stage.shown = [TigerDataset(manifest.read(save_data(tmp_path / "data", 1)), SIDE, with_conditions=True)[0]]
    stage.trainable = bf16.prepare(stage.trainable)
    assert stage.validate().size == (SIDE, 4 * SIDE)
    stage.export(tmp_path / "out")
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert not differing(tmp_path / "out" / weights, source / weights)


@pytest.mark.slow  # compiles for minutes
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["separate", "coarse"])
def test_compiled_blocks_give_the_same(kind, base):
    plain = make_stage(base, kind)
    fast = make_stage(base, kind, compile=True)
    assert fast.model.state_dict().keys() == plain.model.state_dict().keys()  # names of saved weights
    fast.model.load_state_dict(plain.model.state_dict())
    network = fast.model.fg if kind == "separate" else fast.model.unet
    compiled = [part for part in network.modules() if part._compiled_call_impl is not None]
    assert {type(part).__name__ for part in compiled} == {"ResnetBlock2D", "BasicTransformerBlock"}
    batch = make_batch(base)
    expected, got = gradients(plain, batch), gradients(fast, batch)
    assert expected.keys() == got.keys()
    rounding = 1e-6 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()  # some are nothing else
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() < 1e-3 * gradient.norm() + rounding, name
    assert fast.flops(SIZE.side) == plain.flops(SIZE.side)


def test_stages_do_not_share_what_they_were_made_from(base):
    """The tests above build many stages from one base."""
    before = copy.deepcopy(base.unet.state_dict())
    stage = make_stage(base, "coarse")
    with torch.no_grad():
        stage.model.unet.conv_in.weight.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
