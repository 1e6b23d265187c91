"""The document of a run: tables of all that its journal holds, and what it did not reach."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dbrx_q.errors import RequestError
from dbrx_q.eval.bench.ceilings import MATMUL_ON_GPU
from dbrx_q.eval.bench.kernel_work import COPY, MATMUL
from dbrx_q.kernels.triton.launch import CHIPS

from .journal import DONE, FILE, Record, read_records
from .plan import TITLES, Item, plan
from .settings import DRY_CHIP, Settings

__all__ = ["document", "write_document"]

_WIDTH = 120
_TAIL = 400  # characters of a failure's output


def write_document(folder: Path, out: Path) -> None:
    """Write the document of the results in `folder` to `out`, whole or not at all.

    Raises:
        RequestError: there are no results, they are damaged, or `out` cannot be written or holds them.
    """
    text = document(read_records(folder))
    if out.exists() and out.samefile(folder / FILE):
        raise RequestError(f"{out}: a document must not replace the results that it is made of. Name another file with --out")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise RequestError(f"{out}: a document must be writable; {error.strerror}. Name another file with --out") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def document(records: Sequence[Record]) -> str:
    """The last result of each item on the GPU of the newest result, by stage, in Markdown.

    Raises:
        RequestError: there are none, or one lacks what a run writes.
    """
    if not records:
        raise RequestError("a document needs results; the journal has none. Run `dbrx-q bench gpu` longer")
    try:
        return _document([record for record in records if record.device == records[-1].device], records)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise RequestError(
            f"results must have what `dbrx-q bench gpu` writes; some lack it ({type(error).__name__}: {error}). Run it in a new folder"
        ) from None


def _document(records: Sequence[Record], of_all_devices: Sequence[Record]) -> str:
    last = {record.item: record for record in records}
    system = next((record for record in records if record.item == "system/versions" and record.status == DONE), None)
    left_out = sorted({record.device for record in of_all_devices} - {records[-1].device})
    lines = list(_heading(records[-1], system, len({record.code for record in last.values()}), left_out))
    rates = [record.value for record in last.values() if record.item.startswith("ceilings/") and "bandwidth" in record.value]
    for stage, title in TITLES.items():
        chosen = {item.partition("/")[2]: record for item, record in last.items() if item.startswith(f"{stage}/")}
        body = list(_section(stage, chosen, rates))
        if body:
            lines += ["", f"## {title}", "", *body]
    chip = CHIPS.get(str((system.value if system else {}).get("chip")), DRY_CHIP)
    lines += _not_reached(last, plan(Settings("meta" if records[-1].device == "meta" else "cuda", Path()), chip))
    return "\n".join(lines) + "\n"


def _heading(newest: Record, system: Record | None, codes: int, left_out: Sequence[str]) -> Iterator[str]:
    yield f"# {newest.device}, {newest.date[:10]}"
    yield ""
    value = {} if system is None else system.value
    versions = ", ".join(f"{name} {version}" for name, version in value.get("versions", {}).items())
    multiprocessors = f"{value['multiprocessors']} multiprocessors, " if "multiprocessors" in value else ""
    where = f"{value.get('chip', 'unknown chip')}, {multiprocessors}Python {value.get('python', '?')}"
    missing = ", ".join(value.get("missing", [])) or "none"
    text = f"`dbrx-q bench gpu` wrote these results: {where}, {versions or 'no versions'}; code {newest.code}. Missing packages: {missing}."
    if codes > 1:
        text += f" The results are of {codes} versions of the code."
    if left_out:
        text += f" Its folder also has results of other devices, which are left out: {', '.join(left_out)}."
    if newest.device == "meta":
        text += " This was a run without a GPU: launches were recorded, and nothing was timed."
    yield from textwrap.wrap(text, _WIDTH, break_on_hyphens=False)


def _section(stage: str, records: Mapping[str, Record], rates: Sequence[Mapping[str, float]]) -> Iterator[str]:
    done = {name: record.value for name, record in records.items() if record.status == DONE}
    match stage:
        case "compile":
            yield from _table(("kernels", "recorded", "compiled", "failed", "left", "seconds"), _compiled(records))
        case "memcheck":
            yield from _table(("calls", "result"), ((name, _checked(value)) for name, value in done.items()))
        case "tests":
            yield from _table(("file", "passed", "failed", "skipped", "seconds", "state"), _tests(records))
            yield from _failures(records)
        case "ceilings":
            yield from _table(("when", "copy, GB/s read and written", f"bf16 matmul of {MATMUL_ON_GPU}, TFLOP/s"), _ceilings(done))
        case "rows" | "tuned" | "model":
            dry = all(value.get("dry") for value in done.values())
            header = ("work", "time", "share", "of", "target", "met", "launches" if dry else "by other libraries")
            yield from _table(header, (_row(value, rates) for value in done.values()))
            yield from _whole_model(done.values())
        case "offload":
            yield from _offload(done.values())
        case "tuning":
            yield from _table(("problem", "tiles", "time", "default", "candidates", "failed"), _tiles(done))
    failed = {name: record for name, record in records.items() if record.status != DONE and stage != "tests"}
    if failed:
        yield from ("", "Failed:", "")
        yield from (f"- {name}: {_inline(record.value.get('error', ''))}" for name, record in failed.items())


def _table(header: Sequence[str], rows: Iterator[Sequence[object]]) -> Iterator[str]:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if lines:
        yield f"| {' | '.join(header)} |"
        yield "|" + "---|" * len(header)
        yield from lines


def _compiled(records: Mapping[str, Record]) -> Iterator[Sequence[object]]:
    for name, record in records.items():
        value = record.value
        if "compiled" in value:
            recorded = sum(value["kernels"].values())
            yield name, recorded, value["compiled"], len(value["failed"]), value["left"], f"{record.seconds:.0f}"


def _checked(value: Mapping[str, Any]) -> str:
    if "calls" in value:
        return f"{len(value['calls'])} calls recorded"
    return f"{value['errors']} errors" if value["available"] else "compute-sanitizer is not installed"


def _tests(records: Mapping[str, Record]) -> Iterator[Sequence[object]]:
    for name, record in records.items():
        value = record.value
        if "collected" in value:
            yield name, "", "", "", f"{record.seconds:.0f}", f"{value['collected']} collected"
        else:
            state = "passed" if record.status == DONE else _inline(value.get("error", ""))
            counts = value.get("passed", ""), len(value.get("failed", ())), value.get("skipped", "")
            yield name, *counts, f"{record.seconds:.0f}", state


def _failures(records: Mapping[str, Record]) -> Iterator[str]:
    for name, record in records.items():
        if record.status != DONE:
            yield ""
            yield f"{name}:"
            yield ""
            yield from (f"- `{test}`" for test in record.value.get("failed", ()))
            yield f"- ends with: `{_inline(record.value.get('tail', '')[-_TAIL:])}`"


def _ceilings(done: Mapping[str, Mapping[str, Any]]) -> Iterator[Sequence[object]]:
    for name, value in done.items():
        if "bandwidth" in value:
            yield name, f"{value['bandwidth'] / 1e9:.0f}", f"{value['matmul'] / 1e12:.0f}"


def _row(value: Mapping[str, Any], rates: Sequence[Mapping[str, float]]) -> Sequence[object]:
    work, ceiling = f"{value['kernel']}, {value['case']}", value["ceiling"]
    if value.get("dry"):
        return work, "not timed", "", ceiling, _target(value), "", len(value["launches"])
    times = value["times"]
    ours = times["dbrx_q"]["seconds"]
    share = _share(value, ours, rates)
    met = None if share is None or value["target"] is None else share >= value["target"]
    if met and value["rival"] is not None:
        met = ours < times[value["rival"]]["seconds"] if value["rival"] in times else None
    others = [
        f"{name} {_time(timed['seconds'])}{'' if timed['graph'] else ' (no graph)'}" for name, timed in times.items() if name != "dbrx_q"
    ]
    others += [f"{name}: {_inline(reason)}" for name, reason in value["failed"].items()]
    graph = "" if times["dbrx_q"]["graph"] or value["kernel"] == "decode step" else " (no graph)"
    shown = "" if share is None else f"{share:.1%}"
    return work, _time(ours) + graph, shown, ceiling, _target(value), {True: "yes", False: "no", None: ""}[met], "; ".join(others)


def _share(value: Mapping[str, Any], seconds: float, rates: Sequence[Mapping[str, float]]) -> float | None:
    """Of the mean ceiling of those measured before and after the rows."""
    name = {COPY: "bandwidth", MATMUL: "matmul"}[value["ceiling"]]
    measured = [rate[name] for rate in rates]
    return value["amount"] / seconds / (sum(measured) / len(measured)) if measured else None


def _target(value: Mapping[str, Any]) -> str:
    if value["target"] is None:
        return ""
    return f"{value['target']:.0%}" + (f", faster than {value['rival']}" if value["rival"] else "")


def _whole_model(values: Any) -> Iterator[str]:
    for value in values:
        if "host_loop_seconds" not in value:
            continue
        step, loop = value["times"]["dbrx_q"]["seconds"], value["host_loop_seconds"]
        text = (
            f"{value['layers']} of {value['of_layers']} layers with random weights, made in {value['build_seconds']:.0f} s; "
            f"{value['peak_bytes'] / 1e9:.1f} GB at most. On the GPU {1 / step:.0f} tokens/s; a loop on the host that reads each token "
            f"before the next step: {1 / loop:.0f} tokens/s."
        )
        if value["layers"] < value["of_layers"]:
            text += " Fewer layers than the model has: its speed is that of a part."
        yield ""
        yield from textwrap.wrap(text, _WIDTH, break_on_hyphens=False)


def _offload(values: Any) -> Iterator[str]:
    for value in values:
        text = (
            f"A GPU of {value['budget'] / (1 << 30):.0f} GiB holds {value['share']:.0%} of the experts of {value['of_layers']} layers. "
            f"Measured with that share of {value['layers']} layers of DBRX's dimensions and a vocabulary of 4096: all layers take "
            f"{value['of_layers'] / value['layers']:g} times as long."
        )
        yield from textwrap.wrap(text, _WIDTH, break_on_hyphens=False)
        if value["rows"]:
            yield ""
        names = ("miss_policy", "tokens_per_second", "hit_rate", "of_bound", "on_cpu", "cpu", "link")
        header = ("miss policy", "tokens/s", "hits", "of bound", "misses on the CPU", "CPU, GB/s", "link, GB/s")
        yield from _table(header, (_offload_row([row[name] for name in names]) for row in value["rows"]))


def _offload_row(cells: Sequence[Any]) -> Sequence[str]:
    policy, speed, hits, of_bound, on_cpu, cpu, link = cells
    return policy, f"{speed:.1f}", f"{hits:.0%}", f"{of_bound:.0%}", f"{on_cpu:.0%}", f"{cpu / 1e9:.1f}", f"{link / 1e9:.1f}"


def _tiles(done: Mapping[str, Mapping[str, Any]]) -> Iterator[Sequence[object]]:
    for name, value in done.items():
        choice = value["choice"]
        if choice is not None:
            tiles = " ".join(f"{part}={number}" for part, number in choice["tiles"].items())
            times = (_time(choice["seconds"]), _time(choice["default_seconds"])) if not value["dry"] else ("not timed", "")
            yield name, tiles, *times, choice["candidates"], len(value["failures"])


def _not_reached(last: Mapping[str, Record], items: Sequence[Item]) -> list[str]:
    missing = [item.key for item in items if item.key not in last]
    return ["", "## Not reached", "", *(f"- {key}" for key in missing)] if missing else []


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _inline(text: str) -> str:
    """Text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
