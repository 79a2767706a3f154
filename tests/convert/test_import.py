"""`mmpt import` as a user meets it: what it says, what it refuses, imports that add up, and a run that begins there."""

import argparse
import json
import sys
import types
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from mmpt import config
from mmpt.cli import main
from mmpt.convert.reading import read
from mmpt.engine.build import EngineConfig, build
from mmpt.engine.optim import OptimConfig
from mmpt.engine.resume import Progress, checkpoints_of, find_checkpoint, resume
from mmpt.engine.saver import Saver
from mmpt.engine.weights import load_weights, publish_weights, tensors_of
from mmpt.methods.albef import ALBEFConfig
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.method import Method, MethodConfig
from mmpt.models.bert import BertConfig as OurBertConfig
from mmpt.models.bert import BertEmbeddingConfig
from mmpt.models.dual_tower import DualTowerConfig
from mmpt.models.fusion import FusionConfig
from mmpt.models.transformer import TransformerConfig
from mmpt.recipe import Recipe, load, open_run_dir
from tests.convert import skeletons
from tests.convert.runs import recipe_of
from tests.convert.test_same_outputs import DEPTH, IMAGE, TEXT, TIMM, vit_pair
from tests.models.weights import EMBED, MAX_TOKENS, VOCABULARY, WIDTH, clip_pair
from tests.ranks import run

POST = TransformerConfig(WIDTH, 2, 4, norm="post", norm_eps=1e-12, init="bert")
BERT = OurBertConfig(BertEmbeddingConfig(WIDTH, VOCABULARY, 24), POST, MAX_TOKENS)
ALBEF = ALBEFConfig(TIMM, BERT, FusionConfig(POST, WIDTH), EMBED, queue=8)
CLIP = CLIPConfig(DualTowerConfig(IMAGE, TEXT, EMBED))


def recipe_file(tmp_path: Path, method: MethodConfig, name: str = "recipe") -> str:
    path = tmp_path / f"{name}.yaml"
    config.save_yaml(recipe_of(method), path)
    return str(path)


def imported(out: Path) -> tuple[Method, Any]:
    """The method as the run directory holds it, and the checkpoint's manifest."""
    recipe = config.load_yaml(Recipe, out / "recipe.yaml")
    method = recipe.method.build()
    checkpoint, manifest, _ = find_checkpoint(out)
    load_weights(checkpoint, manifest, method)
    return method, manifest


