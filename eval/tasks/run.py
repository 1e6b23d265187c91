"""Runs downstream tasks through lm-evaluation-harness (extra `tasks`)."""

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
from typing import TYPE_CHECKING, Any

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import DbrxError, RequestError, UnsupportedError
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

from .answers import Answers

if TYPE_CHECKING:
    from .harness import DeferredModel, HarnessModel

__all__ = ["TaskResults", "Tasks", "find_tasks", "run_tasks"]


@dataclass(frozen=True)
class Tasks:
    """Tasks that the harness has loaded with their data sets and that are safe to run."""

    names: tuple[str, ...]
    """Of tasks, groups or tags, as given."""
    manager: Any
    """The harness's `TaskManager` that found them."""


@dataclass(frozen=True)
class TaskResults:
    """The harness's results, and what is needed to repeat them."""

    values: dict[str, Any]
    """JSON of the harness's `results`, `groups`, `group_subtasks`, `versions`, `n-shot`, `n-samples` and `higher_is_better`."""
    requested_tokens: int
    """Tokens that would run if each request ran alone, without generated tokens."""
    prefilled_tokens: int
    """Tokens that ran, without generated tokens; fewer than `requested_tokens` where requests share a prefix."""
    truncated_contexts: int
    """Requests whose context did not fit the model's and was truncated at its beginning."""
    requests_sha256: dict[str, str]
    """By task, over kind, context, and continuation or options of its requests."""
    seeds: dict[str, int]
    """Of the harness and of sampling."""
    versions: dict[str, str]
    """Of the harness and of `datasets`."""
    dtype: str
    """Of activations."""

    def table(self) -> str:
        """The harness's own table in Markdown: tasks, then groups."""
        from lm_eval.utils import make_table

        tables = [make_table(self.values)]
        if self.values.get("groups"):
            tables.append(make_table(self.values, "groups"))
        return "\n\n".join(table.rstrip() for table in tables)


