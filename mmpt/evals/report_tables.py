"""Tables of the report: the first numbers, retrieval, and what the words of scenes see."""

from collections.abc import Iterator
from html import escape

from mmpt.evals.findings import Findings, retrieval_rows
from mmpt.evals.retrieval import KS
from mmpt.evals.suite import EvalConfig, prefix

SCENE_ROWS = (
    ("word_patch_hit_rate", "Word-patch hit rate", "%", None),
    ("word_patch_area_share", "&nbsp;&nbsp;area share of the right object", "%", None),
    ("word_patch_ratio", "&nbsp;&nbsp;ratio of the two", "", "1.00"),
    ("word_patch_ratio_colour", "&nbsp;&nbsp;ratio, colour words", "", "1.00"),
    ("word_patch_ratio_shape", "&nbsp;&nbsp;ratio, shape words", "", "1.00"),
    ("word_patch_ratio_size", "&nbsp;&nbsp;ratio, size words", "", "1.00"),
    ("word_patch_ratio_projected", "&nbsp;&nbsp;ratio, projected places", "", "1.00"),
    ("word_patch_ratio_grad_cam", "&nbsp;&nbsp;ratio, Grad-CAM", "", "1.00"),
    ("word_patch_landed", "Matches that land on some object", "%", None),
    ("colour_swap_moved", "Swapped colour word: match moves to the other object", "%", None),
    ("colour_swap_anchored", "&nbsp;&nbsp;words that matched their own object before the swap", "%", None),
    ("twin_i2t", "Caption beats its twin, by s_i2t", "%", "50.0"),
    ("twin_t2i", "Caption beats its twin, by s_t2i", "%", "50.0"),
)
DEFINITIONS = (
    ("match", "A word's match is the patch where the word's map is highest. In a late interaction the map is the "
     "cosine, averaged over the word's subword tokens; in a dual tower of single vectors the better of projected "
     "places and Grad-CAM for the word alone as a text; in a model where image and text meet the transport plan, or "
     "the cross-attention's Grad-CAM. It lands on an object when the centre of the patch lies in the object's box."),
    ("hit rate", "Of the matches of size, colour and shape words that land on some object, how many land on the "
     "object that the word speaks of."),
    ("area share", "The mean share of that object's box in the area of all boxes: what matches thrown at random onto "
     "the objects would hit. The ratio of the two is 1 for these."),
    ("colour swap", "In a caption, one colour word is replaced by the colour of another object. Of the colour words "
     "that matched their own object before, how many match the other object then."),
    ("twin", "The caption with the colours of two objects exchanged: the same words, and false. How often the image "
     "scores higher with the caption. Text alone cannot tell: both have as many never-trained combinations."),
)  # fmt: skip


def tiles(findings: Findings, config: EvalConfig) -> str:
    """The few numbers that a reader wants first."""
    return f'<div class="tiles">{"".join(_tiles(findings.trained, config))}</div>'


def _tiles(values: dict[str, float], config: EvalConfig) -> Iterator[str]:
    for folder in config.retrieval[:1]:
        for direction in ("image_to_text", "text_to_image"):
            value, chance = (values[f"{prefix(folder)}{direction}_R@1{end}"] for end in ("", "_chance"))
            yield _tile(
                f"{100 * value:.1f} %", f"{direction.replace('_', ' ')} R@1", f"{value / chance:.0f} times chance"
            )
    for folder in config.scenes[:1]:
        own = {
            name.removeprefix(prefix(folder)): value
            for name, value in values.items()
            if name.startswith(prefix(folder))
        }
        if "word_patch_ratio" in own:
            hits = f"{100 * own['word_patch_hit_rate']:.0f} % of matches on an object, right one"
            yield _tile(f"{own['word_patch_ratio']:.2f}&times;", "word-patch hits over area share", hits)
        if "colour_swap_moved" in own:
            yield _tile(
                f"{100 * own['colour_swap_moved']:.0f} %",
                "matches that follow a swapped colour",
                "of words that matched",
            )
        yield _tile(f"{100 * own['twin_i2t']:.0f} %", "captions that beat their twin", "chance 50 %")


def _tile(value: str, name: str, small: str) -> str:
    return f'<div class="tile card"><b>{value}</b><span>{name}</span><small>{small}</small></div>'


def retrieval_table(findings: Findings, folder: str) -> str:
    """R@K both ways, of the model, the controls, and chance."""
    head = "".join(f"<th>R@{k}</th>" for k in KS)
    rows = "".join(
        f'<tr class="{"ours" if name == "trained" else "other"}"><td>{escape(name)}</td>'
        + "".join(f"<td>{100 * value:.1f}</td>" for value in values)
        + "</tr>"
        for name, values in retrieval_rows(findings, folder)
    )
    return (
        f"<h2>Retrieval on {escape(short_name(folder))}</h2>"
        "<p>Of all captions, is the right one among the K that fit an image best, and of all images the right one for "
        "a caption? In per cent. Captions that say the same count as equal where the recipe says so; ties count by "
        "their expected value. The control predicts a caption's words from the image's colour histogram by ridge "
        "regression, fitted on the training pairs.</p>"
        f'<div class="card scroll"><table><thead><tr><th></th><th colspan="{len(KS)}">image to text</th>'
        f'<th colspan="{len(KS)}">text to image</th></tr><tr><th></th>{head}{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def understanding(findings: Findings, folder: str) -> str:
    """Word-patch alignment, swaps and twins beside the untrained model and text alone, with their definitions."""
    rows = ""
    for name, label, unit, chance in SCENE_ROWS:
        key = prefix(folder) + name
        if key not in findings.trained:
            continue
        cells = [
            _number(scores.get(key), unit) for scores in (findings.trained, findings.untrained, findings.text_only)
        ]
        rows += (
            f"<tr><td>{label}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td>{chance or ''}</td></tr>"
        )
    definitions = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in DEFINITIONS)
    return (
        f"<h2>What the words see on {escape(short_name(folder))}</h2>"
        "<p>Each scene holds at least one combination of colour and shape that occurs in no training scene.</p>"
        '<div class="card scroll"><table><thead><tr><th></th><th>trained</th><th>untrained</th><th>text only</th>'
        f"<th>chance</th></tr></thead><tbody>{rows}</tbody></table></div><dl>{definitions}</dl>"
    )


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.2f}"


def short_name(folder: str) -> str:
    """A data set's name in headings."""
    return prefix(folder).removeprefix("eval/").rstrip("/")
