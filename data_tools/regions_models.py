"""Regions of one's own pictures: a detector's boxes, or a grid laid over one frozen encoder's feature map.

A grid is what Jiang et al. 2020 ("In Defense of Grid Features for Visual Question Answering") put in place of boxes.
Both give the arrays that `mmpt.data.regions` describes. Only transformers' models, by hub name or path.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mmpt.data.regions import BOXES, CLASSES, CONFIDENCE, FEATURES


class RegionModel(Protocol):
    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, np.ndarray]]:
        """The regions of each picture."""
        ...


@dataclass(frozen=True)
class Grid:
    """size x size cells, row by row: each the mean of what the encoder says there, all equally sure, of no class.

    The whole picture is squeezed into the square that the encoder takes. model: its last_hidden_state is a feature map
    [B, D, H, W], or the patches of a square picture after special tokens, [B, L, D].
    """

    model: Any
    size: int
    image_size: int
    mean: Tensor
    deviation: Tensor
    device: torch.device

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, np.ndarray]]:
        square = (self.image_size, self.image_size)
        pixels = np.stack([np.asarray(image.resize(square, Image.Resampling.BICUBIC)) for image in images])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # [B, 3, S, S]
        x = ((x - self.mean) / self.deviation).to(self.device)
        with torch.no_grad():
            features = feature_map(self.model(pixel_values=x).last_hidden_state.float())  # [B, D, H, W]
        if self.size > min(features.shape[2:]):
            rows, columns = features.shape[2:]
            raise ValueError(f"--grid {self.size} is finer than the encoder's feature map of {rows} x {columns}")
        cells = adaptive_avg_pool2d(features, self.size).flatten(2).transpose(1, 2).cpu().numpy()  # [B, N * N, D]
        edges = np.arange(self.size + 1) / self.size
        top, left = (axis.ravel() for axis in np.meshgrid(edges[:-1], edges[:-1], indexing="ij"))
        side = np.full_like(top, 1 / self.size)
        boxes = np.stack([left, top, left + side, top + side, side, side], axis=1)
        return [{FEATURES: own, BOXES: boxes, CONFIDENCE: np.ones(len(boxes))} for own in cells]


def feature_map(hidden: Tensor) -> Tensor:
    """[B, D, H, W] as it is; [B, L, D] -> [B, D, G, G]: the last G * G tokens, the most that form a square."""
    if hidden.dim() == 4:
        return hidden
    side = int(hidden.shape[1] ** 0.5)
    patches = hidden[:, hidden.shape[1] - side * side :]
    return patches.transpose(1, 2).unflatten(2, (side, side))


@dataclass(frozen=True)
class Detector:
    """What each query of a detector of the DETR family has found: its last state in the decoder as the features, its
    box, and its distribution over classes, background first.

    Of a detector that was trained with a softmax over classes and "no object" that is its own; of one with a sigmoid
    per class, the distribution that has the same odds of each class against the background.
    """

    model: Any
    processor: Any
    device: torch.device

    def __call__(self, images: Sequence[Image.Image]) -> list[dict[str, np.ndarray]]:
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        with torch.no_grad():
            out = self.model(**inputs)
        classes = class_distribution(out.logits.float(), self.model.config.num_labels).cpu().numpy()  # [B, Q, 1 + C]
        boxes = corners(out.pred_boxes.float()).cpu().numpy()  # [B, Q, 6]
        features = out.last_hidden_state.float().cpu().numpy()  # [B, Q, D]
        return [
            {FEATURES: f, BOXES: b, CONFIDENCE: c[:, 1:].max(1), CLASSES: c}
            for f, b, c in zip(features, boxes, classes, strict=True)
        ]


def class_distribution(logits: Tensor, classes: int) -> Tensor:
    """[..., C + 1] with "no object" last, or [..., C] of sigmoids -> [..., 1 + C], background first."""
    if logits.shape[-1] == classes + 1:
        background, logits = logits[..., -1:], logits[..., :-1]
    else:
        background = torch.zeros_like(logits[..., :1])
    return torch.cat([background, logits], dim=-1).softmax(-1)


def corners(boxes: Tensor) -> Tensor:
    """Centre and sides, as shares of the picture's, [..., 4] -> x1, y1, x2, y2, width, height, [..., 6], cut off at the
    picture's edges."""
    centre, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
    low, high = (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)
    return torch.cat([low, high, high - low], dim=-1)


def load_grid(name_or_path: str, size: int, device: torch.device) -> Grid:
    """A grid over an encoder. Raises ValueError, in one line, where there is none."""
    from transformers import AutoImageProcessor, AutoModel  # takes seconds to import

    model, processor = _loaded(AutoModel, name_or_path, device), _loaded(AutoImageProcessor, name_or_path)
    model = getattr(model, "vision_model", model)  # of a model of images and texts
    area = getattr(processor, "crop_size", None) or processor.size
    mean, deviation = (
        torch.tensor(value, dtype=torch.float32).view(3, 1, 1) for value in (processor.image_mean, processor.image_std)
    )
    return Grid(model, size, int(area.get("height") or area["shortest_edge"]), mean, deviation, device)


def load_detector(name_or_path: str, device: torch.device) -> Detector:
    """A detector of the DETR family. Raises ValueError, in one line, where there is none."""
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    model = _loaded(AutoModelForObjectDetection, name_or_path, device)
    return Detector(model, _loaded(AutoImageProcessor, name_or_path), device)


def _loaded(kind: Any, name_or_path: str, device: torch.device | None = None) -> Any:
    try:
        found = kind.from_pretrained(name_or_path)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{kind.__name__} finds nothing it can use at {name_or_path!r}: {reason}") from error
    return found if device is None else found.eval().to(device)
