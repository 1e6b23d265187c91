"""`--calibration SOURCE[:weight]`: how sources are named, what calibrates, what is recorded, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dbrx_q.checkpoint.manifest import Manifest
from dbrx_q.cli.calibration import NamedSource, load_sequences, parse_sources
from dbrx_q.errors import RequestError
from dbrx_q.eval import data_sets
from dbrx_q.eval.data_sets import DEFAULT_MIX
from dbrx_q.quantize.calibration.sources import CalibrationWarning
from dbrx_q.quantize.pipeline.report import NAME as REPORT_NAME
from dbrx_q.tokenizer.tokenizer import DbrxTokenizer

DATA = Path(__file__).parents[2] / "data"
BOOK, WIKI = DATA / "war-of-the-worlds.txt", DATA / "wikitext2-test.txt"
Cli = Callable[..., Any]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a part of a book, code, chats and an empty file."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(BOOK.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    Path("code.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in Path(__file__).read_text().split("\n\n\n")))
    chat = [{"role": "user", "content": "Who came from Mars?"}, {"role": "assistant", "content": "The Martians came, in cylinders."}]
    Path("chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for _ in range(40)))
    Path("empty.txt").touch()
    return tmp_path


def names(*values: str) -> list[tuple[str, float]]:
    return [(source.name, source.weight) for source in parse_sources(values)]


def test_weights_follow_the_last_colon(texts: Path) -> None:
    assert names("book.txt", "code.jsonl:2", "chats.jsonl:1e-3", "wikitext2:.5", "wikitext2@v1:3.", "self:0") == [
        ("book.txt", 1),
        ("code.jsonl", 2),
        ("chats.jsonl", 1e-3),
        ("wikitext2", 0.5),
        ("wikitext2@v1", 3),
        ("self", 0),
    ]


@pytest.mark.parametrize("name", [r"C:\texts\wiki.txt", "C:/texts/wiki.txt", "disk:/wiki.txt"])
def test_other_colons_belong_to_the_name(name: str) -> None:
    assert names(name) == [(name, 1)]
    assert names(f"{name}:0.5") == [(name, 0.5)]


def test_an_existing_file_wins(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a:2", "default", "self"):
        Path(name).write_text("text")
        assert names(name) == [(name, 1)]
        assert names(f"{name}:3") == [(name, 3)]
    assert not parse_sources(["self"])[0].sampled
    assert capsys.readouterr().err == ""
    Path("a").write_text("text")
    assert names("a:2") == [("a:2", 1)]
    assert "names the file a:2; to give a a weight, rename one of the two files" in capsys.readouterr().err


def test_the_default_mix_is_one_source_of_its_weight() -> None:
    sources = parse_sources(["default:3", "book.txt"])
    assert [source.name for source in sources] == [*DEFAULT_MIX, "book.txt"]
    assert sum(source.weight for source in sources if source.by_default) == pytest.approx(3)
    assert sources[0].weight / sources[3].weight == pytest.approx(2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["book.txt:-1"], "the weight of a source must be a finite number, 0 or more; found -1"),
        (["book.txt:nan"], "must be a finite number, 0 or more; found nan"),
        (["book.txt:1e999"], "must be a finite number, 0 or more; found 1e999"),
        (["book.txt:1e300", "code.jsonl:1e308"], "a weight that is not 0 must be from 1e-06 to 1,000,000; found 1e300"),
        (["book.txt:1e-320", "code.jsonl"], "must be from 1e-06 to 1,000,000; found 1e-320"),
        (["book.txt:two"], "the weight after the colon must be a number; found 'two'. Give one, as book.txt:2"),
        (["book.txt:"], "must be a number; found ''"),
        (["wikitext2:x"], "must be a number; found 'x'"),
        ([":2"], "a source must stand before the weight; found none"),
        ([""], "found an empty name"),
        (["book.txt:0", "code.jsonl:0"], "at least one source of positive weight; found 2 of weight 0"),
        (["book.txt", "code.jsonl", "./book.txt:2"], "must name each source once; found ./book.txt twice"),
        (["default", "wikipedia-en"], "found wikipedia-en twice, once as a part of default"),
        (["empty.txt"], "empty.txt: a text must not be empty"),
        (["book.txt", "no-such.txt"], "no-such.txt: a text must be a file or the name of a data set (wikitext2, "),
        (["wikitext2@"], "wikitext2@: a text must be a file or the name of a data set"),
        (["book.txt", "copy.txt"], "found book.txt and copy.txt, which are the same text. Leave one out"),
        (["book.txt", "short.txt"], "short.txt: a calibration text must hold at least one sequence of 64 tokens; found 3"),
        (["book.txt", "text-less.jsonl"], "text-less.jsonl: line 2: must be an object whose field 'text' is a string"),
        (["book.txt", "broken.jsonl"], "broken.jsonl: line 1: messages[0] must be an object with the keys 'role' and 'content'"),
        (["self=nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_refused_sources(texts: Path, small: Path, cli: Cli, values: list[str], message: str) -> None:
    shutil.copyfile("book.txt", "copy.txt")
    Path("short.txt").write_text("The old man")
    Path("text-less.jsonl").write_text('{"text": "one"}\n{"body": "two"}')
    Path("broken.jsonl").write_text('{"messages": [{"content": "Hi"}]}')
    before = set(texts.iterdir())
    options = [word for value in values for word in ("--calibration", value)]
    outcome = cli("quantize", small, "out", "--method", "gptq", "--length", 64, *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert set(texts.iterdir()) == before


def without_template(small: Path, folder: Path) -> Path:
    shutil.copytree(small, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_chats_need_a_template(texts: Path, small: Path, cli: Cli) -> None:
    plain = without_template(small, texts / "plain")
    outcome = cli("quantize", plain, "out", "--method", "gptq", "--length", 64, "--calibration", "chats.jsonl", "--calibration", "book.txt")
    assert (outcome.code, outcome.out) == (2, "")
    assert "chats.jsonl: chats need the checkpoint's chat template; found none" in outcome.err


def test_the_default_mix_has_no_chats_where_there_is_no_template(
    texts: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = without_template(small, texts / "plain")
    mix = [NamedSource("book.txt", 1, True), NamedSource("chats.jsonl", 1, True)]
    sequences, _ = load_sequences(plain, mix, count=16, length=64, seed=0)
    assert sequences is not None
    assert sequences.names == ("book.txt",)
    assert "chats.jsonl is left out: the checkpoint has no chat template" in capsys.readouterr().err


def test_chats_are_encoded_by_the_template(texts: Path, small: Path) -> None:
    sequences, _ = load_sequences(small, [NamedSource("chats.jsonl", 1)], count=8, length=16, seed=0)
    assert sequences is not None
    tokenizer = DbrxTokenizer.from_pretrained(small)
    messages = json.loads(Path("chats.jsonl").read_text().split("\n")[0])["messages"]
    one = tokenizer.apply_chat_template(messages, return_dict=False)
    stream = one * 40
    assert any(tokenizer.convert_ids_to_tokens(token_id) == "<|im_start|>" for token_id in one)
    windows = [stream[first : first + 16] for first in range(0, len(stream) - 15, 16)]
    assert all(row in windows for row in sequences.ids.tolist())


def test_chats_of_which_the_template_writes_nothing_are_refused(texts: Path, small: Path) -> None:
    silent = shutil.copytree(small, texts / "silent")
    config = json.loads((silent / "tokenizer_config.json").read_text())
    (silent / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": ""}))
    with pytest.raises(RequestError, match=r"chats.jsonl: a calibration text must hold at least one sequence of 16 tokens; found 0"):
        load_sequences(silent, [NamedSource("chats.jsonl", 1)], count=8, length=16, seed=0)


def test_a_text_of_bytes_is_noticed(texts: Path, small: Path) -> None:
    Path("russian.txt").write_text("Все люди рождаются свободными и равными в своем достоинстве и правах. " * 40, encoding="utf-8")
    named = [NamedSource("book.txt", 1), NamedSource("russian.txt", 1)]
    with pytest.warns(CalibrationWarning, match=r"russian.txt: 9\d% of its tokens are single bytes of characters"):
        load_sequences(small, named, count=16, length=64, seed=0)


def test_data_sets_have_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = data_sets.data_set("wikipedia-en@main")
    assert pinned is not None
    assert pinned == replace(data_sets.DATA_SETS["wikipedia-en"], revision="main")
    assert all(re.fullmatch("[0-9a-f]{40}", data_sets.DATA_SETS[name].revision or "") for name in DEFAULT_MIX)
    assert data_sets.data_set("wikipedia") is None


def test_several_sources_are_named_in_all_records(texts: Path, small: Path, cli: Cli) -> None:
    Path("held.txt").write_text(WIKI.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    command = ["quantize", small, "out", "--method", "gptq", "--sequences", 24, "--length", 32]
    for value in ("book.txt:2", "code.jsonl", "chats.jsonl", "held.txt:0"):
        command += ["--calibration", value]
    planned = json.loads(cli(*command, "--dry-run", "--json").out)["calibration"]
    assert planned[0] == {"name": "book.txt", "weight": 0.5, "sequences": 12, "held_out": 2}
    assert [source["sequences"] for source in planned] == [12, 6, 6, 0]
    assert "calibration          6  sequences of code.jsonl, and 2 held out" in cli(*command, "--dry-run").out
    outcome = cli(*command, "--json")
    assert outcome.code == 0, outcome.err
    described = json.loads((texts / "out" / "config.json").read_text())["quantization_config"]["calibration"]
    assert {key: described[key] for key in ("sequences", "length", "seed")} == {"sequences": 24, "length": 32, "seed": 0}
    sources = described["sources"]
    assert [(source["name"], source["weight"], source["sequences"], source["held_out"]) for source in sources] == [
        ("book.txt", 0.5, 12, 2),
        ("code.jsonl", 0.25, 6, 2),
        ("chats.jsonl", 0.25, 6, 2),
        ("held.txt", 0, 0, 2),
    ]
    assert len({source["sha256"] for source in sources}) == 4
    manifest = Manifest.read(texts / "out")
    assert manifest is not None
    assert manifest.calibration == sources
    assert json.loads(outcome.out)["calibration"]["sources"] == sources
    assert cli("verify", "out").code == 0

    report = json.loads((texts / "out" / f"{REPORT_NAME}.json").read_text())
    (counts,) = report["expert_tokens_by_source"].values()
    (total,) = report["expert_tokens"].values()
    assert [sum(row) for row in counts] == [12 * 32 * 2, 6 * 32 * 2, 6 * 32 * 2, 0]  # two experts a token
    assert [sum(column) for column in zip(*counts, strict=True)] == total
    unreached = {
        name: [[0, expert] for expert, count in enumerate(row) if not count]
        for name, row in zip(report["source_names"], counts, strict=True)
    }
    assert json.loads(outcome.out)["unreached_experts"] == {name: unreached[name] for name in ("book.txt", "code.jsonl", "chats.jsonl")}
    assert report["source_names"] == ["book.txt", "code.jsonl", "chats.jsonl", "held.txt"]
    pages = [(texts / "out" / name).read_text() for name in (f"{REPORT_NAME}.md", "README.md")]
    for page in pages:
        assert f"| book.txt | 0.5 | 12 | 2 | {sources[0]['sha256']} |" in page
        assert "4 source(s), sequences 24, length 32, seed 0." in page
    assert re.search(r"\| code.jsonl \| \d+ \| \d+ \| \d+ \| \d of 4", pages[0])
    assert "| layer | book.txt | code.jsonl | chats.jsonl |" in pages[0]

    outcome = cli(*command, "--resume")
    assert "out is complete already" in outcome.err
    command[command.index("book.txt:2")] = "book.txt:3"
    assert "must be empty" in cli(*command, "--resume").err


def test_an_interrupted_run_resumes_with_the_same_sources_only(texts: Path, small: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(out: str, *values: str) -> list[object]:
        options = [word for value in values for word in ("--calibration", value)]
        return ["quantize", small, out, "--method", "gptq", "--sequences", 16, "--length", 32, *options]

    with monkeypatch.context() as patch:
        patch.setattr("dbrx_q.quantize.pipeline.run.finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert cli(*command("out", "book.txt", "code.jsonl")).code == 2
    for values in (["book.txt:3", "code.jsonl"], ["code.jsonl", "book.txt"], ["book.txt", "code.jsonl", "chats.jsonl:0"]):
        outcome = cli(*command("out", *values), "--resume")
        assert (outcome.code, outcome.out) == (2, "")
        assert "--resume continues with the options that the run began with; sources was [{'name': 'book.txt'" in outcome.err
    assert cli(*command("out", "book.txt", "code.jsonl"), "--resume").code == 0
    assert cli(*command("whole", "book.txt", "code.jsonl")).code == 0
    for path in (texts / "whole").iterdir():
        if not path.name.startswith((REPORT_NAME, "README")):
            assert path.read_bytes() == (texts / "out" / path.name).read_bytes(), path.name
    reports = [json.loads((texts / out / f"{REPORT_NAME}.json").read_text()) for out in ("out", "whole")]
    assert reports[0]["expert_tokens_by_source"] == reports[1]["expert_tokens_by_source"] != {}


def test_the_closing_lines_name_the_sources(texts: Path, small: Path, cli: Cli) -> None:
    outcome = cli("quantize", small, "out", "--method", "gptq", "--sequences", 16, "--length", 32, *("--calibration", "book.txt"),
                  *("--calibration", "code.jsonl"))  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "calibrated with 16 sequences of 32 tokens" in outcome.out
    assert re.search(r"  book.txt   +8 sequences, +2 held out; \d of 4 experts get none of its tokens\n  code.jsonl +8 seq", outcome.out)
