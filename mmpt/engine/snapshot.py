"""One rank's checkpoint file as a block of host memory: filled from the device in one go, then written at leisure.

The block has the layout of a safetensors file (8 bytes of length, a JSON header, the values), so that it is written as
it lies, and it is kept from one checkpoint to the next: a rank never holds more than one copy of its share.
"""

import json

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Snapshot:
    """Reusable host memory, page-locked where there is a device to copy from."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._bytes = 0

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy all values here. They may change as soon as this returns."""
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps all of them aligned
        header, starts = _header(tensors, names)
        self._bytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
        if len(self._memory) < self._bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old block goes before the new one comes
            self._memory = torch.empty(self._bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        devices = set()
        for name, start in zip(names, starts, strict=True):
            tensor = tensors[name].detach()
            here = self._memory[start : start + tensor.nbytes].view(tensor.dtype)
            here.copy_(tensor.flatten(), non_blocking=True)
            devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def data(self) -> memoryview:
        """The bytes of the file. Valid until the next `fill`."""
        return self._memory[: self._bytes].numpy().data


def _header(tensors: dict[str, Tensor], names: list[str]) -> tuple[bytes, list[int]]:
    """The head of a safetensors file, padded so that values begin aligned, and where in the file each tensor lies."""
    entries, offsets = {}, []
    reached = 0
    for name in names:
        tensor = tensors[name]
        offsets.append(reached)
        reached += tensor.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offsets[-1], reached],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + offset for offset in offsets]
