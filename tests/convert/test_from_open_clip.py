"""Command lines from open_clip's README and documentation, as flags of a recipe: they are those that train.py takes."""

import shlex

import pytest

from mmpt.cli import main
from mmpt.convert import open_clip_flags
from mmpt.convert.from_open_clip import BECOME_FIELDS, SWITCHES, Translation, translate
from mmpt.convert.open_clip_models import RESNETS, SIGLIPS, VITS
from mmpt.models.image import ViTConfig
from mmpt.recipe import Recipe, parse_arguments

SINGLE = """python -m open_clip_train.main \\
    --save-frequency 1 \\
    --zeroshot-frequency 1 \\
    --report-to tensorboard \\
    --train-data="/path/to/train_data.csv"  \\
    --val-data="/path/to/validation_data.csv"  \\
    --csv-img-key filepath \\
    --csv-caption-key title \\
    --imagenet-val=/path/to/imagenet/root/val/ \\
    --warmup 10000 \\
    --batch-size=128 \\
    --lr=1e-3 \\
    --wd=0.1 \\
    --epochs=30 \\
    --workers=8 \\
    --model RN50
"""
NODE = """cd open_clip/src
torchrun --nproc_per_node 4 -m open_clip_train.main \\
    --train-data '/data/cc12m/cc12m-train-{0000..2175}.tar' \\
    --train-num-samples 10968539 \\
    --dataset-type webdataset \\
    --batch-size 320 \\
    --precision amp \\
    --workers 4 \\
    --imagenet-val /data/imagenet/validation/
"""
NODES = NODE.replace("--nproc_per_node 4", "--nproc_per_node=4 \\\n    --rdzv_endpoint=$HOSTE_NODE_ADDR")
SLURM = """#!/bin/bash -x
#SBATCH --nodes=32
#SBATCH --gres=gpu:4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=6
#SBATCH --wait-all-nodes=1
#SBATCH --job-name=open_clip
eval "$(/path/to/conda/bin/conda shell.bash hook)"
export MASTER_PORT=12802
cd /shared/open_clip
export PYTHONPATH="$PYTHONPATH:$PWD/src"
srun --cpu_bind=v --accel-bind=gn python -u src/open_clip_train/main.py \\
    --save-frequency 1 \\
    --report-to tensorboard \\
    --train-data="/data/LAION-400M/{00000..41455}.tar" \\
    --warmup 2000 \\
    --batch-size=256 \\
    --epochs=32 \\
    --workers=8 \\
    --model ViT-B-32 \\
    --name "ViT-B-32-Vanilla" \\
    --seed 0 \\
    --local-loss \\
    --gather-with-grad
"""
LAION5B = """srun --comment laion --cpu_bind=v --accel-bind=gn python -m open_clip_train.main \\
    --save-frequency 1 \\
    --train-data="pipe:aws s3 cp s3://s-datasets/laion5b/{laion2B-data/{000000..231349}.tar,\
laion2B-multi-data/{000000..226687}.tar,laion1B-nolang-data/{000000..127231}.tar} -" \\
    --train-num-samples 135646078 --dataset-type webdataset --dataset-resampled --warmup 2000 --batch-size=375 \\
    --epochs=97 --lr 1e-3 --workers=8 --report-to wandb --name ${EXP_NAME} --logs /scratch/logs/ --model ViT-B-32 \\
    --seed 0 --ddp-static-graph --local-loss --gather-with-grad --grad-checkpointing --precision amp_bfloat16 \\
    --wandb-project-name open_clip6 --resume "latest" --remote-sync s3://s-laion/mitchellw/logs"""
ROBERTA = """python -m open_clip_train.main --train-data="pipe:aws s3 cp s3://s-mas/cc3m/{00000..00329}.tar -" \\
    --train-num-samples 3000000 --val-data="pipe:aws s3 cp s3://s-mas/cc3m/{00330..00331}.tar -" \\
    --val-num-samples 10000 --dataset-type webdataset --batch-size 256 \\
    --warmup 2000 --epochs 10 --lr 5e-4 --precision amp --workers 6 \\
    --model "roberta-ViT-B-32" --lock-text --lock-text-unlocked-layers 10 --name "10_unfrozen" \\
    --report-to "tensorboard" \\
"""
COCA = """python -m open_clip_train.main --dataset-type "csv" --train-data "path/to/data/dir/train2014.csv" \\
    --warmup 1000 --batch-size 128 --lr 1e-5 --wd 0.1 --epochs 1 --workers 3 --model "coca_ViT-L-14" \\
    --report-to "wandb" --coca-contrastive-loss-weight 0 --coca-caption-loss-weight 1 --log-every-n-steps 100"""
