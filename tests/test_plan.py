"""The plan against what is really held and computed: autograd's tensors, DeepSpeed's tensors, counted products."""

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmpt import cli
from mmpt.batch import Batch, Pictures, pack
from mmpt.engine.build import build
from mmpt.engine.step import train_step
from mmpt.methods.method import loss_of
from mmpt.ops.late_interaction.winners import winner_bytes
from mmpt.plan import Setting, memory, towers, winners_of, work
from mmpt.plan_knobs import knobs
from mmpt.plan_sample import FEW, MORE, Sample, even_batch, sample_of
from mmpt.recipe import Recipe, parse_arguments
from tests.ranks import run

PAIRS, TOKENS = 8, 12
SMALL_SIGLIP = ("--method.image.trunk.depth", "2", "--method.text.trunk.depth", "2")
SAVING = tuple(
    flag for side in ("image", "text") for flag in (f"--method.towers.{side}.trunk.checkpoint_activations", "true")
)


def recipe_of(name: str, *flags: str) -> Recipe:
    return parse_arguments(["--recipe", name, "--run.global_batch", str(PAIRS), "--engine.precision", "fp32", *flags])


def batch_for(recipe: Recipe, pairs: int = PAIRS, tokens: int = TOKENS) -> Batch:
    size, generator = recipe.method.inputs().image_size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8, generator=generator)
    texts = [torch.randint(1, 50, (tokens,), generator=generator) for _ in range(pairs)]
    return Batch(Pictures(images), pack(texts), torch.arange(pairs), ("",) * pairs)


def planned(setting: Setting, *names: str) -> float:
    return sum(part.bytes for part in memory(setting) if part.name.startswith(names))


def storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def kept_by_autograd(recipe: Recipe, batch: Batch) -> int:
    """Bytes that the forward of both towers leaves for the backward."""
    method, kept = recipe.method.build(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        features = method.encode(batch)
    own = storages(list(method.parameters()))
    size = sum(size for pointer, size in storages(kept).items() if pointer not in own)
    del features
    return size


@pytest.mark.parametrize(("name", "flags"), [("filip.tiny", ()), ("clip.tiny", ()), ("siglip.vit_b16", SMALL_SIGLIP)])
def test_activations_are_what_autograd_keeps(name: str, flags: tuple[str, ...]) -> None:
    """Blocks are planned, embeddings and heads are not: an eighth of towers as shallow as these."""
    recipe = recipe_of(name, *flags)
    tokens = recipe.method.inputs().max_text_tokens if name.startswith("siglip") else TOKENS
    held = kept_by_autograd(recipe, batch_for(recipe, tokens=tokens))
    assert 0.87 * held < planned(Setting(recipe, 1, tokens), "activations") <= held


def test_checkpointed_activations_are_block_inputs_until_a_block_runs_again() -> None:
    recipe = recipe_of("filip.tiny", *SAVING)
    setting, without = Setting(recipe, 1, TOKENS), Setting(recipe_of("filip.tiny"), 1, TOKENS)
    inputs = sum(PAIRS * tower.tokens * tower.trunk.depth * tower.trunk.width * 4 for tower in towers(setting))
    block = sum(planned(without, f"activations, {tower.name}") / tower.trunk.depth for tower in towers(without))
    assert inputs <= kept_by_autograd(recipe, batch_for(recipe))
    assert planned(setting, "activations") == pytest.approx(inputs + block)


def bytes_held(rank: int, world_size: int) -> list[int]:
    """All that an engine leaves in memory after a step, at each stage."""
    out = []
    for stage in range(4):
        gc.collect()
        before = storages(tensors_alive())
        recipe = staged(stage)
        engine = build(recipe.method.build(), recipe.engine, recipe.optim, 4, torch.device("cpu"))
        train_step(engine, [batch_for(recipe, 4)], 1e-4)
        gc.collect()
        now = storages(tensors_alive())
        out.append(sum(size for pointer, size in now.items() if pointer not in before))
    return out


def tensors_alive() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter) and thing.numel()]


def staged(stage: int) -> Recipe:
    return recipe_of(
        "filip.tiny", "--engine.zero_stage", str(stage), "--engine.precision", "bf16",
        "--engine.bucket_elements", "1000", "--engine.keep_whole_elements", "0",
    )  # fmt: skip


