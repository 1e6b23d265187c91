"""Downstream tasks through lm-evaluation-harness (extra `tasks`)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dbrx_q.errors import DbrxError, RequestError, UnsupportedError
from dbrx_q.model import DbrxForCausalLM
from dbrx_q.tokenizer import DbrxTokenizer

__all__ = ["TaskResults", "Tasks", "find_tasks", "run_tasks"]


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist and whose data sets are at hand. names: as given. manager: the harness's, which knows them."""

    names: tuple[str, ...]
    manager: Any


@dataclass(frozen=True)
class TaskResults:
    """What the harness measured.

    values: JSON of the harness's `results`, `groups`, `group_subtasks`, `versions`, `n-shot`, `n-samples` and `higher_is_better`.
    requested_tokens: what all requests would run, each by itself. prefilled_tokens: what was run for them; generated tokens are in neither.
    harness: its version.
    """

    values: dict[str, Any]
    requested_tokens: int
    prefilled_tokens: int
    harness: str

    def table(self) -> str:
        """The harness's own table, in Markdown: tasks, then groups."""
        from lm_eval.utils import make_table

        tables = [make_table(self.values)]
        if self.values.get("groups"):
            tables.append(make_table(self.values, "groups"))
        return "\n\n".join(table.rstrip() for table in tables)


def find_tasks(names: Sequence[str], path: Path | None = None) -> Tasks:
    """Look tasks up, and fetch their data sets.

    Args:
        names: of tasks, groups or tags.
        path: folder with task YAMLs, which come before the harness's own of the same names.

    Raises:
        UnsupportedError: the harness is not installed.
        RequestError: a name that nothing has, no such folder, a task that the harness cannot load, or a data set that cannot be fetched.
    """
    try:
        import datasets  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UnsupportedError("tasks need lm-evaluation-harness, which is not installed: pip install 'dbrx_q[tasks]'") from None
    if not names:
        raise RequestError("at least one task must be named; found none. See `lm-eval ls tasks` for the harness's")
    if path is not None and not path.is_dir():
        raise RequestError(f"{path}: must be a folder with task YAMLs; there is none. Check the path")
    with _quiet():
        manager = None
        if path is not None:  # the harness's own are 14,000 files, which take it half a minute to read
            manager = _loaded(lambda: TaskManager(include_path=str(path), include_defaults=False), f"the tasks in {path}")
        if manager is None or not set(names) <= set(manager.all_subtasks):
            manager = _loaded(lambda: TaskManager(include_path=None if path is None else str(path)), "the harness's tasks")
        _check_names(names, manager.all_tasks)
        # Before minutes of loading a model; the harness loads them again, from disk.
        _loaded(lambda: manager.load(list(names)), f"the tasks {', '.join(names)}")
    return Tasks(tuple(names), manager)


def run_tasks(
    tasks: Tasks,
    model: DbrxForCausalLM,
    tokenizer: DbrxTokenizer,
    *,
    name: str,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    kv_format: str = "plain",
    chat: bool = False,
    on_done: Callable[[int, int], None] | None = None,
) -> TaskResults:
    """Measure a model on tasks; what the harness prints goes to stderr.

    Args:
        tasks: of `find_tasks`.
        model: a loaded model.
        tokenizer: the model's.
        name: of the checkpoint.
        num_fewshot: examples before each question; None for each task's own number. A task that says 0 keeps it.
        limit: documents of each task, from its first on; None for all.
        batch_size: requests that run together.
        kv_format: "plain", "int8" or "int4".
        chat: whether prompts go through the checkpoint's chat template, examples as turns.
        on_done: called with (requests done, in all) of the kind of request that runs.

    Raises:
        RequestError: a number out of range, or a request that the model cannot serve.
        TokenizerError: a chat, and the checkpoint has no template.
    """
    from lm_eval import simple_evaluate

    from .harness import HarnessModel

    harness = HarnessModel(model, tokenizer, name=name, batch_size=batch_size, kv_format=kv_format, on_done=on_done)
    with _quiet():
        found = simple_evaluate(
            harness,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
        )
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
    values = json.loads(json.dumps({key: found[key] for key in kept if key in found}, default=str))
    counts = harness.counts
    return TaskResults(values, counts.requested, counts.prefilled, version("lm_eval"))


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=5)
            guess = f"Near: {', '.join(near)}" if near else "See `lm-eval ls tasks`, or name a folder of your own with --tasks-path"
            raise RequestError(f"a task must be one that the harness knows; found {name!r}. {guess}")


def _loaded(load: Callable[[], Any], what: str) -> Any:
    """What `load` gives. Packages below the harness raise errors of any kind: of the hub, of YAML, of a task's own code."""
    try:
        return load()
    except DbrxError:
        raise
    except Exception as error:
        text = next(iter(str(error).strip().splitlines()), "")
        raise RequestError(
            f"{what} must load; {type(error).__name__}: {text[:300]}. If it is a data set, check the network; if it is a task, its file"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what is printed off stdout, and the hub's repeated attempts off stderr: an error says it once."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        hub.setLevel(level)