EVALUATION = """python -m open_clip_train.main --imagenet-val /path/to/imagenet/validation --model ViT-B-32-quickgelu \\
    --pretrained laion400m_e32"""
MASKED = """torchrun --nproc_per_node 8 -m open_clip_train.main --train-data '/a/{00..11}.tar::/b/{00..05}.tar' \\
    --dataset-type webdataset --lr "2.048e-3" --beta1 0.9 --beta2 0.95 --warmup 782 --wd 0.2 --batch-size 8192 \\
    --aug-cfg scale='(0.4, 1.0)' color_jitter=0.4 --epochs 6 --workers 6 --model ViT-B-16 --precision 'amp_bf16' \\
    --force-image-size 112 --force-patch-dropout 0.75 --grad-checkpointing --log-every-n-steps 32 --accum-freq 2 \\
    --train-num-samples 1000000 --save-frequency 2 --lock-image --grad-clip-norm 1.0 \\
    --train-data-upsampling-factors 1::2"""


def recipe_of(found: Translation) -> Recipe:
    """What train.py makes of the printed command."""
    words = shlex.split(found.command().replace("\\\n", " "))
    return parse_arguments(words[words.index("--recipe") :])


def test_the_readmes_slurm_script() -> None:
    found = translate(SLURM)
    assert (found.gpus, found.nodes) == (128, 32) and found.command().startswith("mmpt-launch CLUSTER --nodes 32")
    recipe = recipe_of(found)
    assert recipe.run.global_batch == 32768 and recipe.engine.max_micro_batch == 256
    assert recipe.data.shards == "/data/LAION-400M" and recipe.run.dir == "runs/ViT-B-32-Vanilla"
    optim = recipe.optim
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay) == (5e-4, (0.9, 0.98), 1e-6, 0.2)
    assert (optim.warmup_steps, optim.decay) == (2000, "cosine")
    towers = recipe.method.towers  # type: ignore[attr-defined]
    assert towers.image.trunk.activation == towers.text.trunk.activation == "gelu"
    notes = "\n".join(found.notes)
    assert "run.samples to 32 times" in notes and "mmpt-data index /data/LAION-400M" in notes
    assert "--local-loss: each rank" in notes and "--gather-with-grad" in notes


def test_the_readmes_other_commands() -> None:
    found = translate(SINGLE)
    recipe = recipe_of(found)
    assert found.recipe == "clip.rn50" and recipe.run.global_batch == 128
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.betas[1]) == (1e-3, 0.1, 0.999)
    pack = "mmpt-data pack IMAGES /path/to/train_data.csv SHARDS --image-column filepath --caption-column title"
    assert any(pack in note for note in found.notes)
    found = translate(NODE)
    recipe = recipe_of(found)
    assert (recipe.run.global_batch, recipe.run.samples) == (1280, 32 * 10968539)
    assert recipe.engine.precision == "fp16" and recipe.data.shards == "/data/cc12m"
    with pytest.raises(ValueError, match="how many GPUs it runs; give --gpus N"):
        translate(NODES)
    found = translate(NODES, gpus=16)
    assert (found.gpus, found.nodes, found.fields["run.global_batch"]) == (16, 4, 5120)
    found = translate(EVALUATION)
    assert "method.towers.image.trunk.activation" not in found.fields and found.fields["run.init"] == "IMPORTED"
    assert any("then `mmpt eval`" in note for note in found.notes)
    with pytest.raises(ValueError, match="--model roberta-ViT-B-32: no recipe has these towers"):
        translate(ROBERTA)
    with pytest.raises(ValueError, match="--model coca_ViT-L-14: no recipe has these towers"):
        translate(COCA)


