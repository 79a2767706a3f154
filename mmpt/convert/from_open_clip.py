"""`mmpt from-open-clip "COMMAND LINE"`: a training command of open_clip as a command of mmpt, and what is left to do.

Every flag is accounted for: it becomes a field of a recipe, or a note says what there is instead; an unknown one is an
error.
"""

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from mmpt import config
from mmpt.convert import open_clip_flags
from mmpt.convert.open_clip_data import crop_scale, folders
from mmpt.convert.open_clip_models import SIGLIPS, recipe_of

SWITCHES = frozenset({
    "grad-checkpointing", "force-quick-gelu", "lock-image", "lock-text", "siglip", "skip-scheduler", "local-loss",
    "gather-with-grad", "ddp-static-graph", "save-most-recent", "log-local", "copy-codebase", "no-set-device-rank",
    "force-custom-text", "debug", "dataset-resampled", "fsdp", "fsdp-no-reshard-after-forward", "fsdp-offload-cpu",
    "horovod", "pretrained-image", "torchcompile", "torchscript", "trace", "use-bn-sync", "lock-image-freeze-bn-stats",
    "lock-text-freeze-layer-norm", "use-naflex", "force-naflex-vision", "text-pooler-own-group", "length-bucketing",
    "delete-previous-checkpoint", "audio-fusion", "audio-int16-normalize",
})  # fmt: skip
"""Flags without a value."""
BECOME_FIELDS = frozenset({
    "train-data", "train-num-samples", "batch-size", "epochs", "lr", "beta1", "beta2", "eps", "wd", "warmup", "opt",
    "lr-scheduler", "skip-scheduler", "precision", "model", "pretrained", "workers", "seed", "accum-freq", "name",
    "logs", "resume", "save-frequency", "zeroshot-frequency", "val-frequency", "log-every-n-steps", "grad-clip-norm",
    "grad-checkpointing", "force-quick-gelu", "force-image-size", "force-patch-dropout", "force-context-length",
    "image-mean", "image-std", "aug-cfg", "lock-image", "lock-text", "siglip", "image-layer-decay",
    "visual-layer-decay", "text-layer-decay", "text-key",
})  # fmt: skip
PRECISIONS = {
    "amp_bf16": "bf16", "amp_bfloat16": "bf16", "bf16": "bf16", "pure_bf16": "bf16", "amp": "fp16", "fp16": "fp16",
    "pure_fp16": "fp16", "fp32": "fp32",
}  # fmt: skip


@dataclass
class Translation:
    recipe: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    """Dotted path and value of the recipe's fields to set."""
    gpus: int = 1
    nodes: int = 1
    notes: list[str] = field(default_factory=list)
    """What is left to do, a line each, beginning with the flag it is about."""

    def command(self) -> str:
        """The command, a flag on each line."""
        start = f"deepspeed --num_accelerators {self.gpus} mmpt/train.py"
        if self.nodes > 1:
            start = f"mmpt-launch CLUSTER --nodes {self.nodes} --gpus-per-node {self.gpus // self.nodes} --"
        parts = [f"--{path} {shlex.quote(_text(value))}" for path, value in self.fields.items()]
        return " \\\n    ".join([start, f"--recipe {self.recipe}", *parts])


def translate(command_line: str, gpus: int | None = None) -> Translation:
    """gpus: in all, where the command does not say. ValueError for an unknown flag, model or value, in one line."""
    launcher, flags = parsed(command_line)
    out = Translation()
    out.gpus, out.nodes = _devices(launcher, gpus)
    _model(flags, out)
    _data(flags, out)
    _batch_and_length(flags, out)
    _optimizer(flags, out)
    _engine(flags, out)
    _beginning(flags, out)
    _bookkeeping(flags, out)
    out.notes += [f"--{flag}: {told}" for flag in flags if (told := open_clip_flags.told(flag))]
    return out


def parsed(command_line: str) -> tuple[list[str], dict[str, str]]:
    """(words of the launcher, flags with their values; several values of one flag have spaces between them)."""
    words = shlex.split(command_line.replace("\\\n", " ").rstrip(" \\\n"))
    mains = [i for i, word in enumerate(words) if word == "open_clip_train.main" or word.endswith("main.py")]
    if not mains:
        raise ValueError("no open_clip_train.main in the command line; give the whole command, in quotes")
    flags: dict[str, str] = {}
    name = ""
    for word in words[mains[-1] + 1 :]:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            _check(name)
            flags[name] = value if equals else ""
        elif not name or name in SWITCHES:
            raise ValueError(f"{word!r} belongs to no flag of open_clip's")
        else:
            flags[name] = f"{flags[name]} {word}".strip()
    if empty := [name for name, value in flags.items() if not value and name not in SWITCHES]:
        raise ValueError(f"--{empty[0]} has no value")
    return words[: mains[-1]], flags


