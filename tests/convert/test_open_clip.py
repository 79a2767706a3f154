"""Against open_clip itself, where the environment variable MMPT_OPEN_CLIP_PYTHON names an interpreter that has it:

    python -m venv --system-site-packages /tmp/oc
    /tmp/oc/bin/pip install --no-deps open_clip_torch timm torchvision ftfy wcwidth
    MMPT_OPEN_CLIP_PYTHON=/tmp/oc/bin/python pytest tests/convert/test_open_clip.py

(--no-deps, where torch is there already.) Both ways of conversion, and 100 steps of training that continue in mmpt.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmpt import config
from mmpt.batch import Batch, Pictures, pack, pack_equal
from mmpt.cli import main
from mmpt.engine.build import EngineConfig, build
from mmpt.engine.optim import OptimConfig, learning_rate
from mmpt.engine.resume import find_checkpoint
from mmpt.engine.step import train_step
from mmpt.engine.weights import load_weights
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.method import Method, MethodConfig
from mmpt.methods.siglip import SigLIPConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.image import CLIP_MEAN, CLIP_STD, ViTConfig
from mmpt.models.resnet import ResNetConfig
from mmpt.models.text import TextTransformerConfig
from mmpt.models.transformer import TransformerConfig
from tests.convert.runs import recipe_of, save_run, word_tokenizer
from tests.ranks import run

PYTHON = os.environ.get("MMPT_OPEN_CLIP_PYTHON", "")
SCRIPT = Path(__file__).with_name("open_clip_side.py")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="MMPT_OPEN_CLIP_PYTHON names no interpreter with open_clip"),
    pytest.mark.slow,
]
BLOCKS, WORDS = TransformerConfig(128, 3, 2), TransformerConfig(64, 2, 1)
VIT = ViTConfig(BLOCKS, 32, 8)
TEXT = TextTransformerConfig(WORDS, 60, 16)
QUICK = replace(TEXT, trunk=replace(WORDS, activation="quick_gelu"))
RESNET = ResNetConfig((1, 2, 1, 1), 8, "modified", "attention", 48, 64, mean=CLIP_MEAN, std=CLIP_STD)
SIGLIP_BLOCKS = TransformerConfig(64, 2, 1, norm_eps=1e-6)
HALF = (0.5, 0.5, 0.5)
METHODS: dict[str, MethodConfig] = {
    "vit": CLIPConfig(DualTowerConfig(VIT, TEXT, 48)),
    "vit-quickgelu": CLIPConfig(
        DualTowerConfig(replace(VIT, trunk=replace(BLOCKS, activation="quick_gelu")), QUICK, 48)
    ),
    "resnet": CLIPConfig(DualTowerConfig(RESNET, QUICK, 48, project_image=False)),
    "siglip": SigLIPConfig(
        ViTConfig(SIGLIP_BLOCKS, 32, 8, class_token=False, patch_bias=True, norm_before=False, mean=HALF, std=HALF),
        TextTransformerConfig(SIGLIP_BLOCKS, 60, 16, causal=False),
    ),
}
END, STEPS, PAIRS, BATCHES = 59, 100, 8, 10


def texts(count: int, seed: int) -> list[Tensor]:
    """The end is the largest id, as CLIP's is; lengths are mixed, and one text has no pad."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [14, *torch.randint(1, 14, (count - 1,), generator=generator).tolist()]
    return [
        torch.cat([torch.tensor([58]), torch.randint(1, 58, (n,), generator=generator), torch.tensor([END])])
        for n in lengths
    ]


def padded(sequences: list[Tensor]) -> Tensor:
    out = torch.zeros(len(sequences), 16, dtype=torch.int64)
    for row, text in zip(out, sequences, strict=True):
        row[: len(text)] = text
    return out


