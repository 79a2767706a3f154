"""What TensorBoard's "Custom Scalars" page shows: the plots an operator asks for first, in that order.

A chart is (title, regular expressions over tags); a tag belongs to it where one matches from its beginning. Tags are
made in writers.py.
"""

PAGE: dict[str, dict[str, tuple[str, ...]]] = {
    "learning": {
        "loss": ("train/loss$",),
        "loss: deviations from the median": ("train/loss_deviation$",),
        "terms of the loss": (r"terms/(?!accuracy|logit_scale|dropped)",),
        "accuracy within the batch": ("terms/accuracy",),
        "logit scale": ("terms/logit_scale$",),
        "learning rate": ("train/learning_rate$",),
    },
    "gradients and updates": {
        "gradient norm": ("train/grad_norm$",),
        "gradient norm by part": ("grad_norm/",),
        "update norm by part": ("update_norm/",),
        "update norm over weight norm by part": ("update_ratio/",),
        "skipped steps": ("train/skipped_steps$",),
    },
    "speed": {
        "pairs per second": ("system/samples_per_second$",),
        "pairs per second and device": ("system/samples_per_second_per_device$",),
        "model FLOP utilisation": ("system/mfu$",),
        "model TFLOP per second and device": ("system/model_tflops_per_second_per_device$",),
        "step seconds (median, 95 %, longest)": ("system/step_seconds_",),
        "tokens of a text, on average": ("system/mean_text_tokens$",),
        "share of time waiting for data": ("system/data_wait_share$",),
        "share of time in collectives": ("communication_share/",),
        "memory in GiB": ("system/memory_gib$",),
        "slowest rank: its own time over the median rank's": ("system/straggler_factor$",),
        "slowest rank: which": ("system/straggler_rank$",),
    },
    "keeping going": {
        "checkpoint: training held up, seconds": ("system/checkpoint_stall_seconds$",),
        "checkpoint: whole save, seconds": ("system/checkpoint_save_seconds$",),
        "restarts": ("system/restarts$",),
        "quarantine rate": ("system/quarantine_rate$",),
        "epochs": ("train/epoch$|epoch/",),
    },
    "evaluation": {
        "image to text recall": ("eval/.*image_to_text_R@[0-9]+$",),
        "text to image recall": ("eval/.*text_to_image_R@[0-9]+$",),
        "zero-shot accuracy": ("eval/.*/top[0-9]+$",),
        "words on patches": ("eval/.*/word_patch_",),
        "everything else": (r"eval/(?!.*(_to_(text|image)_R@|/top|/word_patch_))",),
    },
}


def layout() -> dict[str, dict[str, list]]:
    """PAGE as `SummaryWriter.add_custom_scalars` takes it."""
    return {
        category: {title: ["Multiline", list(tags)] for title, tags in charts.items()}
        for category, charts in PAGE.items()
    }
