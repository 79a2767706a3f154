"""One task per optimizer step (UNITER, Chen et al. 2020, section 3.2): which, and what its batches hold."""

from dataclasses import replace
from itertools import accumulate

from mmpt.data.randomness import generator
from mmpt.inputs import InputSpec

WORDS, MATCHING, REGIONS = "mlm", "itm", "mr"  # the last begins the names of the tasks that guess masked regions
Tasks = tuple[tuple[str, int], ...]


def check_tasks(tasks: Tasks) -> None:
    """Raises ValueError for a name that comes twice and for a weight below 1."""
    names = [name for name, _ in tasks]
    if len(set(names)) < len(names) or any(weight < 1 for _, weight in tasks):
        raise ValueError(f"tasks want names that differ and integer weights of 1 or more, got {tasks}")


def task_of(tasks: Tasks, seed: int, first_position: int, global_batch: int) -> str:
    """The task of the global batch that begins at a position: one by weight; "" where there are none.

    A pure function of (seed, step), step = first_position // global_batch: so it is the same on all ranks without a
    word between them, for all micro-batches of the step, and after a resume with another world size.
    """
    if not tasks:
        return ""
    draw = generator(seed, "task", 0, first_position // global_batch).random() * sum(weight for _, weight in tasks)
    ends = accumulate(weight for _, weight in tasks)
    return next(name for (name, _), end in zip(tasks, ends, strict=True) if draw < end)


def inputs_for_evaluation(inputs: InputSpec) -> InputSpec:
    """Pictures in the method's form and texts, and nothing that training draws."""
    return replace(
        inputs, extra_views=0, masked_words=None, masked_regions=0.0, partners=False, draws=0, most_patches=0, tasks=()
    )


def inputs_for(inputs: InputSpec, task: str) -> InputSpec:
    """What a batch for one task holds: of what the method asks for, what this task does not need is left out."""
    if not inputs.tasks:
        return inputs
    return replace(
        inputs,
        masked_words=inputs.masked_words if task == WORDS else None,
        partners=inputs.partners and task == MATCHING,
        masked_regions=inputs.masked_regions if task.startswith(REGIONS) else 0.0,
    )
