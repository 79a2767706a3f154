"""Regions into shards: published files beside their pictures, and a detector or a grid over one's own pictures."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from data_tools.__main__ import main
from data_tools.index import index
from data_tools.pack_pair import pack_pair
from data_tools.pack_sources import FolderImages, Pair
from data_tools.region_files import Choice, RegionFolder, names_for, region_file
from data_tools.regions_models import class_distribution, corners, feature_map, load_detector, load_grid
from mmpt.data.image import ImageConfig, decode
from mmpt.data.loader import DataConfig
from mmpt.data.regions import RegionError, read_arrays, read_regions
from mmpt.inputs import InputSpec, RegionSpec
from tests.data.batches import global_batches
from tests.data.regions import CLASSES, WIDTH, arrays, packed
from tests.data.shards import caption, picture, write_shards
from tests.data_tools.readback import samples

CPU = torch.device("cpu")
SPEC = RegionSpec(width=WIDTH, classes=CLASSES)


@pytest.mark.parametrize(
    ("choice", "count"),
    [(Choice(0.5, 1, 100), 6), (Choice(0.95, 4, 100), 4), (Choice(0.0, 1, 5), 5), (Choice(0.95, 20, 100), 12)],
)
def test_which_regions_are_kept(choice: Choice, count: int):
    """UNITER's rule: those above a confidence, but so many at least and at most; here the surest, in stored order."""
    values = arrays(7, 12)
    kept = read_arrays(region_file(values, choice), ("features", "norm_bb", "conf", "soft_labels"))
    wanted = sorted(sorted(range(12), key=lambda i: -values["conf"][i])[:count])
    assert all(np.array_equal(kept[name], values[name][wanted]) for name in kept)
    assert region_file(values, choice) == region_file(values, choice)


def test_what_training_would_refuse_is_not_written():
    values = arrays(7, 12)
    with pytest.raises(RegionError, match="beyond half precision"):
        region_file(values | {"features": np.full((12, WIDTH), 1e9)}, Choice())
    with pytest.raises(RegionError, match="not normalised"):
        region_file(values | {"norm_bb": values["norm_bb"].astype(float) * 640}, Choice())
    for wrong in ({"least": 0}, {"most": 5}, {"confidence": 1.5}):
        with pytest.raises(ValueError, match="want 1 <= least <= most"):
            Choice(**wrong)  # type: ignore[arg-type]


