"""Tasks of lm-evaluation-harness (lm_eval) on a loaded model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune._harness_model import model_class, need_lm_eval
from jaxprune.folder import Model

__all__ = ["LLM_PRUNER", "Tasks", "load_tasks", "model_class", "run_tasks"]

LLM_PRUNER = dict(
    boolq="acc", piqa="acc", hellaswag="acc_norm", winogrande="acc", arc_easy="acc", arc_challenge="acc_norm",
    openbookqa="acc_norm",
)  # fmt: skip
"""The tasks of Ma et al., `LLM-Pruner <https://arxiv.org/abs/2305.11627>`_, 2023, table 1, with the metric of each, as the
authors say it (github.com/horseee/LLM-Pruner, issue 25). Theirs is an older lm_eval, without a BOS: numbers differ a little."""


class Tasks(NamedTuple):
    """Tasks with their data.

    Attributes:
      manager: the `TaskManager` that found them.
      loaded: tasks and groups of lm_eval that are in no other group.
      preset: the metric of each task of a preset that was asked for.
    """

    manager: Any
    loaded: list[Any]
    preset: dict[str, str]


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> Tasks:
    """Finds tasks and loads their data.

    Args:
      names: of tasks, tags and groups of lm_eval, or `llm-pruner`.
      include_path: a folder with more tasks as YAML files, or None.

    Raises:
      ValueError: lm_eval is not installed, a task is not known, or its data cannot be loaded.
      FileNotFoundError: there is no such folder.
    """
    need_lm_eval()
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"include_path: {include_path} given; name a folder with tasks as .yaml files")
    preset = LLM_PRUNER if "llm-pruner" in names else {}
    wanted = list(dict.fromkeys(task for name in names for task in (LLM_PRUNER if name == "llm-pruner" else [name])))
    if not wanted or not all(wanted):
        raise ValueError(f"tasks: {','.join(names)!r} given; give names with commas between them, e.g. arc_easy,piqa")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [name for name in wanted if name not in manager.all_tasks]:
        raise ValueError(
            f"tasks: {unknown[0]!r} given; allowed are llm-pruner, the names that `lm-eval ls tasks` lists, and tasks in "
            "the folder that --include-path names"
        )
    try:
        found = manager.load(wanted)
    except Exception as error:  # a task's file may run any code, and each reader of data has errors of its own
        raise ValueError(
            f"tasks: {','.join(wanted)} cannot be loaded ({type(error).__name__}: {error}); the data of lm_eval's tasks are on "
            "the Hugging Face hub: check the network, or give tasks on files with --include-path"
        ) from error
    inner = {child for children in found["group_map"].values() for child in children}
    everything = found["groups"] | found["tasks"]
    return Tasks(manager, [task for name, task in everything.items() if name not in inner], preset)


def run_tasks(model: Model, tasks: Tasks, *, limit: int | None = None, num_fewshot: int | None = None) -> list[dict[str, Any]]:
    """What lm_eval measures, a row for each task and metric.

    Args:
      model: with its tokenizer.
      tasks: see `load_tasks`.
      limit: only so many items of each task, or None.
      num_fewshot: examples before each item; None is what the task says.

    Returns:
      Rows of `task`, `shots`, `items`, `metric`, `value`, `stderr`, where there are several `filter`. Of the tasks of a preset
      only its metrics; their mean is the last row.

    Raises:
      ValueError: a request of a task cannot be answered.
    """
    from lm_eval import simple_evaluate

    lm = model_class()(model)
    found = simple_evaluate(
        lm, tasks=tasks.loaded, task_manager=tasks.manager, limit=limit, num_fewshot=num_fewshot, log_samples=False
    )
    rows = [row for task, numbers in found["results"].items() for row in _rows(found, task, numbers)]
    rows = [row for row in rows if tasks.preset.get(row["task"], row["metric"]) == row["metric"]]
    if tasks.preset:
        values = [row["value"] for row in rows if row["task"] in tasks.preset]
        rows.append(dict(task="llm-pruner", metric="mean", value=sum(values) / len(values)))
    return rows


def _rows(found: dict[str, Any], task: str, numbers: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, value in numbers.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = numbers.get(f"{metric}_stderr,{filter_}")
        row = dict(task=task, shots=found["n-shot"].get(task), items=found["n-samples"].get(task, {}).get("effective"))
        row |= dict(metric=metric, value=value, stderr=error if isinstance(error, float) else None)
        rows.append(row if filter_ == "none" else row | dict(filter=filter_))
    return rows
