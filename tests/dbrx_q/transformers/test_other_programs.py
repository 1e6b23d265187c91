"""Programs that do not import `dbrx_q.transformers`: they never get random weights, and two ways make them load a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dbrx_q import DbrxForCausalLM
from dbrx_q.checkpoint.transformers_files import GUARD

_LOADS = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DbrxForCausalLM, DbrxModel, pipeline

folder = sys.argv[1]
config, _ = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
for load in (
    AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained, DbrxForCausalLM.from_pretrained, DbrxModel.from_pretrained,
    lambda folder: DbrxForCausalLM.from_pretrained(folder, config=config), lambda folder: pipeline("text-generation", folder),
    lambda folder: AutoModelForCausalLM.from_pretrained(folder, device_map="auto"),
):
    try:
        load(folder)
    except ValueError as error:
        print("refused" if sys.argv[2] in str(error) else f"another error: {error}")
    else:
        print("loaded")
assert "dbrx_q" not in sys.modules
"""

_TRUSTED = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM

folder, ids = sys.argv[1], __import__("torch").tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32")
assert model.transformer(ids).last_hidden_state.equal(base(ids).last_hidden_state)
print(json.dumps(model(ids).logits[0, -1].tolist()))
"""


def _run(*arguments: object, cache: Path) -> str:
    environment = os.environ | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def test_transformers_alone_stops_and_says_what_to_import(quantized_nano: Path, tmp_path: Path) -> None:
    assert _run("-c", _LOADS, quantized_nano, GUARD, cache=tmp_path).splitlines() == ["refused"] * 7


def test_trusted_code_of_the_checkpoint_loads_it(quantized_nano: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    printed = _run("-c", _TRUSTED, quantized_nano, json.dumps(ids.tolist()), cache=tmp_path)
    expected = DbrxForCausalLM.from_pretrained(quantized_nano, dtype=torch.float32)(ids).logits[0, -1]
    assert (torch.tensor(json.loads(printed)) - expected).abs().max() < 1e-4 * expected.abs().max()


_FROM_HUB = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

name, said, ids = "someone/dbrx-int4", sys.argv[1], __import__("torch").arange(1, 9)[None]
AutoTokenizer.from_pretrained(name)
try:
    AutoModelForCausalLM.from_pretrained(name)
except ValueError as error:
    print("refused" if said in str(error) else error)
import dbrx_q.transformers

model, ours = AutoModelForCausalLM.from_pretrained(name, dtype="float32"), dbrx_q.DbrxForCausalLM.from_pretrained(name, dtype="float32")
print(type(model).__module__, bool((model(ids).logits - ours(ids).logits).abs().max() < 1e-4 * ours(ids).logits.abs().max()))
"""


def test_a_hub_id_is_loaded_with_the_import_alone(quantized_nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a cache as a download leaves it, without a network."""
    repository, commit = tmp_path / "hub" / "models--someone--dbrx-int4", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(quantized_nano, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    lines = _run("-c", _FROM_HUB, GUARD, cache=tmp_path / "modules").splitlines()
    assert lines == ["refused", "dbrx_q.transformers.modeling True"]


def test_the_runner_runs_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dbrx_q.transformers.__main__ import main

    script = tmp_path / "script.py"
    script.write_text("import sys, beside; print(sys.argv[1:], __name__, beside.NAME)")
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert main([str(script), "a", "--b"]) == 0
    assert capsys.readouterr().out == "['a', '--b'] __main__ beside\n"


def test_the_runner_runs_commands_and_refuses_unknown_ones(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dbrx_q.transformers.__main__ import main

    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as stopped:
        main(["transformers", "--help"])
    assert stopped.value.code == 0
    assert "serve" in capsys.readouterr().out
    for absent in ("no-such-program", "absent.py"):
        assert main([absent]) == 2
        assert f"found {absent!r}" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "lm_eval" in capsys.readouterr().out


def test_an_old_or_missing_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dbrx_q.transformers import availability

    for installed in ("5.14.1", "4.57.0"):
        monkeypatch.setattr(availability, "version", lambda name, installed=installed: installed)
        with pytest.raises(ImportError, match=rf"needs transformers >= 5\.15, .* found {installed}\. Install it with: pip install"):
            availability.check_transformers()


def test_checkpoints_from_before_load_as_well(quantized_nano: Path, tmp_path: Path) -> None:
    """They have neither the guard nor the file."""
    from transformers import AutoModelForCausalLM

    import dbrx_q.transformers  # noqa: F401

    folder = tmp_path / "old"
    shutil.copytree(quantized_nano, folder)
    (folder / "modeling_dbrx_q.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_weights"], config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__module__ == "dbrx_q.transformers.modeling"