def find_tasks(names: Sequence[str], path: Path | None = None) -> Tasks:
    """Look up tasks and download their data sets.

    Args:
        names: of tasks, groups or tags.
        path: folder with task YAMLs, which take precedence over the harness's own of the same names.

    Raises:
        UnsupportedError: the harness is not installed.
        RequestError: a name is unknown, the folder does not exist, the harness cannot load a task, a data set cannot be downloaded, or a
            task runs code that a model writes or uses more than text.
    """
    try:
        import datasets  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UnsupportedError("tasks need lm-evaluation-harness, which is not installed: pip install 'dbrx_q[tasks]'") from None
    if not names:
        raise RequestError("at least one task must be named; found none. `lm-eval ls tasks` lists the harness's")
    if path is not None and not path.is_dir():
        raise RequestError(f"{path}: must be a folder with task YAMLs; it is not a folder. Check the path")
    with _quiet():
        manager = None
        if path is not None:  # without the harness's own 14,000 files, which take half a minute to read
            manager = _loaded(lambda: TaskManager(include_path=str(path), include_defaults=False), f"the tasks in {path}")
        if manager is None or not set(names) <= set(manager.all_subtasks):
            manager = _loaded(lambda: TaskManager(include_path=None if path is None else str(path)), "the harness's tasks")
        _check_names(names, manager.all_tasks)
        # Fails before the minutes of loading a model. The harness loads the tasks again later, from disk.
        loaded = _loaded(lambda: manager.load(list(names)), f"the tasks {', '.join(names)}")
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RequestError(f"a task must not run code that a model writes; {name} is marked unsafe. Run it in a sandbox of your own")
        if getattr(task, "MULTIMODAL", False):
            raise RequestError(f"a task must use text alone; {name} has images or audio. Leave it out")
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
    """Measure a model on tasks. The harness's output is redirected to stderr.

    Args:
        tasks: found by `find_tasks`.
        load: loads the model; called when all requests have been created and checked.
        tokenizer: the model's.
        config: the model's.
        name: of the checkpoint.
        num_fewshot: examples before each question; None for each task's default. A task whose default is 0 keeps it.
        limit: documents of each task, from the first on; None for all.
        batch_size: requests that run together.
        kv_format: "plain", "int8" or "int4".
        chat: whether to apply the checkpoint's chat template to prompts, with examples as turns.
        answers: of an interrupted run to resume; new answers are added, and saved however the run ends.
        on_done: called with (requests done, total requests) of the kind of request that runs.

    Raises:
        RequestError: a number is out of range, the model cannot answer a request, or the harness or a task's code fails.
        TokenizerError: `chat` is set and the checkpoint has no template.
    """
    from lm_eval import simple_evaluate

    from .harness import SEED, DeferredModel, HarnessModel, check_requests

    answers = answers or Answers()
    manager = _Recording(tasks.manager)
    hashes: dict[str, str] = {}
    harness: list[HarnessModel] = []

    def start() -> HarnessModel:
        for task_name, task in manager.loaded["tasks"].items():
            hashes[task_name] = _requests_sha256(task.instances)
            answers.total += sum(instance.repeats for instance in task.instances)
            for kind in sorted({instance.request_type for instance in task.instances}):
                check_requests(kind, [instance for instance in task.instances if instance.request_type == kind], config.max_seq_len)
        model = load()
        harness.append(
            HarnessModel(model, tokenizer, name=name, batch_size=batch_size, kv_format=kv_format, answers=answers, on_done=on_done)
        )
        return harness[0]

    deferred = DeferredModel(tokenizer, name, start)
    seeds = {"random": 0, "numpy": SEED, "torch": SEED, "fewshot": SEED}  # the harness's defaults
    with _answers_saved(answers, tasks, deferred), _quiet():
        results = simple_evaluate(
            deferred,
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
    return _task_results(results, harness[0], hashes, seeds | {"sampling": SEED})


def _task_results(results: dict[str, Any], model: HarnessModel, hashes: dict[str, str], seeds: dict[str, int]) -> TaskResults:
    """The harness's results together with the counts of the model that it ran."""
    names = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
    return TaskResults(
        values=json.loads(json.dumps({key: results[key] for key in names if key in results}, default=str)),
        requested_tokens=model.counts.requested,
        prefilled_tokens=model.counts.prefilled,
        truncated_contexts=model.counts.truncated,
        requests_sha256=hashes,
        seeds=seeds,
        versions={package: version(package) for package in ("lm_eval", "datasets")},
        dtype=str(model.dtype).removeprefix("torch."),
    )


@contextmanager
def _answers_saved(answers: Answers, tasks: Tasks, deferred: DeferredModel) -> Iterator[None]:
    """Saves the answers however the block ends, and raises errors of the harness and of a task's code as `RequestError`."""
    try:
        yield
    except Exception as error:
        hint = " Answers are saved: the same command with --resume continues" if answers.save() and answers.done else ""
        if isinstance(error, (DbrxError, MemoryError)) or error is deferred.failure:
            raise
        raise RequestError(
            f"the tasks {', '.join(tasks.names)} must run; {_brief(error)}. "
            f"Lower --num-fewshot if the task has fewer examples; otherwise correct the task's file.{hint}"
        ) from None
    except BaseException:
        answers.save()
        raise
    answers.save()


class _Recording:
    """Wraps the harness's `TaskManager` and records the tasks that it loaded last."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.loaded: dict[str, Any] = {"tasks": {}}

    def load(self, names: list[str]) -> dict[str, Any]:
        self.loaded = self._manager.load(names)
        return self.loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def _requests_sha256(instances: Sequence[Any]) -> str:
    """SHA-256 over a line of JSON per request: its kind, its context, and its continuation or options."""
    digest = hashlib.sha256()
    for instance in instances:
        digest.update(json.dumps([instance.request_type, *instance.args], sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=5)
            guess = f"Did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them; --tasks-path adds a folder of your own"
            raise RequestError(f"a task must be one that the harness knows; found {name!r}. {guess}")


def _loaded(load: Callable[[], Any], what: str) -> Any:
    """Call `load`. The harness passes on errors of the hub, of YAML and of a task's own code, so that any kind can occur."""
    try:
        return load()
    except DbrxError:
        raise
    except Exception as error:
        raise RequestError(
            f"{what} must load; {_brief(error)}. Check the network if a data set is missing, otherwise the task's file"
        ) from None


def _brief(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text[:300]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Redirects stdout to stderr, and silences the hub's warnings about retries: the final error reports the problem."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        hub.setLevel(level)