def test_object_stores_samples_with_replacement_and_notes() -> None:
    with pytest.raises(ValueError, match="give --gpus N"):
        translate(LAION5B)
    found = translate(LAION5B, gpus=240)
    recipe = recipe_of(found)
    folders = ("laion2B-data", "laion2B-multi-data", "laion1B-nolang-data")
    assert recipe.data.shards == "::".join(f"s3://s-datasets/laion5b/{folder}" for folder in folders)
    assert recipe.run.global_batch == 90_000 and recipe.engine.precision == "bf16"
    towers = recipe.method.towers  # type: ignore[attr-defined]
    assert towers.image.trunk.checkpoint_activations and towers.text.trunk.checkpoint_activations
    steps = 135646078 // 90_000
    assert recipe.run.checkpoint_every_steps == recipe.run.keep_every_steps == steps
    notes = "\n".join(found.notes)
    for flag in ("dataset-resampled", "resume latest", "remote-sync", "wandb-project-name", "ddp-static-graph"):
        assert f"--{flag}: " in notes


def test_masking_and_what_else_changes_the_model() -> None:
    found = translate(MASKED)
    recipe = recipe_of(found)
    image = recipe.method.towers.image  # type: ignore[attr-defined]
    assert isinstance(image, ViTConfig) and (image.image_size, image.patch_keep) == (112, 0.25)
    assert recipe.data.image.crop_scale == (0.4, 1.0) and recipe.data.shards == "/a::/b"
    assert recipe.optim.lr == 2.048e-3 and recipe.optim.betas == (0.9, 0.95) and recipe.optim.lock == "image"
    assert recipe.run.global_batch == 8192 * 2 * 8 and recipe.engine.max_micro_batch == 8192
    assert recipe.micro_batches(8) == 2 and recipe.optim.clip_norm == 1.0
    assert recipe.run.keep_every_steps == 2 * (1_000_000 // recipe.run.global_batch)
    notes = "\n".join(found.notes)
    assert "--aug-cfg: color_jitter=0.4" in notes and "data.weights has integer shares" in notes


PARSED = ("ViT-B-32", "ViT-S-16-alt", "ViT-bigG-14", "ViT-L-14-336-quickgelu", "RN50x4", "RN101-quickgelu")


@pytest.mark.parametrize("model", [*PARSED, "ViT-B-16-SigLIP", "ViT-L-16-SigLIP-384"])
def test_models_are_recipes_with_flags(model: str) -> None:
    siglip, plain = " --siglip" * (model in SIGLIPS), model.removesuffix("-quickgelu")
    found = translate(f"python -m open_clip_train.main --model {model} --train-data x.tar{siglip}")
    method = recipe_of(found).method
    towers = method if model in SIGLIPS else method.towers  # type: ignore[attr-defined]
    assert towers.text.trunk.activation == ("gelu" if plain == model else "quick_gelu")
    if plain in VITS:
        sizes, trunk = VITS[plain], towers.image.trunk
        assert (trunk.width, trunk.depth, trunk.heads) == sizes.image and trunk.mlp_ratio == sizes.mlp_ratio
        assert towers.image.image_size == sizes.image_size and towers.embed_dim == sizes.embed_dim
    if plain in RESNETS:
        assert (towers.image.depths, towers.image.bottleneck, towers.image.image_size) == RESNETS[plain][:3]


def test_sizes_are_those_of_open_clips_configurations() -> None:
    """Widths are heads of 64, but for the largest (their `head_width`)."""
    wide = {"ViT-H-14": 80, "ViT-H-14-378": 80, "ViT-H-16": 80, "ViT-g-14": 88, "ViT-bigG-14": 104, "ViT-e-14": 112}
    for name, sizes in VITS.items():
        assert sizes.image[0] == sizes.image[2] * wide.get(name, 64), name
        assert sizes.text[0] == sizes.text[2] * 64 and sizes.image_size % sizes.patch_size == 0, name


WRONG = {
    "--modle ViT-B-32": "--modle is no flag of open_clip's that is known here; did you mean 'model'",
    "--model ViT-B-23": "did you mean 'ViT-B-32'",
    "--model ViT-B-32 --opt lion": "optimizers here are adamw and lamb",
    "--model ViT-B-32 --lr-scheduler const-cooldown": "here are cosine, linear and constant",
    "--model ViT-B-32 --precision int8": "--precision int8",
    "--model ViT-B-32 --siglip": "SigLIP's loss goes with SigLIP's towers",
    "--model ViT-B-32 --train-data 'pipe:cat x.tar'": "shell commands are not run",
    "--model ViT-B-32 --image-layer-decay 0.7 --text-layer-decay 0.8": "both towers have one",
    "--model ViT-B-32 --force-image-size 224 336": "images here are square",
    "--model ViT-B-32 --lr": "--lr has no value",
    "--model ViT-B-32 --local-loss true": "'true' belongs to no flag",
    "--model ViT-B-32 --aug-cfg scale=half": "is not a pair of numbers",
}


@pytest.mark.parametrize(("flags", "said"), WRONG.items())
def test_what_cannot_be_translated_is_named(flags: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        translate(f"python -m open_clip_train.main {flags}")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_other_programs_are_refused_and_every_flag_has_one_place(capsys: pytest.CaptureFixture) -> None:
    assert main(["from-open-clip", "python train_something.py --lr 1"]) == 1
    assert "no open_clip_train.main in the command line" in capsys.readouterr().err
    assert main(["from-open-clip", SINGLE]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("deepspeed --num_accelerators 1 mmpt/train.py \\\n    --recipe clip.rn50")
    assert "what is left to do, or to know:" in printed
    tables = [open_clip_flags.DONE_ANYWAY, open_clip_flags.ELSEWHERE, open_clip_flags.UNSUPPORTED]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    both = set(names) & BECOME_FIELDS
    assert both == set(), both
    assert all(flag in BECOME_FIELDS or open_clip_flags.told(flag) for flag in SWITCHES)


FLAGS = """
train-data train-data-upsampling-factors val-data train-num-samples val-num-samples dataset-type dataset-resampled
csv-separator csv-img-key csv-caption-key imagenet-val imagenet-v2 cache-dir logs log-local name workers batch-size
epochs epochs-cooldown lr beta1 beta2 eps wd momentum warmup opt use-bn-sync skip-scheduler lr-scheduler
lr-cooldown-end lr-cooldown-power save-frequency save-most-recent zeroshot-frequency val-frequency resume precision
model pretrained pretrained-image lock-image lock-image-unlocked-groups lock-image-freeze-bn-stats image-mean
image-std image-interpolation image-resize-mode aug-cfg grad-checkpointing local-loss gather-with-grad
force-context-length force-image-size force-quick-gelu force-patch-dropout force-custom-text torchscript
torchcompile trace accum-freq device dist-url dist-backend report-to wandb-notes wandb-project-name debug
copy-codebase horovod ddp-static-graph no-set-device-rank seed grad-clip-norm lock-text lock-text-unlocked-layers
lock-text-freeze-layer-norm log-every-n-steps coca-caption-loss-weight coca-contrastive-loss-weight remote-sync
remote-sync-frequency remote-sync-protocol delete-previous-checkpoint distill-model distill-pretrained
use-bnb-linear siglip loss-dist-impl image-key max-image-pixels text-key json-text-key json-text-key-probs
opt-kwargs opt-fallback-list text-layer-decay image-layer-decay visual-layer-decay audio-layer-decay wd-exclude
text-pooler-own-group val-retrieval-chunk-size val-retrieval-precision torchcompile-strategy torchcompile-backend
torchcompile-mode fsdp fsdp-no-reshard-after-forward fsdp-offload-cpu fsdp-checkpoint log-metric-every-n-steps
train-loss-ema-samples use-naflex force-naflex-vision naflex-seq-lens length-bucketing bucket-pool bucket-chunk
bucket-prefetch-pools text-pad-multiple audio-ext
"""


def test_all_flags_of_open_clip_are_known() -> None:
    """Of versions 3.3 and 4.2, but for audio's and NaFlex's, which are answered by their beginnings."""
    unknown = [flag for flag in FLAGS.split() if flag not in BECOME_FIELDS and not open_clip_flags.told(flag)]
    assert not unknown