@pytest.mark.slow
def test_parameters_and_optimizer_are_what_deepspeed_holds() -> None:
    """Between steps only stage 3 keeps its gradients' memory."""
    for found in run(bytes_held, 2):
        for stage, held in enumerate(found):
            names = ("parameters", "optimizer", "gradients") if stage == 3 else ("parameters", "optimizer")
            setting = Setting(staged(stage), 2, TOKENS)
            wanted = planned(setting, *names) - planned(setting, "parameters gathered")
            assert held == pytest.approx(wanted, rel=0.01), f"ZeRO {stage}"


def test_frozen_parameters_have_no_gradient_and_no_moments() -> None:
    whole, locked = (Setting(recipe_of("clip.tiny", *flags), 2, TOKENS) for flags in ((), ("--optim.lock", "image")))
    assert planned(locked, "parameters") == planned(whole, "parameters")
    for part in ("gradients", "optimizer"):
        assert 0.2 < planned(locked, part) / planned(whole, part) < 0.8


@pytest.mark.parametrize("name", ["filip.tiny", "clip.tiny"])
def test_work_is_the_products_that_torch_counts(name: str) -> None:
    """Torch does not count attention's on a CPU: they are added here, token by token."""
    recipe = recipe_of(name)
    method, batch, setting = recipe.method.build(), batch_for(recipe), Setting(recipe, 1, TOKENS)
    with FlopCounterMode(display=False) as counter:
        loss_of(method("terms", batch), method.counts(batch), 1).backward()
    attention = sum(
        3 * tower.trunk.depth * PAIRS * tower.tokens * 4 * tower.tokens * tower.trunk.width for tower in towers(setting)
    )
    counted = counter.get_total_flops() + attention
    assert sum(part.flops for part in work(setting)) == pytest.approx(counted, rel=0.02)


def sampled(recipe: Recipe, whole: bool = True) -> Sample:
    return sample_of(recipe.method, TOKENS, whole, "none", torch.float32, False)


def test_a_sample_finds_what_formulas_say() -> None:
    setting = Setting(recipe_of("clip.tiny"), 1, TOKENS)
    found = sampled(setting.recipe, whole=False)
    flops = sum(part.flops for part in work(setting) if part.name.endswith("tower"))
    assert PAIRS * found.flops == pytest.approx(flops, rel=0.02)
    held = kept_by_autograd(setting.recipe, batch_for(setting.recipe))
    assert PAIRS * found.bytes == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("name", ["align.tiny", "vilt.tiny", "albef.tiny", "meter.tiny", "uniter.tiny"])
def test_more_pairs_keep_what_the_sample_says(name: str) -> None:
    recipe = recipe_of(name, *(("--method.match_weight", "0") if name.startswith("uniter") else ()))
    method, tasks = recipe.method.build(), [task for task, _ in recipe.method.inputs().tasks] or [""]
    held = []
    for task in tasks:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            terms = method.terms(even_batch(recipe.method.inputs(), 12, TOKENS, task))
        own = storages([*method.parameters(), *method.buffers()])
        held.append(sum(size for pointer, size in storages(kept).items() if pointer not in own))
        del terms
    assert planned(Setting(recipe, 1, TOKENS), "activations") * 12 / PAIRS == pytest.approx(max(held), rel=0.03)


def test_attention_of_a_cpu_is_counted_and_a_copy_has_no_backward() -> None:
    """ALBEF by hand: the lower blocks read the caption twice, the fusion blocks 1 and 3 pairs; the copy all once."""
    recipe = recipe_of("albef.tiny", "--method.queue", "0")
    width, patches, words = 160, 65, TOKENS
    block = lambda tokens: tokens * (24 * width**2 + 4 * tokens * width)  # noqa: E731
    fusion = block(words) + words * 4 * width**2 + patches * 4 * width**2 + 4 * words * patches * width
    image = 4 * block(patches) + (patches - 1) * 2 * 192 * width
    trained, copied = image + 4 * block(words) + 2 * fusion * 4, image + 4 * block(words) + 2 * fusion
    guesses = 2 * (width**2 + width * 2048) * words * 0.15  # about: the words that are chosen are drawn
    expected = 3 * (trained + guesses) + copied + guesses
    assert sampled(recipe).flops == pytest.approx(expected, rel=0.03)