def _check(name: str) -> None:
    if name not in BECOME_FIELDS and not open_clip_flags.told(name):
        known = [*BECOME_FIELDS, *open_clip_flags.DONE_ANYWAY, *open_clip_flags.ELSEWHERE, *open_clip_flags.UNSUPPORTED]
        raise ValueError(f"--{name} is no flag of open_clip's that is known here{config.near_miss(name, known)}")


def _devices(launcher: list[str], gpus: int | None) -> tuple[int, int]:
    """(GPUs in all, nodes), from torchrun's flags or those of sbatch and srun."""
    text = " ".join(launcher)
    each = re.search(r"--(?:nproc[-_]per[-_]node|ntasks-per-node)[= ](\d+)", text)
    nodes = re.search(r"--n?nodes[= ](\d+)", text)
    several = any(word in text for word in ("srun", "sbatch", "mpirun", "horovodrun", "rdzv", "master_addr"))
    if each and (nodes or gpus or not several):
        count = int(nodes[1]) if nodes else max(1, (gpus or 0) // int(each[1]))
        return int(each[1]) * count, count
    if several and gpus is None:
        raise ValueError("the command does not say on how many GPUs it runs; give --gpus N, how many in all")
    return gpus or 1, 1


def _model(flags: dict[str, str], out: Translation) -> None:
    model = flags.get("model", "RN50")
    quick = "force-quick-gelu" in flags or flags.get("pretrained") == "openai"
    out.recipe, out.fields = recipe_of(model, quick)
    siglip = model in SIGLIPS
    if siglip != ("siglip" in flags):
        raise ValueError("SigLIP's loss goes with SigLIP's towers here: give --siglip with a model named ...-SigLIP")
    towers = ("method.image", "method.text") if siglip else ("method.towers.image", "method.towers.text")
    image, text = towers
    if size := flags.get("force-image-size"):
        out.fields[f"{image}.image_size"] = _one_number(size, "force-image-size")
    if dropped := flags.get("force-patch-dropout"):
        out.fields[f"{image}.patch_keep"] = round(1 - float(dropped), 6)
    if length := flags.get("force-context-length"):
        out.fields[f"{text}.max_tokens"] = int(length)
    for name in ("mean", "std"):
        if values := flags.get(f"image-{name}"):
            out.fields[f"{image}.{name}"] = tuple(float(value) for value in values.split())
    if "grad-checkpointing" in flags:
        blocks = image if out.recipe == "clip.rn50" else f"{image}.trunk"
        out.fields |= {f"{blocks}.checkpoint_activations": True, f"{text}.trunk.checkpoint_activations": True}


def _data(flags: dict[str, str], out: Translation) -> None:
    source = flags.get("train-data")
    if source is None:
        out.notes.append(
            "--train-data is missing: name the shards with --data.shards; to evaluate alone, `mmpt import` the "
            "weights, then `mmpt eval`"
        )
    elif source.endswith((".csv", ".tsv")) or flags.get("dataset-type") == "csv":
        columns = f"--image-column {flags.get('csv-img-key', 'filepath')}"
        columns += f" --caption-column {flags.get('csv-caption-key', 'title')}"
        out.fields["data.shards"] = "SHARDS"
        out.notes.append(f"--train-data: pack the table once: mmpt-data pack IMAGES {source} SHARDS {columns}")
    else:
        found = folders(source)
        out.fields["data.shards"] = "::".join(found)
        local = " ".join(shlex.quote(folder) for folder in found)
        out.notes.append(f"--train-data: make the manifest of each folder once: mmpt-data index {local}")
    if scale := flags.get("aug-cfg"):
        found_scale, rest = crop_scale(scale)
        if found_scale:
            out.fields["data.image.crop_scale"] = found_scale
        if rest:
            out.notes.append(f"--aug-cfg: {', '.join(rest)}: see --data.image of train.py's --help")
    if key := flags.get("text-key"):
        out.fields["data.caption_field"] = key
    out.fields["data.workers"] = int(flags.get("workers", "4"))


def _batch_and_length(flags: dict[str, str], out: Translation) -> None:
    each, parts = int(flags.get("batch-size", "64")), int(flags.get("accum-freq", "1"))
    batch, epochs = each * parts * out.gpus, int(flags.get("epochs", "32"))
    out.fields |= {"run.global_batch": batch, "engine.max_micro_batch": each}
    samples = flags.get("train-num-samples")
    if samples is None:
        out.notes.append(f"--epochs: set --run.samples to {epochs} times the number of pairs, which the manifest tells")
        return
    out.fields["run.samples"] = epochs * int(samples)
    steps = max(1, int(samples) // batch)
    if every := flags.get("save-frequency"):
        out.fields["run.keep_every_steps"] = out.fields["run.checkpoint_every_steps"] = steps * int(every)
    evaluated = flags.get("zeroshot-frequency") or flags.get("val-frequency")
    if evaluated and int(evaluated):
        out.fields["evals.every_steps"] = steps * int(evaluated)


def _optimizer(flags: dict[str, str], out: Translation) -> None:
    vit = "vit" in flags.get("model", "RN50").lower()
    name = flags.get("opt", "adamw").removeprefix("timm/")
    if name not in ("adamw", "lamb"):
        raise ValueError(f"--opt {name}: optimizers here are adamw and lamb (--optim.name)")
    scheduler = flags.get("lr-scheduler", "cosine")
    if scheduler not in ("cosine", "const"):
        raise ValueError(f"--lr-scheduler {scheduler}: here are cosine, linear and constant (--optim.decay)")
    fixed = "skip-scheduler" in flags
    out.fields |= {
        "optim.name": name, "optim.lr": float(flags.get("lr", "5e-4")),
        "optim.betas": (float(flags.get("beta1", "0.9")), float(flags.get("beta2", "0.98" if vit else "0.999"))),
        "optim.eps": float(flags.get("eps", "1e-6" if vit else "1e-8")),
        "optim.weight_decay": float(flags.get("wd", "0.2")),
        "optim.warmup_steps": 0 if fixed else int(flags.get("warmup", "10000")),
        "optim.decay": "constant" if fixed or scheduler == "const" else "cosine",
    }  # fmt: skip
    if clip := flags.get("grad-clip-norm"):
        out.fields["optim.clip_norm"] = float(clip)
    locked = [tower for tower in ("image", "text") if f"lock-{tower}" in flags]
    if locked:
        out.fields["optim.lock"] = "both" if len(locked) == 2 else locked[0]
    decays = {flags[name] for name in ("image-layer-decay", "visual-layer-decay", "text-layer-decay") if name in flags}
    if len(decays) > 1:
        raise ValueError(f"layer decays {', '.join(sorted(decays))}: here both towers have one (--optim.layer_decay)")
    if decays:
        out.fields["optim.layer_decay"] = float(decays.pop())


def _engine(flags: dict[str, str], out: Translation) -> None:
    asked = flags.get("precision", "amp_bf16")
    if asked not in PRECISIONS:
        raise ValueError(f"--precision {asked}: here are fp32, bf16 and fp16 (--engine.precision)")
    out.fields["engine.precision"] = PRECISIONS[asked]
    if asked.startswith("pure") or asked in ("bf16", "fp16"):
        out.notes.append(f"--precision {asked}: master weights and moments stay in fp32 here")
    if "fsdp" in flags:
        out.fields["engine.zero_stage"] = 3


def _beginning(flags: dict[str, str], out: Translation) -> None:
    if pretrained := flags.get("pretrained"):
        out.fields["run.init"] = "IMPORTED"
        out.notes.append(
            f"--pretrained {pretrained}: mmpt import SRC IMPORTED --as {out.recipe}, with the same --method "
            "flags as above; SRC is the file, or the folder downloaded from the hub"
        )
    resumed = flags.get("resume")
    if resumed == "latest":
        out.notes.append("--resume latest: the same command continues by itself")
    elif resumed:
        out.fields["run.init"] = "IMPORTED"
        out.notes.append(
            f"--resume {resumed}: mmpt import {resumed} IMPORTED --as {out.recipe}, with the same --method flags as "
            "above; its optimizer and place in the data are not carried over"
        )


def _bookkeeping(flags: dict[str, str], out: Translation) -> None:
    name = flags.get("name", out.recipe)
    out.fields["run.dir"] = f"{flags.get('logs', 'runs').rstrip('/')}/{name}"
    if seed := flags.get("seed"):
        out.fields["run.seed"] = int(seed)
    if every := flags.get("log-every-n-steps"):
        out.fields["run.log_every_steps"] = int(every)


def _one_number(text: str, flag: str) -> int:
    sizes = set(text.split())
    if len(sizes) != 1:
        raise ValueError(f"--{flag} {text}: images here are square")
    return int(sizes.pop())


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
