"""open_clip's flags that become no field of a recipe, each with what there is instead. Versions 3.3 and 4.2."""

DONE_ANYWAY = {
    "local-loss": "each rank computes its share of the loss once, with the gradients of the whole batch",
    "gather-with-grad": "features are always gathered with their gradient",
    "ddp-static-graph": "the engine is DeepSpeed's, not DDP",
    "save-most-recent": "the newest checkpoints are kept (run.keep_last), and a run continues from there by itself",
    "report-to": "metrics.jsonl and TensorBoard are always written to the run directory",
    "log-local": "rank 0 writes for all",
    "copy-codebase": "the run directory records recipe and version",
    "dist-url": "the launcher sets addresses",
    "dist-backend": "NCCL on GPUs, gloo elsewhere",
    "device": "a GPU where there is one",
    "no-set-device-rank": "each rank takes the GPU of its local rank",
    "loss-dist-impl": "the sigmoid loss gathers texts once",
    "dataset-type": "sources are read by what they are",
    "train-loss-ema-samples": "metrics.jsonl has every record; smooth it where you look",
    "log-metric-every-n-steps": "run.log_every_steps is for both",
    "force-custom-text": "names of weights are mmpt's own",
    "debug": "errors leave their traceback in the run directory",
    "max-image-pixels": "data.image.max_pixels is 100 million",
    "val-retrieval-chunk-size": "retrieval always works in bounded memory",
    "val-retrieval-precision": "retrieval is computed in fp32",
    "text-pad-multiple": "texts are packed, without pads",
    "length-bucketing": "texts are packed, without pads",
    "bucket-pool": "texts are packed, without pads",
    "bucket-chunk": "texts are packed, without pads",
    "bucket-prefetch-pools": "texts are packed, without pads",
    "val-num-samples": "the manifest of the shards counts them",
    "csv-separator": "`mmpt-data pack` reads .tsv by tabs and .csv by commas",
    "cache-dir": "set HF_HOME for tokenizers",
}
"""Nothing to do."""

ELSEWHERE = {
    "dataset-resampled": "samples are drawn once per epoch, in an order that is exact on resume; with replacement, the "
    "sources would go into --data.stream instead of --data.shards",
    "train-data-upsampling-factors": "--data.weights has integer shares of the samples, one per source: each factor "
    "times that source's number of samples",
    "val-data": "pack or index it as shards and give the folder to --evals.retrieval",
    "imagenet-val": "pack it as labelled shards (docs/datasets.md) and give the folder to --evals.zero_shot",
    "imagenet-v2": "pack it as labelled shards (docs/datasets.md) and give the folder to --evals.zero_shot",
    "remote-sync": "sync the run directory with a tool of yours; checkpoints appear in it whole, by one rename",
    "remote-sync-frequency": "see remote-sync",
    "remote-sync-protocol": "see remote-sync",
    "wandb-notes": "load metrics.jsonl or the TensorBoard files into it",
    "wandb-project-name": "load metrics.jsonl or the TensorBoard files into it",
    "delete-previous-checkpoint": "set --run.keep_last 1",
    "fsdp": "--engine.zero_stage 3 shards parameters, 2 gradients, 1 (the default) optimizer states",
    "fsdp-no-reshard-after-forward": "see --engine.zero_stage and --engine.keep_whole_elements",
    "fsdp-offload-cpu": "not supported; --engine.zero_stage 3 and activation checkpointing save memory on the GPU",
    "fsdp-checkpoint": "checkpoints are sharded and read at any world size and ZeRO stage",
    "horovod": "the launcher is deepspeed, or mmpt-launch on SLURM",
    "wd-exclude": "biases, norms, vectors and temperatures never decay; with --optim.decay_embeddings false nor do "
    "embeddings",
    "opt-kwargs": "see --optim of train.py's --help",
    "csv-img-key": "see `mmpt-data pack --image-column`",
    "csv-caption-key": "see `mmpt-data pack --caption-column`",
    "image-key": "shards hold one image per sample, whatever its extension",
    "json-text-key": "--data.caption_field names a field of the .json file",
    "json-text-key-probs": "--data.caption_field a=0.7,b=0.3 draws the field",
    "epochs-cooldown": "not supported; --optim.decay linear or constant, and a second run with --run.init",
    "lr-cooldown-end": "see epochs-cooldown",
    "lr-cooldown-power": "see epochs-cooldown",
    "pretrained-image": "`mmpt import` a vision transformer of timm or transformers with --part image",
    "momentum": "AdamW and LAMB have betas; SGD is not supported",
}
"""To be done by hand, or in another way."""

UNSUPPORTED = {
    "torchcompile": "not supported: leave it out",
    "torchcompile-strategy": "not supported: leave it out",
    "torchcompile-backend": "not supported: leave it out",
    "torchcompile-mode": "not supported: leave it out",
    "torchscript": "not supported: leave it out",
    "trace": "not supported: leave it out",
    "use-bn-sync": "batch norms always take statistics of all ranks",
    "image-interpolation": "images are resized by antialiased bicubic interpolation",
    "image-resize-mode": "evaluation resizes the shorter side and takes the centre; training takes random crops",
    "use-bnb-linear": "8-bit layers are not supported: leave it out",
    "distill-model": "distillation is not supported",
    "distill-pretrained": "distillation is not supported",
    "coca-caption-loss-weight": "CoCa is not supported; ALBEF trains ITC with fusion (albef.base)",
    "coca-contrastive-loss-weight": "CoCa is not supported; ALBEF trains ITC with fusion (albef.base)",
    "lock-image-unlocked-groups": "a tower is locked whole; --optim.layer_decay lowers the rate of its lower blocks",
    "lock-text-unlocked-layers": "a tower is locked whole; --optim.layer_decay lowers the rate of its lower blocks",
    "lock-image-freeze-bn-stats": "batch norms of a locked tower keep their statistics anyway",
    "lock-text-freeze-layer-norm": "norms of a locked tower are locked with it",
    "hf-tokenizer-name": "--data.tokenizer takes any tokenizer of transformers",
    "text-pooler-own-group": "towers have one rate per block",
    "audio-layer-decay": "audio is not supported",
    "opt-fallback-list": "one optimizer trains all parameters",
    "use-naflex": "--method.towers.image.image_resize native takes images of any shape",
    "force-naflex-vision": "see use-naflex",
    "pretrained-audio": "audio is not supported",
}


def told(flag: str) -> str:
    """What to do about a flag that becomes no field; empty for one that is not open_clip's or becomes one."""
    if flag.startswith("audio-"):
        return "audio is not supported"
    if flag.startswith("naflex-"):
        return "see use-naflex"
    return DONE_ANYWAY.get(flag) or ELSEWHERE.get(flag) or UNSUPPORTED.get(flag) or ""
