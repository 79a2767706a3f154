"""The modified ResNet of OpenAI's CLIP, in its names: stages `layer1` to `layer4`, and attention over the last grid."""

from mmpt.convert.rules import Rule, pair, rule, under
from mmpt.methods.method import Method
from mmpt.models.resnet import ResNet


def norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A batch norm with its running statistics."""
    return (
        *pair(theirs, ours),
        *rule(f"{theirs}.running_mean", f"{ours}.running_mean"),
        *rule(f"{theirs}.running_var", f"{ours}.running_variance"),
    )


STEM = tuple(r for i in (1, 2, 3) for r in (*rule(f"conv{i}.weight", f"conv_{i}.weight"), *norm(f"bn{i}", f"norm_{i}")))
BLOCK = (*STEM, *rule("downsample.0.weight", "shortcut.weight"), *norm("downsample.1", "norm_shortcut"))
POOLING = (
    *rule("positional_embedding", "positions", resize="grid"),
    *pair("q_proj", "q"),
    *pair(("k_proj", "v_proj"), "kv"),
    *pair("c_proj", "out"),
)
UNNEEDED = r"visual\..*num_batches_tracked"


def rules(method: Method, theirs: str) -> tuple[Rule, ...]:
    """For each ResNet of the method; its blocks are numbered through, theirs anew in each stage."""
    found: tuple[Rule, ...] = ()
    for name, tower in method.named_modules():
        if not isinstance(tower, ResNet):
            continue
        ours = f"{name}." if name else ""
        found += under((*under(STEM, "", "embedding."), *under(POOLING, "attnpool.", "pooling.")), theirs, ours)
        places = [(stage, i) for stage, depth in enumerate(tower.config.depths, 1) for i in range(depth)]
        for n, (stage, i) in enumerate(places):
            found += under(BLOCK, f"{theirs}layer{stage}.{i}.", f"{ours}blocks.{n}.")
    return found
