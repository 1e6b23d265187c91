"""Downstream tasks through lm-evaluation-harness (extra `tasks`)."""

from __future__ import annotations

import hashlib
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

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import DbrxError, RequestError, UnsupportedError
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .answers import Answers

__all__ = ["TaskResults", "Tasks", "find_tasks", "run_tasks"]


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist, whose data sets are at hand and that may be run. names: as given. manager: the harness's, which knows them."""

    names: tuple[str, ...]
    manager: Any


@dataclass(frozen=True)
class TaskResults:
    """What the harness measured.

    values: JSON of the harness's `results`, `groups`, `group_subtasks`, `versions`, `n-shot`, `n-samples` and `higher_is_better`.
    requested_tokens: what all requests would run, each by itself. prefilled_tokens: what was run for them; generated tokens are in neither.
    cut_contexts: requests whose contexts were longer than the model's and lost their beginning. requests_sha256: by task, over kind,
    context and continuation or options of its requests. seeds: of the harness and of sampling. versions: of the harness and `datasets`.
    dtype: of activations.
    """

    values: dict[str, Any]
    requested_tokens: int
    prefilled_tokens: int
    cut_contexts: int
    requests_sha256: dict[str, str]
    seeds: dict[str, int]
    versions: dict[str, str]
    dtype: str

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
        RequestError: a name that nothing has, no such folder, a task that the harness cannot load, a data set that cannot be fetched, or
            a task that runs code of a model's or shows it more than text.
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
        loaded = _loaded(lambda: manager.load(list(names)), f"the tasks {', '.join(names)}")
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RequestError(f"a task must not run code that a model writes; {name} is marked unsafe. Run it in a sandbox of your own")
        if getattr(task, "MULTIMODAL", False):
            raise RequestError(f"a task must ask in text alone; {name} shows pictures or sounds. Leave it out")
    return Tasks(tuple(names), manager)


def run_tasks(
    tasks: Tasks,
    load: Callable[[], DbrxForCausalLM],
    tokenizer: DbrxTokenizer,
    config: DbrxConfig,
    *,
    name: str,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    kv_format: str = "plain",
    chat: bool = False,
    answers: Answers | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> TaskResults:
    """Measure a model on tasks; what the harness prints goes to stderr.

    Args:
        tasks: of `find_tasks`.
        load: loads the model; called when all requests have been made and checked.
        tokenizer: the model's.
        config: the model's.
        name: of the checkpoint.
        num_fewshot: examples before each question; None for each task's own number. A task that says 0 keeps it.
        limit: documents of each task, from its first on; None for all.
        batch_size: requests that run together.
        kv_format: "plain", "int8" or "int4".
        chat: whether prompts go through the checkpoint's chat template, examples as turns.
        answers: of the same run that was interrupted; filled on the way, and kept whatever ends the run.
        on_done: called with (requests done, in all) of the kind of request that runs.

    Raises:
        RequestError: a number out of range, a request that the model cannot serve, or an error of the harness or of a task's own code.
        TokenizerError: a chat, and the checkpoint has no template.
    """
    from lm_eval import simple_evaluate

    from .harness import SEED, DeferredModel, HarnessModel, check_requests

    kept = answers or Answers()
    manager = _Recording(tasks.manager)
    hashes: dict[str, str] = {}
    harness: list[HarnessModel] = []

    def start() -> HarnessModel:
        for task_name, task in manager.loaded["tasks"].items():
            hashes[task_name] = _requests_sha256(task.instances)
            kept.total += sum(instance.repeats for instance in task.instances)
            for kind in sorted({instance.request_type for instance in task.instances}):
                check_requests(kind, [one for one in task.instances if one.request_type == kind], config.max_seq_len)
        model = load()
        harness.append(HarnessModel(model, tokenizer, name=name, batch_size=batch_size, kv_format=kv_format, answers=kept, on_done=on_done))
        return harness[0]

    asked = DeferredModel(tokenizer, name, start)
    seeds = {"random": 0, "numpy": SEED, "torch": SEED, "fewshot": SEED}  # the harness's defaults
    try:
        with _quiet():
            found = simple_evaluate(
                asked,
                tasks=list(tasks.names),
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                log_samples=False,
                random_seed=seeds["random"],
                numpy_random_seed=seeds["numpy"],
                torch_random_seed=seeds["torch"],
                fewshot_random_seed=seeds["fewshot"],
            )
    except Exception as error:
        later = " Answers are kept: then --resume goes on" if kept.keep() and kept.done else ""
        if isinstance(error, (DbrxError, MemoryError)) or error is asked.failure:
            raise
        raise RequestError(
            f"the tasks {', '.join(tasks.names)} must run; {_brief(error)}. "
            f"Lower --num-fewshot if it is more than the examples that there are; otherwise correct the task's file.{later}"
        ) from None
    except BaseException:
        kept.keep()
        raise
    kept.keep()
    names = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
    counts = harness[0].counts
    return TaskResults(
        values=json.loads(json.dumps({key: found[key] for key in names if key in found}, default=str)),
        requested_tokens=counts.requested,
        prefilled_tokens=counts.prefilled,
        cut_contexts=counts.cut,
        requests_sha256=hashes,
        seeds=seeds | {"sampling": SEED},
        versions={package: version(package) for package in ("lm_eval", "datasets")},
        dtype=str(harness[0].dtype).removeprefix("torch."),
    )


class _Recording:
    """The harness's manager of tasks; remembers what it loaded last."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.loaded: dict[str, Any] = {"tasks": {}}

    def load(self, names: list[str]) -> dict[str, Any]:
        self.loaded = self._manager.load(names)
        return self.loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def _requests_sha256(instances: Sequence[Any]) -> str:
    """Over one line of JSON for every request: its kind, its context, and its continuation or options."""
    digest = hashlib.sha256()
    for one in instances:
        digest.update(json.dumps([one.request_type, *one.args], sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


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
        raise RequestError(
            f"{what} must load; {_brief(error)}. If it is a data set, check the network; if it is a task, its file"
        ) from None


def _brief(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:300]}"


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
