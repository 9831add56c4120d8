"""Two processes (gloo) that share out what they train by FSDP2: the same training as one process that has all.

Minutes, most of them torch's own start of sharding, and once in many runs an abort inside torch (docs/log.md): by hand.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from processes import launch, nothing, shard
from safetensors.torch import load_file
from training_samples import differing, flags, save_base, save_data

from tiger import checkpoint, finetune, pretrain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[1]
UNET = "unet/diffusion_pytorch_model.safetensors"
ENCODER = "controlnet/fg/diffusion_pytorch_model.safetensors"


def fsdp2(rank: int) -> None:
    shard(ROOT / "configs" / "accelerate" / "fsdp2.yaml")


def bf16(rank: int) -> None:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"


def zero2_bf16(rank: int) -> None:
    bf16(rank)
    shard(ROOT / "configs" / "accelerate" / "zero2.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


COARSE, FINE = (pretrain.main, UNET), (finetune.main, ENCODER)
KINDS = {
    "coarse": (*COARSE, {"train_text_encoder": "true"}),
    "lora": (*COARSE, {"lora_rank": 2}),
    "separate": (*FINE, {}),
    "alternate": (*FINE, {"update": "alternate", "fusion": "iaff"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_shared_out_it_trains_as_one_and_resumes_bit_equal(kind, base, data, tmp_path):
    main, weights, options = KINDS[kind]
    argv = flags(
        pretrained_model=base, data_dir=data, checkpointing_steps=2, validation_steps=3, learning_rate=1e-4,
        max_train_steps=3, use_ema="true", max_grad_norm=0.01, cache_dir=tmp_path / "cache", **options,
    )  # fmt: skip
    main([*argv, f"--output_dir={tmp_path / 'one'}", "--train_batch_size=4"])

    def run(name: str) -> None:
        two = [*argv, f"--output_dir={tmp_path / name}", "--train_batch_size=1", "--gradient_accumulation_steps=2"]
        codes = launch(main, two, 2, tmp_path, fsdp2, seconds=900)
        assert codes == [0, 0], [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]

    run("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    run("cut")
    one, two = (read_log(tmp_path / run) for run in ("one", "whole"))
    assert [line["step"] for line in two] == [1, 2, 3]  # written once
    for name in [name for name in one[0] if name.startswith("loss")] + ["grad_norm"]:
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4)
    last = "checkpoint-3"
    files = {path.relative_to(tmp_path / "one" / last) for path in (tmp_path / "one" / last).rglob("*")}
    assert {path.relative_to(tmp_path / "whole" / last) for path in (tmp_path / "whole" / last).rglob("*")} == files
    assert checkpoint.newest_valid(tmp_path / "whole") == tmp_path / "whole" / last
    assert (tmp_path / "whole" / "validation" / "step-3.png").exists()
    for name in [Path(last) / name for name in files if name.suffix == ".safetensors"] + [Path(weights)]:
        expected, found = load_file(tmp_path / "one" / name), load_file(tmp_path / "whole" / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, atol=1e-5), (name, key)
        assert not differing(tmp_path / "whole" / name, tmp_path / "cut" / name), name


def test_half_precision_is_the_same_with_and_without_sharding(base, data, tmp_path):
    """Computed under autocast in both, and what is trained stays in float32.

    The first step alone is compared. Gradients carry a rounding that depends on how a batch is cut up, yet less of it
    than where FSDP's own policy lowers every layer.
    """
    argv = flags(
        pretrained_model=base, data_dir=data, checkpointing_steps=2, validation_steps=2, learning_rate=1e-4,
        cache_dir=tmp_path / "cache", gradient_checkpointing="true",
    )  # fmt: skip
    first = {}
    for name, world, prepare in (("exact", 1, nothing), ("one", 1, bf16), ("two", 2, zero2_bf16)):
        cut = [f"--output_dir={tmp_path / name}", f"--train_batch_size={4 // world}"]
        codes = launch(pretrain.main, [*argv, *cut], world, tmp_path, prepare, seconds=900)
        assert codes == [0] * world, (tmp_path / "0.txt").read_text()
        first[name] = read_log(tmp_path / name)[0]
    exact, one, two = (first[name]["loss"] for name in ("exact", "one", "two"))
    assert abs(two - one) < 0.2 * abs(one - exact)
    assert first["two"]["grad_norm"] == pytest.approx(first["one"]["grad_norm"], rel=3e-4)
    weights = load_file(tmp_path / "two" / "checkpoint-2" / UNET)
    assert {value.dtype for value in weights.values()} == {torch.float32}