def test_files_are_found_by_the_pictures_name():
    assert names_for("train2014/COCO_1.jpg") == [
        "train2014/COCO_1.npz", "train2014/COCO_1.jpg.npz", "COCO_1.npz", "coco_1.npz",
    ]  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Pictures, and regions for all but the last two of them: one has none, one a damaged file."""
    images, regions = tmp_path / "images", tmp_path / "regions"
    (images / "set").mkdir(parents=True)
    regions.mkdir()
    for number in range(6):
        (images / "set" / f"Picture_{number}.jpg").write_bytes(picture(number))
        if number != 4:
            name = f"picture_{number}.npz" if number % 2 else f"Picture_{number}.npz"
            data = packed(arrays(number, 20) | {"allow_pickle": np.array(True)})  # as UNITER's own converter writes
            (regions / name).write_bytes(data if number != 5 else data[:700])
    table = "".join(f"set/Picture_{number}.jpg\t{caption(number)}\n" for number in range(6))
    (tmp_path / "captions.tsv").write_text("image\tcaption\n" + table)
    return images, regions


def test_packing_regions_beside_their_pictures(folders: tuple[Path, Path], tmp_path: Path, capsys):
    images, regions = folders
    main(["pack", str(images), str(tmp_path / "captions.tsv"), str(tmp_path / "out"), "--regions", str(regions),
          "--regions-most", "12"])  # fmt: skip
    assert "4 pairs packed, 2 left out" in capsys.readouterr().out
    found = samples(tmp_path / "out")
    for number, sample in enumerate(found):
        assert {name for name in sample if not name.startswith("__")} == {"jpg", "txt", "json", "regions.npz"}
        spec = replace(SPEC, most=12)
        expected = read_regions(packed(arrays(number, 20)), spec)
        assert all(np.array_equal(a, b) for a, b in zip(read_regions(sample["regions.npz"], spec), expected))
        assert len(expected.features) == 12
    rows = parquet.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["success"] * 4 + ["no_regions"] * 2
    assert "there is no regions file 'set/Picture_4.npz' in" in rows[4]["error_message"]
    assert "cannot be read" in rows[5]["error_message"]
    with pytest.raises(SystemExit, match="is not a folder"):
        main(["pack", str(images), str(tmp_path / "captions.tsv"), str(tmp_path / "o"), "--regions", "/nowhere"])


def test_a_column_may_name_the_files_and_pairs_of_pictures_have_two(folders: tuple[Path, Path]):
    images, regions = folders
    folder, source = RegionFolder(regions, Choice(), "boxes"), FolderImages(images)
    pair = Pair("set/Picture_4.jpg", ("x",), {"boxes": "Picture_2.npz"}, right="set/Picture_1.jpg")
    made = pack_pair(pair, source, None, folder)
    assert made.status == "success" and set(made.images) == {"jpg", "right.jpg", "regions.npz", "right.regions.npz"}
    assert made.images["regions.npz"] == region_file(arrays(2, 20), Choice())
    assert made.images["right.regions.npz"] == region_file(arrays(1, 20), Choice())
    for name in ("../captions.tsv", "none.npz", None):
        assert (
            pack_pair(Pair("set/Picture_4.jpg", ("x",), {"boxes": name}), source, None, folder).status == "no_regions"
        )


def test_verify_reads_regions(folders: tuple[Path, Path], tmp_path: Path):
    images, regions = folders
    out = tmp_path / "out"
    main(["pack", str(images), str(tmp_path / "captions.tsv"), str(out), "--regions", str(regions)])
    main(["verify", str(out), str(tmp_path / "report"), "--workers", "1"])
    shard = bytearray((out / "00000.tar").read_bytes())
    at = shard.index(b"features.npy")
    shard[at + 300] ^= 255
    (out / "00000.tar").write_bytes(shard)
    with pytest.raises(SystemExit, match="0 damaged shards and 1 bad samples of 4"):
        main(["verify", str(out), str(tmp_path / "report2"), "--workers", "1"])
    (line,) = (tmp_path / "report2").read_text().splitlines()
    assert "cannot be read: Bad CRC-32" in json.loads(line)["bad_samples"][0]["reason"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models with random weights, each in a folder with its image processor."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 24], depths=[1, 1, 1, 1], layer_type="basic")
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    detr = DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_queries=12, num_labels=5, init_xavier_std=20.0,
    )  # fmt: skip
    square = ViTImageProcessorPil(size={"height": 64, "width": 64}, image_mean=[0.4, 0.5, 0.6])
    for name, model, processor in (
        ("vit", ViTModel(vit), ViTImageProcessorPil(size={"height": 32, "width": 32})),
        ("resnet", ResNetModel(resnet), square),
        ("detr", DetrForObjectDetection(detr), DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 64})),
    ):
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: str(root / name) for name in ("vit", "resnet", "detr")}


def images(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [decode(picture(i, size=size), ImageConfig.background, 10**6) for i, size in enumerate(sizes)]


def test_a_grid_over_a_feature_map(models: dict[str, str]):
    pictures = images([(64, 64), (64, 64)])
    processor = AutoImageProcessor.from_pretrained(models["resnet"])
    with torch.no_grad():
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        expected = ResNetModel.from_pretrained(models["resnet"]).eval()(pixels).last_hidden_state  # [2, 24, 2, 2]
    fine, coarse = (load_grid(models["resnet"], size, CPU)(pictures) for size in (2, 1))
    for i in range(2):
        cells = expected[i].flatten(1).T
        assert torch.allclose(torch.from_numpy(fine[i]["features"]), cells, atol=1e-5)
        assert torch.allclose(torch.from_numpy(coarse[i]["features"]), cells.mean(0, keepdim=True), atol=1e-5)
        assert fine[i]["norm_bb"].tolist() == [
            [0, 0, 0.5, 0.5, 0.5, 0.5], [0.5, 0, 1, 0.5, 0.5, 0.5], [0, 0.5, 0.5, 1, 0.5, 0.5],
            [0.5, 0.5, 1, 1, 0.5, 0.5],
        ]  # fmt: skip
    with pytest.raises(ValueError, match="--grid 3 is finer than the encoder's feature map of 2 x 2"):
        load_grid(models["resnet"], 3, CPU)(pictures)


def test_a_grid_over_patches_leaves_special_tokens_out(models: dict[str, str]):
    pictures = images([(32, 32)])
    pixels = AutoImageProcessor.from_pretrained(models["vit"])(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = ViTModel.from_pretrained(models["vit"]).eval()(pixels).last_hidden_state[0, 1:]
    (found,) = load_grid(models["vit"], 4, CPU)(pictures)
    assert torch.allclose(torch.from_numpy(found["features"]), expected, atol=1e-5)
    (found,) = load_grid(models["vit"], 2, CPU)(pictures)
    quarter = expected.view(4, 4, 16)[:2, 2:].mean((0, 1))
    assert torch.allclose(torch.from_numpy(found["features"][1]), quarter, atol=1e-5)
    assert feature_map(torch.arange(6.0).view(1, 6, 1)).flatten().tolist() == [2, 3, 4, 5]


def test_a_detector_finds_what_transformers_says_it_finds(models: dict[str, str]):
    pictures = images([(40, 40), (64, 30), (30, 64)])
    found = load_detector(models["detr"], CPU)(pictures)
    processor, model = (
        kind.from_pretrained(models["detr"]) for kind in (AutoImageProcessor, AutoModelForObjectDetection)
    )
    for picture_, ours in zip(pictures, found, strict=True):
        with torch.no_grad():
            out = model(**processor(images=pictures, return_tensors="pt"))
        sizes = [(image.height, image.width) for image in pictures]
        theirs = processor.post_process_object_detection(out, threshold=0.0, target_sizes=sizes)[
            pictures.index(picture_)
        ]
        sides = np.array([picture_.width, picture_.height] * 2)
        boxes = (theirs["boxes"].numpy() / sides).clip(0, 1)
        assert np.allclose(ours["norm_bb"][:, :4], boxes, atol=1e-5)
        assert np.allclose(ours["norm_bb"][:, 4:], boxes[:, 2:] - boxes[:, :2], atol=1e-5)
        assert np.allclose(ours["conf"], theirs["scores"], atol=1e-5)
        assert np.array_equal(ours["soft_labels"][:, 1:].argmax(1), theirs["labels"])
        assert ours["soft_labels"].shape == (12, 6) and np.allclose(ours["soft_labels"].sum(1), 1, atol=1e-5)
        assert ours["features"].shape == (12, 16)
        read_regions(region_file(ours, Choice()), RegionSpec(width=16, classes=6))


def test_distributions_of_detectors_with_a_sigmoid_per_class():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    (found,) = class_distribution(logits, 3)
    assert found.sum() == pytest.approx(1) and torch.allclose((found[1:] / found[0]).log(), logits[0])
    assert class_distribution(torch.tensor([[50.0, -50.0]]), 2)[0].tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    softmax = class_distribution(torch.tensor([[1.0, 2.0, 3.0]]), 2)
    assert softmax[0].tolist() == torch.tensor([3.0, 1.0, 2.0]).softmax(0).tolist()
    assert corners(torch.tensor([0.5, 0.9, 0.4, 0.6])).tolist() == pytest.approx([0.3, 0.6, 0.7, 1, 0.4, 0.4])


@pytest.fixture
def own_shards(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    write_shards(folder, [9, 7])
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes().replace(picture(12), bytes(len(picture(12)))))
    (folder / "00000_stats.json").write_text('{"successes": 9}')
    index(str(folder), chunk_samples=4)
    return folder


def test_ones_own_pictures_get_regions_and_are_trained_on(
    own_shards: Path, models: dict[str, str], tokenizer: str, inputs: InputSpec, tmp_path: Path, capsys
):
    out, command = tmp_path / "out", ["regions", str(own_shards), str(tmp_path / "out")]
    command += ["--encoder", models["resnet"], "--grid", "2", "--batch", "4", "--device", "cpu"]
    main(command)
    printed = capsys.readouterr().out
    assert "00001.tar: sample '000012': cannot be decoded" in printed
    assert "16 samples, 1 of them without regions; a region has 24 numbers and 0 classes" in printed
    before, after = samples(own_shards), samples(out)
    for old, new in zip(before, after, strict=True):
        assert ("regions.npz" in new) == (new["__key__"] != "000012")
        assert {k: v for k, v in new.items() if k not in ("regions.npz", "__url__")} == {
            k: v for k, v in old.items() if k != "__url__"
        }
    assert (out / "00000_stats.json").exists() and not list(out.glob("*.tmp"))
    config = DataConfig(str(out), tokenizer, workers=0, lanes=2, max_quarantined_share=0.2)
    wanting = replace(inputs, patches=0, kept_patches=0, regions=RegionSpec(width=24))
    (batch,) = global_batches(config, wanting, 1)
    regions = batch.pictures.regions
    assert regions is not None and set(regions.features.lengths().tolist()) == {4} and "000012" not in batch.keys

    first = (out / "00000.tar").stat().st_mtime_ns
    kept = (out / "00001.tar").read_bytes()
    (out / "00001.tar").unlink()
    main(command)
    assert "1 of 2 shards were written before" in capsys.readouterr().out
    assert (out / "00001.tar").read_bytes() == kept and (out / "00000.tar").stat().st_mtime_ns == first
    with pytest.raises(SystemExit, match="was begun with other shards or another model"):
        main([*command[:-6], "--grid", "1", "--device", "cpu"])


def test_a_detectors_regions(own_shards: Path, models: dict[str, str], tmp_path: Path, capsys):
    main(["regions", str(own_shards), str(tmp_path / "out"), "--detector", models["detr"], "--confidence", "0.9",
          "--least", "3", "--device", "cpu"])  # fmt: skip
    assert "a region has 16 numbers and 6 classes" in capsys.readouterr().out
    found = [sample["regions.npz"] for sample in samples(tmp_path / "out") if "regions.npz" in sample]
    counts = {len(read_regions(data, RegionSpec(width=16, classes=6)).features) for data in found}
    assert len(found) == 15 and min(counts) >= 3 and max(counts) <= 12


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "either --detector MODEL, or --encoder MODEL and --grid N"),
        (["--encoder", "x"], "either --detector MODEL"),
        (["--encoder", "x", "--grid", "0"], "must be 1 or more"),
        (["--detector", "/nowhere"], "AutoModelForObjectDetection finds nothing it can use at '/nowhere'"),
        (["--detector", "/nowhere", "--least", "0"], "AutoModelForObjectDetection finds nothing"),
        (["--encoder", "/nowhere", "--grid", "2"], "AutoModel finds nothing it can use at '/nowhere'"),
    ],
)
def test_what_is_amiss_is_one_line(own_shards: Path, tmp_path: Path, extra: list[str], message: str):
    with pytest.raises(SystemExit) as caught:
        main(["regions", str(own_shards), str(tmp_path / "out"), *extra])
    assert message in str(caught.value.code) and "\n" not in str(caught.value.code)
    with pytest.raises(SystemExit, match="name another folder"):
        main(["regions", str(own_shards), str(own_shards), "--encoder", "x", "--grid", "2"])


def as_msgpack(values: dict[str, np.ndarray]) -> bytes:
    """As the msgpack-numpy package writes arrays, by its description."""
    return msgpack.packb(
        {name: {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}
         for name, array in values.items()},
        use_bin_type=True,
    )  # fmt: skip


def test_the_published_lmdb(folders: tuple[Path, Path], tmp_path: Path, capsys):
    lmdb = pytest.importorskip("lmdb", reason="needs the lmdb package: pip install 'mmpt[lmdb]'")
    source = tmp_path / "feat_th0.2_max100_min10"
    values = {
        "picture_0.npz": as_msgpack(arrays(0, 20)), "picture_1.npz": packed(arrays(1, 20), compressed=True),
        "picture_2.npz": as_msgpack({"features": np.ones(3)}), "picture_3.npz": b"\xc1rubbish",
        "picture_4.npz": as_msgpack(arrays(4, 20) | {"features": np.ones((3, 2))}),
        "__keys__": json.dumps(["picture_0.npz"]).encode(),
    }  # fmt: skip
    with lmdb.open(str(source), map_size=1 << 24) as database, database.begin(write=True) as writing:
        for name, value in values.items():
            writing.put(name.encode(), value)
    main(["regions-from-lmdb", str(source), str(tmp_path / "npz")])
    printed = capsys.readouterr().out
    assert "2 files written, 0 were there, 3 could not be used" in printed
    for line in ("picture_2.npz: it has no norm_bb", "picture_3.npz: it is neither a .npz file nor msgpack",
                 "picture_4.npz: its norm_bb are of 20 regions, its features of 3"):  # fmt: skip
        assert line in printed
    assert sorted(path.name for path in (tmp_path / "npz").iterdir()) == ["picture_0.npz", "picture_1.npz"]
    for number in (0, 1):
        data = (tmp_path / "npz" / f"picture_{number}.npz").read_bytes()
        assert data == region_file(arrays(number, 20), Choice())
    main(["regions-from-lmdb", str(source), str(tmp_path / "npz")])
    assert "0 files written, 2 were there" in capsys.readouterr().out
    main(["pack", str(folders[0]), str(tmp_path / "captions.tsv"), str(tmp_path / "packed"), "--regions",
          str(tmp_path / "npz")])  # fmt: skip
    assert [sample["__key__"] for sample in samples(tmp_path / "packed")] == ["000000000", "000000001"]
    with lmdb.open(str(source), map_size=1 << 24) as database, database.begin(write=True) as writing:
        writing.put(b"../picture.npz", values["picture_0.npz"])
    with pytest.raises(SystemExit, match="is not the name of a file"):
        main(["regions-from-lmdb", str(source), str(tmp_path / "other")])
    (source / "data.mdb").write_bytes(struct.pack("<100I", *range(100)))
    with pytest.raises(SystemExit, match="cannot be read"):
        main(["regions-from-lmdb", str(source), str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="is not an LMDB folder"):
        main(["regions-from-lmdb", str(tmp_path), str(tmp_path / "other")])
