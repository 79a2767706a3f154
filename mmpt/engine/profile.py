"""Where a step's time goes: `--run.profile_steps a,b` profiles steps a to b (both included) on rank 0.

profile/trace.json   every operator and kernel, for chrome://tracing or ui.perfetto.dev
profile/profile.txt  one page: milliseconds per step of each phase, of communication, and of the costliest operators

Phases are marked where they happen (data/device.py, methods/method.py, build.py, step.py) and towers by hooks that are
there while profiling alone. On CUDA the host runs ahead of the device: phases tell what the host did, operators
what the device did.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from mmpt import dist

PHASES = ("data", "encode", "image tower", "text tower", "loss", "backward", "optimizer")
WITHIN = ("image tower", "text tower")
"""Part of encode."""
COMMUNICATION = ("ncclDevKernel", "nccl:", "gloo:", "c10d::")
"""NCCL's kernels, torch's notes around them and around gloo's, and the calls."""
OPERATORS = 25


def check_steps(steps: tuple[int, ...]) -> None:
    """ValueError unless there are none, or a first and a last one."""
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        raise ValueError(f"run.profile_steps wants a first and a last step, from 1 on, got {','.join(map(str, steps))}")


class Profile:
    """Off where `steps` is empty, on other ranks than 0, and before and after those steps."""

    def __init__(self, run_dir: Path, steps: tuple[int, ...], method: nn.Module, device: torch.device):
        self._folder, self._method, self._device = run_dir / "profile", method, device
        self._first, self._last = steps if steps and dist.rank() == 0 else (0, 0)
        self._profiler: profile | None = None
        self._hooks: list[Any] = []
        self._began_at = 0

    def before(self, step: int) -> None:
        """Called before the data of each step is asked for: begins with the first, writes after the last."""
        if self._profiler is not None and step > self._last:
            self.close(step)
        elif self._profiler is None and self._first <= step <= self._last:
            self._begin(step)

    def _begin(self, step: int) -> None:
        for name, module in self._method.named_modules():
            tower = name.rpartition(".")[2]
            if tower in ("image", "text"):
                self._hooks += _marking(module, f"mmpt: {tower} tower")
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)
        self._profiler, self._began_at = profile(activities=activities), step
        self._profiler.start()

    def close(self, next_step: int) -> None:
        """Write what there is, of the steps before next_step; nothing if none was profiled. OSError if it cannot."""
        if self._profiler is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if next_step > self._began_at:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / "trace.json"))
            text = summary(profiler.key_averages(), self._began_at, next_step - 1, self._device.type == "cuda")
            (self._folder / "profile.txt").write_text(text)


def _marking(module: nn.Module, name: str) -> list[Any]:
    """Hooks that put a module's forward under this name."""
    open_marks: list[record_function] = []

    def enter(*_: Any) -> None:
        mark = record_function(name)
        mark.__enter__()
        open_marks.append(mark)

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def summary(averages: Any, first: int, last: int, cuda: bool) -> str:
    """The page. averages: torch's `key_averages()`, times in microseconds."""
    steps = last - first + 1
    marks = {row.key.removeprefix("mmpt: "): row for row in averages if row.key.startswith("mmpt: ")}
    operators = [row for row in averages if not row.key.startswith(("mmpt: ", "ProfilerStep"))]

    def own(row: Any) -> float:
        return (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e3 / steps

    out = [
        f"steps {first} to {last} on rank 0, milliseconds per step",
        "",
        f"{'phase (host time)':40}{'ms':>10}{'calls':>8}",
    ]
    for name in PHASES:
        if name in marks:
            shown = f"  of which {name}" if name in WITHIN else name
            out.append(f"{shown:40}{marks[name].cpu_time_total / 1e3 / steps:>10.2f}{marks[name].count / steps:>8.1f}")
    talk = [row for row in operators if any(word in row.key for word in COMMUNICATION)]
    where = "device" if cuda else "host"
    out += ["", f"{'communication (' + where + ' time)':40}{'ms':>10}{'calls':>8}"]
    out += [f"{row.key[:39]:40}{own(row):>10.2f}{row.count / steps:>8.1f}" for row in sorted(talk, key=own)[::-1]]
    out += [] if talk else ["none was seen"]
    out += ["", f"{'operators (own ' + where + ' time)':60}{'ms':>10}{'calls':>8}"]
    for row in sorted(operators, key=own)[::-1][:OPERATORS]:
        out.append(f"{row.key[:59]:60}{own(row):>10.2f}{row.count / steps:>8.1f}")
    return "\n".join(out) + "\n"
