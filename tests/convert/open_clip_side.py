"""What open_clip does in tests/convert/test_open_clip.py, run by the interpreter that MMPT_OPEN_CLIP_PYTHON names.

    open_clip_side.py make FOLDER      checkpoints of small random models, and their outputs for the inputs in FOLDER
    open_clip_side.py train FOLDER     continue a checkpoint on the batches in FOLDER, open_clip's loss and schedule
    open_clip_side.py read FOLDER      outputs of the models that mmpt exported to FOLDER

It knows nothing of mmpt.
"""

import json
import sys
from pathlib import Path

import torch

# Only image transforms are needed of torchvision, whose compiled part may not match a CPU build of torch.
_register_fake = torch.library.register_fake
torch.library.register_fake = lambda op, *a, **k: (
    (lambda f: f) if isinstance(op, str) and op.startswith("torchvision::") else _register_fake(op, *a, **k)
)
import open_clip  # noqa: E402
from open_clip.loss import ClipLoss  # noqa: E402
from open_clip_train.scheduler import cosine_lr  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXT = {"context_length": 16, "vocab_size": 60, "width": 64, "heads": 1, "layers": 2}
VIT = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 128}
MODELS = {
    "vit": {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit-quickgelu": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "resnet": {
        "embed_dim": 48, "quick_gelu": True, "text_cfg": TEXT,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8},
    },
}  # fmt: skip


def pixels(raw: torch.Tensor, mean: tuple = MEAN, std: tuple = STD) -> torch.Tensor:
    return (raw.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def shake(model: torch.nn.Module) -> None:
    """No norm at one, no bias at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, value in model.state_dict().items():
            if "running" in name:
                value.copy_(torch.rand_like(value) + 0.5)


@torch.no_grad()
def outputs(
    model: torch.nn.Module, raw: torch.Tensor, texts: torch.Tensor, half: bool = False
) -> dict[str, torch.Tensor]:
    model.eval()
    images = pixels(raw, (0.5,) * 3, (0.5,) * 3) if half else pixels(raw)
    found = {
        "image": model.encode_image(images, normalize=True), "text": model.encode_text(texts, normalize=True),
        "scale": model.logit_scale.exp().reshape(1),
    }  # fmt: skip
    return {name: value.contiguous() for name, value in found.items()}


def siglip() -> torch.nn.Module:
    """CustomTextCLIP's parts at a size that timm has no name for."""
    from open_clip.model import LayerNorm, TextTransformer
    from timm.models.vision_transformer import VisionTransformer

    model = torch.nn.Module()
    model.visual, model.text = torch.nn.Module(), TextTransformer(
        context_length=16, vocab_size=60, width=64, heads=1, layers=2, output_dim=64, no_causal_mask=True,
        proj_bias=True, pool_type="last", norm_layer=lambda width: LayerNorm(width, eps=1e-6),
    )  # fmt: skip
    model.visual.trunk = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=1,
        class_token=False,
        global_pool="map",
        num_classes=0,
    )
    model.logit_scale, model.logit_bias = (torch.nn.Parameter(torch.tensor(x)) for x in (2.3, -10.0))
    normal = torch.nn.functional.normalize
    model.encode_image = lambda x, normalize: normal(model.visual.trunk(x), dim=-1)
    model.encode_text = lambda x, normalize: normal(model.text(x), dim=-1)
    return model


def make(folder: Path) -> None:
    inputs = load_file(folder / "inputs.safetensors")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        shake(model)
        raw = inputs["images64"] if name == "resnet" else inputs["images"]
        save_file(outputs(model, raw, inputs["texts"]), folder / f"{name}.outputs.safetensors")
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"epoch": 1, "name": name, "state_dict": state, "optimizer": {"state": {}}}, folder / f"{name}.pt")
    torch.manual_seed(0)
    model = siglip()
    shake(model)
    save_file(outputs(model, inputs["images"], inputs["texts"], half=True), folder / "siglip.outputs.safetensors")
    torch.save({"state_dict": model.state_dict()}, folder / "siglip.pt")


def train(folder: Path) -> None:
    """The parts of open_clip_train that make a step: its groups, AdamW, schedule, loss and the clamp of the scale."""
    settings = json.loads((folder / "settings.json").read_text())
    model = open_clip.CLIP(**MODELS["vit"])
    state = torch.load(folder / "vit.pt", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    model.train()

    def bare(name: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if bare(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not bare(n, p)], "weight_decay": settings["weight_decay"]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"])
    steps = settings["steps"]
    schedule, loss_of = cosine_lr(optimizer, settings["lr"], settings["warmup"], steps), ClipLoss()
    batches, losses = load_file(folder / "batches.safetensors"), []
    for step in range(steps):
        schedule(step)
        optimizer.zero_grad()
        batch = step % len(batches["images"])
        image, text, scale = model(pixels(batches["images"][batch]), batches["texts"][batch])
        loss = loss_of(image, text, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        losses.append(loss.item())
    (folder / "losses.json").write_text(json.dumps(losses))


def read(folder: Path) -> None:
    inputs = load_file(folder / "inputs.safetensors")
    for name in MODELS:
        path = folder / f"{name}.exported"
        model = open_clip.create_model(f"local-dir:{path}")
        raw = inputs["images64"] if name == "resnet" else inputs["images"]
        texts = open_clip.get_tokenizer(f"local-dir:{path}")(["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w2 w2"])
        save_file(outputs(model, raw, texts), folder / f"{name}.read.safetensors")
        with open(path / "open_clip_config.json") as file:
            assert tuple(json.load(file)["preprocess_cfg"]["mean"]) == MEAN


if __name__ == "__main__":
    {"make": make, "train": train, "read": read}[sys.argv[1]](Path(sys.argv[2]))
