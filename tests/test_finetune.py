"""Fine-Training from its command line, on tiny random models of every layout."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import LAYOUTS, awaken
from diffusers import ControlNetModel
from PIL import Image
from training_samples import SIDE, differing, flags, save_base, save_data

from tiger import finetune, manifest
from tiger.components import load_components
from tiger.config import FinetuneConfig, parse
from tiger.dataset import TigerDataset, cache_latents
from tiger.errors import InputError
from tiger.fine import FineStage
from tiger.knowledge import Knowledge
from tiger.model import DualControlNet
from tiger.pipeline import TigerPipeline
from tiger.stage import SampleNoise

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {layout: save_base(tmp_path_factory.mktemp(layout), layout) for layout in LAYOUTS}


def train(base: Path, data: Path, output_dir: Path, **values: object) -> None:
    finetune.main(flags(pretrained_model=base, data_dir=data, output_dir=output_dir, **values))


def test_every_layout_trains_and_loads(layout, bases, data, tmp_path):
    train(bases[layout], data, tmp_path, snr_gamma=5, use_ema="true", validation_steps=2, fg_dropout=0, bg_dropout=0)
    assert not differing(tmp_path / "unet" / WEIGHTS, bases[layout] / "unet" / WEIGHTS)  # the U-Net stays as it was
    for encoder in ("fg", "bg"):
        net = ControlNetModel.from_pretrained(tmp_path / "controlnet" / encoder)  # plain diffusers
        assert net.controlnet_mid_block.weight.any()  # trained away from zero
    pipe = TigerPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.controlnet, DualControlNet)
    counts = json.loads((tmp_path / "controlnet" / "term_frequencies.json").read_text())
    assert counts["solid"] > 0
    with Image.open(tmp_path / "validation" / "step-2.png") as grid:
        assert grid.size == (2 * SIDE, 4 * SIDE)  # two images; real, mask, map, generated
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["loss_fg"] < 10 and 0 < line["loss_bg"] < 10 for line in lines)


@pytest.mark.parametrize("update", ["separate", "alternate", "joint"])
def test_both_encoders_and_the_fusion_are_trained_and_resume_is_bit_equal(update, bases, data, tmp_path):
    options = {"update": update, "use_ema": "true", "fusion": "iaff", "checkpointing_steps": 2}
    train(bases["tiny"], data, tmp_path / "whole", max_train_steps=4, **options)
    train(bases["tiny"], data, tmp_path / "cut", max_train_steps=2, **options)
    train(bases["tiny"], data, tmp_path / "cut", max_train_steps=4, **options)
    for part in ("fg", "bg", "fusion"):
        whole, cut = (tmp_path / run / "controlnet" / part / WEIGHTS for run in ("whole", "cut"))
        assert not differing(whole, cut)
        assert differing(whole, tmp_path / "whole" / "checkpoint-2" / "controlnet" / part / WEIGHTS)
    frequencies = [(tmp_path / run / "controlnet" / "term_frequencies.json").read_text() for run in ("whole", "cut")]
    assert frequencies[0] == frequencies[1]
    for name in ("optimizer-0", "optimizer-1", "optimizer-2", "ema"):
        first, second = (tmp_path / run / "checkpoint-4" / f"{name}.safetensors" for run in ("whole", "cut"))
        assert not differing(first, second)


def test_two_processes_may_leave_an_encoder_without_gradients(bases, data, tmp_path):
    """alternate trains one encoder a step, which DistributedDataParallel refuses unless it is told."""
    argv = flags(
        pretrained_model=bases["tiny"], data_dir=data, output_dir=tmp_path, update="alternate", term_weighting="off"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tiger.finetune", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert (tmp_path / "model_index.json").exists()


def make_stage(base: Path, data: Path, tmp_path: Path, **values: object) -> tuple[FineStage, dict]:
    """A stage whose every part matters, and a batch of four for it."""
    config = parse(FinetuneConfig, flags(pretrained_model=base, data_dir=data, output_dir=tmp_path, **values))
    parts = load_components(str(base))
    stage = finetune.make_stage(config, parts, [], Knowledge.load("thyroid"), Accelerator(cpu=True))
    awaken(stage.model)
    dataset = TigerDataset(manifest.read(data), SIDE, with_conditions=True)
    dataset.latents = cache_latents(parts.vae, dataset, tmp_path / "cache")
    batch = torch.utils.data.default_collate([dataset[i] for i in (0, 4, 5, 6)])
    stage.begin_step([dataset.texts(i) for i in (0, 4, 5, 6)])
    return stage, batch


def gradients(stage: FineStage, batch: dict, step: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """What one loss leaves in each part."""
    stage.model.zero_grad()
    loss, _ = stage.loss(batch, SampleNoise(0, 0, range(4), torch.device("cpu")), step)
    loss.backward()
    parts = {"fg": stage.model.fg, "bg": stage.model.bg, "fusion": stage.model.fusion}
    return {
        name: {key: p.grad.clone() for key, p in part.named_parameters() if p.grad is not None}
        for name, part in parts.items()
    }


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-6) for key in a)


def test_separate_gives_each_encoder_the_gradient_of_its_own_loss(bases, data, tmp_path):
    """Alternate takes one loss at a time by plain backward, which is what separate must equal in one pass."""
    options = {"fg_dropout": 0.3, "bg_dropout": 0.3, "text_dropout": 0.3}
    separate, batch = make_stage(bases["tiny"], data, tmp_path / "a", update="separate", **options)
    alternate, _ = make_stage(bases["tiny"], data, tmp_path / "b", update="alternate", **options)
    alternate.model.load_state_dict(separate.model.state_dict())
    both = gradients(separate, batch)
    fg_only, bg_only = gradients(alternate, batch, step=0), gradients(alternate, batch, step=1)
    assert not fg_only["bg"] and not bg_only["fg"]  # one encoder a step
    assert close(both["fg"], fg_only["fg"]) and close(both["bg"], bg_only["bg"])
    summed = {key: value + bg_only["fusion"][key] for key, value in fg_only["fusion"].items()}
    assert close(both["fusion"], summed)


def test_joint_gives_everything_the_gradient_of_the_sum(bases, data, tmp_path):
    separate, batch = make_stage(bases["tiny"], data, tmp_path / "a", update="separate")
    joint, _ = make_stage(bases["tiny"], data, tmp_path / "b", update="joint")
    joint.model.load_state_dict(separate.model.state_dict())
    a, b = gradients(separate, batch), gradients(joint, batch)
    assert close(a["fusion"], b["fusion"])
    assert not close(a["fg"], b["fg"]) and not close(a["bg"], b["bg"])


def test_term_weighting_reaches_the_foreground_encoder(bases, data, tmp_path):
    weighted, batch = make_stage(bases["tiny"], data, tmp_path / "a", term_weighting="mult", text_dropout=0)
    plain, _ = make_stage(bases["tiny"], data, tmp_path / "b", term_weighting="off", text_dropout=0)
    plain.model.load_state_dict(weighted.model.state_dict())
    losses = [s.loss(batch, SampleNoise(0, 0, range(4), torch.device("cpu")), 0)[1]["loss"] for s in (weighted, plain)]
    assert losses[0] != losses[1]
    assert weighted.model.term_frequencies.counts["uneven thick halo"] == 1
    assert not plain.model.term_frequencies.counts


def test_a_dropped_prompt_is_the_empty_one_everywhere(bases, data, tmp_path):
    stage, batch = make_stage(bases["tiny"], data, tmp_path)
    dropped = torch.tensor([True, False, False, True])
    empty = stage.read_text([""])[0]
    for states in stage.states(batch, dropped):
        assert torch.equal(states[0], empty) and torch.equal(states[3], empty) and not torch.equal(states[1], empty)
    weights = stage.term_weights(batch["text_fg"], dropped)
    assert weights is not None
    assert weights[0].unique().numel() == 1 and weights[1].max() > 3  # a particular term weighs 3.1


def test_background_loss_over_everything(bases, data, tmp_path):
    def loss_bg(folder: str, region: str) -> torch.Tensor:
        stage, batch = make_stage(bases["tiny"], data, tmp_path / folder, bg_region=region)
        return stage.loss(batch, SampleNoise(0, 0, range(4), torch.device("cpu")), 0)[1]["loss_bg"]

    assert loss_bg("a", "outside") != loss_bg("b", "full")


def test_conditions_and_vocabulary_must_not_change_on_resume(bases, data, tmp_path):
    """What their names stand for counts, as it does for images (tests/test_pretrain.py)."""
    rows = shutil.copytree(data, tmp_path / "data")
    words = tmp_path / "thyroid.yaml"
    text = (ROOT / "configs" / "knowledge" / "thyroid.yaml").read_text()
    words.write_text(text)
    given = {"pretrained_model": bases["tiny"], "data_dir": rows, "output_dir": tmp_path / "out", "knowledge": words}
    finetune.main(flags(**given, max_train_steps=1))
    longer = flags(**given, max_train_steps=2, dry_run="true")
    finetune.main(longer)
    for column, named in (("condition_fg", "masks"), ("condition_bg", "edge maps")):
        files = [rows / column / f"{number}.png" for number in (0, 1)]
        before = files[0].read_bytes()
        files[0].write_bytes(files[1].read_bytes())
        with pytest.raises(InputError, match=f"on other inputs: {named} was "):
            finetune.main(longer)
        files[0].write_bytes(before)
    assert "uneven thick halo" in text
    words.write_text(text.replace("uneven thick halo", "halo of uneven width"))
    with pytest.raises(InputError, match="terms in the prompts was "):
        finetune.main(longer)


def test_missing_conditions_are_listed(bases, tmp_path):
    folder = save_data(tmp_path / "data", 8)
    (folder / "condition_fg" / "2.png").unlink()
    Image.new("L", (SIDE, SIDE)).save(folder / "condition_fg" / "3.png")  # an empty mask
    with pytest.raises(InputError) as error:
        train(bases["tiny"], folder, tmp_path / "out")
    assert "condition_fg/2.png" in str(error.value) and "3.png" in str(error.value)


def test_dry_run_counts_what_is_trained(bases, data, tmp_path, capsys):
    train(bases["tiny"], data, tmp_path / "out", dry_run="true", update="alternate")
    assert "M parameters trained" in capsys.readouterr().out and not (tmp_path / "out").exists()