def raw(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def open_clip(verb: str, folder: Path) -> None:
    done = subprocess.run([PYTHON, SCRIPT, verb, folder], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """open_clip's checkpoints and outputs; and what mmpt imported of each."""
    folder = tmp_path_factory.mktemp("open_clip")
    inputs = {"images": raw(4, 3, 32, 32, seed=1), "images64": raw(4, 3, 64, 64, seed=2), "texts": padded(texts(4, 3))}
    save_file(inputs, folder / "inputs.safetensors")
    open_clip("make", folder)
    for name, method in METHODS.items():
        config.save_yaml(recipe_of(method), folder / f"{name}.yaml")
        arguments = [str(folder / f"{name}.pt"), str(folder / name), "--as", str(folder / f"{name}.yaml")]
        assert main(["import", *arguments]) == 0
    return folder


def imported(folder: Path, name: str) -> Any:
    method = METHODS[name].build()
    checkpoint, manifest, _ = find_checkpoint(folder / name)
    load_weights(checkpoint, manifest, method)
    return method.eval()


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_import(made: Path, name: str) -> None:
    ours, theirs = imported(made, name), load_file(made / f"{name}.outputs.safetensors")
    inputs = load_file(made / "inputs.safetensors")
    images = Pictures(inputs["images64" if name == "resnet" else "images"])
    torch.testing.assert_close(ours.encode_image(images), theirs["image"], **TOLERANCE)
    ids = pack_equal(inputs["texts"]) if name == "siglip" else pack(texts(4, 3))
    torch.testing.assert_close(ours.encode_text(ids), theirs["text"], **TOLERANCE)
    torch.testing.assert_close(ours.logit_scale().reshape(1), theirs["scale"], **TOLERANCE)


@torch.no_grad()
def test_export(made: Path) -> None:
    """open_clip reads the folder as it is, with another tokenizer than CLIP's, and computes what we do."""
    (made / "tokenizer").mkdir()
    tokenizer = word_tokenizer(made / "tokenizer")
    names = [name for name in METHODS if name != "siglip"]
    for name in names:
        run_dir = save_run(made / f"{name}.run", recipe_of(METHODS[name], made / "tokenizer"), imported(made, name))
        assert main(["export", str(run_dir), str(made / f"{name}.exported"), "--to", "open_clip"]) == 0
    open_clip("read", made)
    inputs = load_file(made / "inputs.safetensors")
    words = [torch.tensor(tokenizer(text).input_ids) for text in ("w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w2 w2")]
    for name in names:
        ours, theirs = imported(made, name), load_file(made / f"{name}.read.safetensors")
        images = Pictures(inputs["images64" if name == "resnet" else "images"])
        torch.testing.assert_close(ours.encode_image(images), theirs["image"], **TOLERANCE)
        torch.testing.assert_close(ours.encode_text(pack(words)), theirs["text"], **TOLERANCE)
        back = made / f"{name}.back"
        assert main(["import", str(made / f"{name}.exported"), str(back), "--as", str(made / f"{name}.yaml")]) == 0
        other: Method = METHODS[name].build()
        checkpoint, manifest, _ = find_checkpoint(back)
        load_weights(checkpoint, manifest, other)
        for key, value in ours.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2, "warmup": 10, "steps": STEPS}


def test_training_continues_with_the_same_losses(made: Path) -> None:
    """The same 100 batches, fp32, AdamW with warm-up and cosine; open_clip's loss and schedule there, our engine here.
    The batches come back, so that there is something to learn."""
    save_file(
        {
            "images": raw(BATCHES, PAIRS, 3, 32, 32, seed=4),
            "texts": torch.stack([padded(texts(PAIRS, 100 + batch)) for batch in range(BATCHES)]),
        },
        made / "batches.safetensors",
    )
    (made / "settings.json").write_text(json.dumps(SETTINGS))
    open_clip("train", made)
    theirs = torch.tensor(json.loads((made / "losses.json").read_text()))
    ours = torch.tensor(run(continue_training, 1, str(made))[0])
    difference = (ours - theirs).abs().max().item()
    print(f"\nlosses {theirs[0]:.4f} to {theirs[-1]:.4f}; largest difference in {STEPS} steps: {difference:.1e}")
    assert theirs[-10:].mean() < theirs[:10].mean() - 1, "something is learned"
    assert difference < 1e-4


def continue_training(rank: int, world_size: int, folder: str) -> list[float]:
    made = Path(folder)
    optim = OptimConfig(
        lr=SETTINGS["lr"], betas=SETTINGS["betas"], eps=SETTINGS["eps"], weight_decay=SETTINGS["weight_decay"],
        warmup_steps=SETTINGS["warmup"],
    )  # fmt: skip
    method = imported(made, "vit").train()
    engine = build(method, EngineConfig(zero_stage=1, precision="fp32"), optim, PAIRS, torch.device("cpu"))
    batches, losses = load_file(made / "batches.safetensors"), []
    for step in range(STEPS):
        images, words = Pictures(batches["images"][step % BATCHES]), pack(texts(PAIRS, 100 + step % BATCHES))
        batch = Batch(images, words, torch.arange(PAIRS), ("",) * PAIRS)
        _, terms = train_step(engine, [batch], learning_rate(optim, step, STEPS))
        losses.append((terms["contrastive"].sum / terms["contrastive"].count).item())
    return losses