def test_a_momentum_copy_and_a_queue_are_held_everywhere() -> None:
    recipe = recipe_of("albef.tiny")
    method, setting = recipe.method.build(), Setting(recipe, 2, TOKENS)
    assert method.teacher is not None
    assert planned(setting, "momentum copy") == sum(p.nbytes for p in method.teacher.parameters())
    assert planned(setting, "buffers") == sum(b.nbytes for b in method.buffers()) > 2 * 4 * 1024 * 128


def test_a_budget_of_tokens_cuts_micro_batches() -> None:
    recipe = recipe_of("uniter.tiny", "--engine.max_micro_batch_tokens", "256")
    setting = Setting(recipe, 1, TOKENS)
    assert setting.micro_pairs == 256 // (64 + TOKENS) == 3
    assert "--engine.max_micro_batch_tokens 128" in [knob.flags for knob in knobs(setting)]
    assert planned(setting, "activations") == pytest.approx(
        3 / 8 * planned(Setting(recipe_of("uniter.tiny"), 1, TOKENS), "activations")
    )


@pytest.mark.parametrize("name", ["align.tiny", "albef.tiny"])
def test_parts_of_any_method_can_save_activations(name: str) -> None:
    found = [knob.flags for knob in knobs(Setting(recipe_of(name), 1, TOKENS))]
    wanted = {"align.tiny": "--method.towers.image.checkpoint_activations true",
              "albef.tiny": "--method.fusion.trunk.checkpoint_activations true"}  # fmt: skip
    assert wanted[name] in found and FEW < MORE


def test_winners_are_the_operators() -> None:
    setting = Setting(recipe_of("filip.tiny"), 1, TOKENS)
    inputs = setting.recipe.method.inputs()
    image = pack([torch.zeros(inputs.kept_patches, 1)] * PAIRS)
    assert winners_of(setting, PAIRS) == winner_bytes(image, pack([torch.zeros(TOKENS, 1)] * PAIRS))


def test_more_devices_share_and_a_ring_does_not_grow() -> None:
    def setting(devices: int, exchange: str) -> Setting:
        flags = ("--run.global_batch", str(512 * devices), "--method.contrast.exchange", exchange)
        return Setting(recipe_of("filip.vit_b32", *flags), devices, TOKENS)

    loss = ("features", "texts of other", "scores", "winners")
    assert planned(setting(64, "gather"), *loss) > 3 * planned(setting(4, "gather"), *loss)
    assert planned(setting(64, "ring"), *loss) == planned(setting(4, "ring"), *loss)


def test_every_knob_saves_what_it_says() -> None:
    setting = Setting(recipe_of("filip.vit_l14", "--run.global_batch", "32768", "--engine.zero_stage", "1"), 64, 20)
    found = knobs(setting)
    assert len(found) >= 3 and [knob.bytes for knob in found] == sorted(knob.bytes for knob in found)
    for knob in found:
        changed = recipe_of("filip.vit_l14", "--run.global_batch", "32768", *knob.flags.split())
        assert sum(part.bytes for part in memory(Setting(changed, 64, 20))) == knob.bytes < planned(setting, "")


def test_the_page_says_what_does_not_fit_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--recipe", "filip.vit_l14", "--gpus", "64", "--global-batch", "32768"]) == 0
    page = capsys.readouterr().out
    assert "32,768 pairs on 64 devices" in page and "DOES NOT FIT into 80 GiB" in page
    assert [line for line in page.splitlines() if "image.trunk.checkpoint_activations" in line and "fits" in line]
    assert cli.main(["plan", "--recipe", "filip.vit_l14", "--gpus", "64", "--gpu-gib", "400"]) == 0
    assert " fits into 400 GiB" in capsys.readouterr().out
    assert cli.main(["plan", "--recipe", "slip.tiny", "--gpus", "2"]) == 0
    page = capsys.readouterr().out
    assert "as measured on 2 and 4" in page and "forward and backward" in page and "similarity" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "--gpus (0)"),
        (["--gpus", "63"], "run.global_batch=30720 cannot be shared by 63 ranks evenly"),
        (["--gpus", "64", "--gpu-gib", "-1"], "--gpu-gib (-1) is above 0"),
        (["--gpus", "64", "--optim.lrr", "1"], "unknown flag '--optim.lrr'; did you mean 'optim.lr'"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--recipe", "filip.vit_l14", *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