def openai_file(path: Path, **changes: Any) -> str:
    """A state dict of OpenAI's CLIP in half precision, with changes."""
    state = skeletons.openai(clip_pair("quick_gelu")[0].state_dict(), DEPTH) | changes
    torch.save({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, path)
    return str(path)


def said(capsys: pytest.CaptureFixture, *arguments: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main(["import", *arguments]) == status
    out = capsys.readouterr()
    if status:
        assert out.err.startswith("mmpt: error: ") and out.err.count("\n") == 1 and not out.out
    return out.err if status else out.out


def test_what_it_says_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, recipe, out = openai_file(tmp_path / "clip.pt"), recipe_file(tmp_path, CLIP), tmp_path / "out"
    text = said(capsys, source, "--as", recipe, str(out))
    assert "OpenAI's CLIP" in text and "loaded    86 tensors\n" in text and f"--run.init {out}" in text
    assert "left" not in text and "initial" not in text and "resized" not in text
    method, manifest = imported(out)
    assert {value.dtype for value in tensors_of(method).values()} == {torch.float32}
    assert set(manifest.origins.values()) == {"clip.pt (OpenAI's CLIP)"} and len(manifest.origins) == 86
    with pytest.raises(ValueError, match=r"holds imported weights; start another --run\.dir"):
        open_run_dir(config.override(load("clip.tiny"), {"run.dir": str(out)}))
    assert config.load_yaml(Recipe, out / "recipe.yaml").run.dir == str(out), "and it is as it was"
    expected = torch.load(source, weights_only=True)["visual.proj"].float().T
    torch.testing.assert_close(method.get_parameter("towers.image_projection.weight").data, expected)


def test_sizes_and_settings_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, recipe, out = openai_file(tmp_path / "clip.pt"), recipe_file(tmp_path, CLIP), str(tmp_path / "out")
    begin = (source, "--as", recipe, out)
    text = said(capsys, *begin, "--method.towers.image.image_size", "80")
    assert "[10, 32] -> [26, 32] (bicubic, align_corners=False, antialias)" in text
    text = said(capsys, source, "--as", recipe, f"{out}2", "--method.towers.text.max_tokens", "12")
    assert "[20, 24] -> [12, 24] (the first 12 positions)" in text
    begin = (source, "--as", recipe, f"{out}3")
    text = said(capsys, *begin, "--method.towers.text.max_tokens", "30", status=1)
    assert "towers.text.embedding.position_embedding is [20, 24] in the source and [30, 24] in the model" in text
    text = said(capsys, *begin, "--method.towers.embed_dim", "8", status=1)
    assert "image_projection.weight is [16, 32] in the source and [8, 32]" in text and "--partial" in text
    text = said(capsys, *begin, "--method.towers.image.trunk.activation", "gelu", status=1)
    assert "Add --method.towers.image.trunk.activation quick_gelu" in text and "--keep-settings" in text
    assert not Path(f"{out}3").exists(), "what fails writes nothing"
    text = said(capsys, *begin, "--method.towers.embed_dim", "8", "--partial")
    assert "not taken towers.image_projection.weight is [16, 32]" in text and "initial   2 tensors" in text
    text = said(
        capsys, source, "--as", recipe, f"{out}4", "--method.towers.image.trunk.activation", "gelu", "--keep-settings"
    )
    assert "loaded    86" in text


def test_nothing_may_be_left_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, out = recipe_file(tmp_path, CLIP), str(tmp_path / "out")
    source = openai_file(tmp_path / "more.pt", surplus=torch.ones(2))
    assert "holds 1 tensors that the model has no place for: surplus" in said(
        capsys, source, "--as", recipe, out, status=1
    )
    assert "left      1 tensors of the source: surplus" in said(capsys, source, "--as", recipe, out, "--partial")
    state = torch.load(source, weights_only=True)
    fewer = {name: value for name, value in state.items() if "resblocks.1.ln_1" not in name and name != "surplus"}
    torch.save(fewer, tmp_path / "fewer.pt")
    text = said(capsys, str(tmp_path / "fewer.pt"), "--as", recipe, f"{out}2", status=1)
    assert "lacks 4 of 86 tensors in the model: towers.image.trunk.blocks.1.norm_1.bias" in text
    torch.save(skeletons.timm(vit_pair().state_dict(), "", DEPTH), tmp_path / "vit.pt")
    nowhere = said(
        capsys, str(tmp_path / "vit.pt"), "--as", recipe, f"{out}2", "--partial", "--part", "text", "--keep-settings",
        status=1,
    )  # fmt: skip
    assert "nothing in" in nowhere and "corresponds to anything in text of the model" in nowhere
    assert "no part nowhere" in said(capsys, source, "--as", recipe, f"{out}2", "--part", "nowhere", status=1)


def test_imports_add_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """ALBEF from a DeiT and a BERT; and what nobody gave is said each time, and when a run begins there."""
    recipe, out = recipe_file(tmp_path, ALBEF), tmp_path / "out"
    vit = vit_pair()
    torch.save({"model": skeletons.timm(vit.state_dict(), "", DEPTH)}, tmp_path / "deit.pth")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
    bert = BertModel(BertConfig(num_hidden_layers=4, vocab_size=VOCABULARY, max_position_embeddings=24, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    text = said(capsys, str(tmp_path / "deit.pth"), "--as", recipe, str(out), "--part", "image")
    assert "loaded    84 tensors into image" in text, "and its momentum copy"
    text = said(capsys, str(tmp_path / "bert"), "--as", recipe, str(out), "--part", "text")
    assert "into text" in text and "initial" in text
    method: Any
    method, manifest = imported(out)
    for ours, theirs in ((method.encoders, ""), (method.teacher, "of the copy")):
        torch.testing.assert_close(
            ours.text.embedding.token_embedding.data, bert.embeddings.word_embeddings.weight.data
        )
        torch.testing.assert_close(ours.image.ln_post.weight.data, vit.layernorm.weight.data, msg=theirs)
    assert set(manifest.origins.values()) == {
        "deit.pth (timm's VisionTransformer (DeiT))", "bert (transformers' BertModel)"
    }  # fmt: skip
    text = said(
        capsys, str(tmp_path / "bert"), "--as", recipe, str(out), "--part", "text", "--method.embed_dim", "3", status=1
    )
    assert "method.embed_dim" in text, "one run directory holds one recipe"


@pytest.mark.slow
def test_a_run_begins_with_imported_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It says what came from where and what from nowhere."""
    torch.save({"model": skeletons.timm(vit_pair().state_dict(), "", DEPTH)}, tmp_path / "deit.pth")
    out = tmp_path / "out"
    said(capsys, str(tmp_path / "deit.pth"), "--as", recipe_file(tmp_path, ALBEF), str(out), "--part", "image")
    notes = run(begin_a_run, 1, str(tmp_path / "mine"), str(out))[0]
    assert "  84 tensors from deit.pth (timm's VisionTransformer (DeiT))" in notes
    assert "tensors with initial values, from no source: encoders.fusion" in notes[-1]


def begin_a_run(rank: int, world_size: int, run_dir: str, init: str) -> list[str]:
    """What a run says that starts from imported weights; it has them."""
    engine = build(ALBEF.build(), EngineConfig(zero_stage=1, precision="fp32"), OptimConfig(), 2, torch.device("cpu"))
    saver = Saver(checkpoints_of(Path(run_dir)), engine, 1, 0)
    _, notes = resume(Path(run_dir), saver, engine, 0, init)
    wanted: Any = imported(Path(init))[0]
    for name, value in tensors_of(engine.method).items():
        assert torch.equal(value, tensors_of(wanted)[name]), name
    return notes


def test_a_run_of_its_own_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, recipe, out = openai_file(tmp_path / "clip.pt"), recipe_file(tmp_path, CLIP), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").touch()
    assert "is not empty and no earlier import" in said(capsys, source, "--as", recipe, str(out), status=1)
    (out / "notes.txt").unlink()
    config.save_yaml(recipe_of(CLIP), out / "recipe.yaml")
    publish_weights(checkpoints_of(out), CLIP.build(), {}, asdict(Progress()))
    assert "holds a run of its own" in said(capsys, source, "--as", recipe, str(out), status=1)
    assert "is a run of mmpt already" in said(capsys, str(out), "--as", recipe, str(tmp_path / "x"), status=1)


class Callback:
    """Of a trainer that is not installed."""


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(ValueError, match=name) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
        return str(error.value)

    state = {"module.a": torch.ones(2), "b": torch.zeros(())}
    torch.save({"state_dict": state, "callback": Callback()}, tmp_path / "object.pt")
    assert "an object of tests.convert.test_import.Callback" in refused("object.pt")
    assert "python -c" in refused("object.pt")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:  # what torch.jit.save begins with
        archive.writestr("program/constants.pkl", b"")
    assert "is a TorchScript program, which is not run here" in refused("program.pt")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    whole = (tmp_path / "object.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").touch()
    save_file({"a": torch.ones(3)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-4])
    for name in ("garbage.pt", "cut.pt", "empty.pt"):
        assert "is damaged, or no file of torch" in refused(name)
    assert "is not a whole safetensors file" in refused("cut.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "counters.pt")
    assert "holds no weights by name, but list" in refused("list.pt")
    assert "but entries epoch" in refused("counters.pt")
    assert "does not exist" in refused("nowhere.pt")
    (tmp_path / "folder").mkdir()
    assert "holds no weights: none of model.safetensors" in refused("folder")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "folder/model.safetensors.index.json").write_text(json.dumps(index))
    assert "names model-1.safetensors, which is not there" in refused("folder")
    save_file({"a": torch.ones(3)}, tmp_path / "folder/model-1.safetensors")
    (tmp_path / "folder/config.json").write_text("{")
    assert "is not JSON" in refused("folder")
    (tmp_path / "folder/config.json").write_text('{"x": 1}')
    found = read(tmp_path / "folder")
    assert found.tensors.keys() == {"a"} and found.config == {"x": 1}


def test_what_trainers_leave_beside_weights_is_harmless(tmp_path: Path) -> None:
    beside = {"args": argparse.Namespace(lr=1e-3), "best": np.float64(0.5), "epoch": 3}
    torch.save({"state_dict": {"module.a": torch.ones(2)}, **beside}, tmp_path / "slip.pt")
    assert read(tmp_path / "slip.pt").tensors.keys() == {"a"}


def test_lightnings_objects_are_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ViLT's checkpoint has them: hyper-parameters in a dict of Lightning's, callbacks keyed by their class; read
    where Lightning is not installed."""

    def fake(name: str, attribute: str) -> type:
        kind = type(attribute, (dict,), {"__module__": name})
        module = types.ModuleType(name)
        setattr(module, attribute, kind)
        monkeypatch.setitem(sys.modules, name, module)
        return kind

    for package in ("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    attributes = fake("pytorch_lightning.utilities.parsing", "AttributeDict")
    checkpoint = fake("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    hyper = attributes(config={"lr": 1e-4})
    torch.save(
        {
            "state_dict": {"pooler.dense.bias": torch.ones(2)},
            "hyper_parameters": hyper,
            "callbacks": {checkpoint: {"best": 1}},
        },
        tmp_path / "vilt.ckpt",
    )
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    assert read(tmp_path / "vilt.ckpt").tensors.keys() == {"pooler.dense.bias"}


def test_unknown_formats_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "x.pt")
    text = said(capsys, str(tmp_path / "x.pt"), "--as", "clip.tiny", str(tmp_path / "out"), status=1)
    assert "weights of no known format (its first names: layer.weight)" in text and "open_clip" in text


def test_command_lines_that_are_wrong(capsys: pytest.CaptureFixture) -> None:
    begin = ("x", "y", "--as", "clip.tiny")
    assert "invalid choice: 'none'" in said(capsys, *begin, "--format", "none", status=1)
    text = said(capsys, *begin, "--method.towers.image.trunk.dpth", "3", status=1)
    assert "unknown argument '--method.towers.image.trunk.dpth'; did you mean 'method.towers.image.trunk.depth'" in text
    assert "required: SRC, OUT" in said(capsys, "--as", "clip.tiny", status=1)
    assert "required: --as" in said(capsys, "x", "y", status=1)
    assert "unknown recipe 'clip.tny'; did you mean 'clip.tiny'" in said(capsys, "x", "y", "--as", "clip.tny", status=1)
    assert "x does not exist" in said(capsys, *begin, status=1)
