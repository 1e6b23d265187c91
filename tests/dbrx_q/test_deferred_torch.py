"""`import torch` without what inference does not use: by the commands, by programs that ask for it, and with layouts of torch that are new.

Each check runs in a process of its own, since torch can be imported once. Small packages named `torch` stand for layouts that the installed
torch does not have.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dbrx_q.deferred_torch import DEFERRED, SWITCH

COMMAND = """
import sys
from dbrx_q.cli import main
sys.argv = ["dbrx-q", "generate", {model!r}, "--prompt", "The old man", "--max-new-tokens", "4"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
"""
LIST = "print('modules', *sorted(name for name in sys.modules if name.partition('.')[0] in ('torch', 'torchgen')))\n"


def run(script: str, *, switch: str | None = None, path: Path | None = None) -> list[str]:
    """The lines that a script prints in a process of its own, with the switch and with a folder of packages."""
    env = {name: value for name, value in os.environ.items() if name != SWITCH} | ({} if switch is None else {SWITCH: switch})
    if path is not None:
        env["PYTHONPATH"] = str(path)
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.fixture(scope="module")
def plain(nano: Path) -> list[str]:
    """What a generation prints without the deferral, and the modules of torch that it loads."""
    return run(COMMAND.format(model=str(nano)) + LIST, switch="0")


def test_a_generation_loads_no_deferred_module_and_all_of_them_work_afterwards(nano: Path, plain: list[str]) -> None:
    used = """
    loaded = {name for name in sys.modules if name.startswith(("torch", "unittest.mock"))}
    from dbrx_q.deferred_torch import DEFERRED
    executed = [name for name in DEFERRED & loaded if type(sys.modules[name]).__name__ != "_DeferredModule"]
    assert not executed, executed
    children = [name for name in loaded if name not in DEFERRED and name.rpartition(".")[0] in DEFERRED]
    assert not children, children
    assert len(DEFERRED & loaded) > 20
    import torch
    assert torch.export.__name__ == "torch.export"  # attributes of the import do not execute a module
    assert torch.vmap(lambda x: x + 1)(torch.ones(2)).tolist() == [2, 2]  # the first use of one executes all
    assert not [name for name in DEFERRED if type(sys.modules[name]).__name__ == "_DeferredModule"]
    assert torch.cummin(torch.ones(2, 3, device="meta"), 0).values.shape == (2, 3)  # an operator of torch._meta_registrations
    assert torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2)).tolist() == [2, 2]
    assert torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),)).module()(torch.ones(1, 3)).shape == (1, 2)
    assert list(torch.utils.data.DataLoader([1, 2])) == [1, 2]
    assert torch.nn.DataParallel.__name__ == "DataParallel" and torch.distributed.is_available() in (True, False)
    """
    lines = run(COMMAND.format(model=str(nano)) + textwrap.dedent(used) + LIST)
    assert lines[:-1] == plain[:-1]
    assert set(plain[-1].split()) <= set(lines[-1].split())


def test_an_import_from_torch_completes_it(plain: list[str]) -> None:
    check = "import dbrx_q.deferred_torch as own\nown.defer()\nimport sys, torch\nimport {module}\n" + LIST
    modules = "torch.utils.data.sampler", "torch._dynamo.config"
    for module in modules:
        [line] = run(check.format(module=module))
        assert set(plain[-1].split()) - set(line.split()) == set()


def test_programs_defer_where_the_switch_says_so(nano: Path, plain: list[str]) -> None:
    program = """
    import sys
    from dbrx_q import DbrxForCausalLM, DbrxTokenizer, generate_text
    model = DbrxForCausalLM.from_pretrained({model!r})
    print(generate_text(model, DbrxTokenizer.from_pretrained({model!r}), ["The old man"], max_new_tokens=4)[0])
    print([name for name in sys.modules if type(sys.modules[name]).__name__ == "_DeferredModule"] != [])
    """
    script = textwrap.dedent(program).format(model=str(nano))
    text = "\n".join(plain[:-1])
    for switch, deferred in ((None, "False"), ("1", "True")):
        *lines, last = run(script, switch=switch)
        assert text.endswith("\n".join(lines))
        assert last == deferred


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A folder with a package `torch` of the shape that the deferral expects, and a log of which modules are executed."""
    return write_torch(tmp_path, "from torch import export, func\nfrom torch.func import vmap\n")


def write_torch(folder: Path, code: str, *, version: str = "2.99.0", func: str = "def vmap(): return 'vmap'\n") -> Path:
    package = folder / "torch"
    package.mkdir()
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    (package / "__init__.py").write_text(f"order = []\nclass Generator: pass\n{code}order.append('torch')\n")
    (package / "export.py").write_text("import torch\ntorch.order.append('export')\n")
    (package / "func.py").write_text(f"import torch\ntorch.order.append('func')\n{func}")
    return folder


def test_the_order_of_the_plain_import_is_kept(layout: Path) -> None:
    script = "from dbrx_q.deferred_torch import defer\ndefer()\nimport torch\nprint(torch.order)\nprint(torch.vmap())\nprint(torch.order)\n"
    assert run(script, path=layout) == ["['torch']", "vmap", "['torch', 'export', 'func']"]


@pytest.mark.parametrize(
    "code", ["from torch import export\nfrom torch.func import vmap, grad\n", "from torch import export, func\nfunc.vmap()\n"]
)
def test_a_torch_that_uses_deferred_modules_itself_is_imported_plainly(tmp_path: Path, code: str) -> None:
    folder = write_torch(tmp_path, code, func="def vmap(): return 'vmap'\ngrad = vmap\n")
    script = "import sys\nfrom dbrx_q.deferred_torch import defer\ndefer()\nimport torch\nprint(torch.order, len(sys.meta_path))\n"
    plainly = "import sys\nimport dbrx_q\nimport torch\nprint(torch.order, len(sys.meta_path))\n"
    assert run(script, path=folder) == run(plainly, path=folder)


@pytest.mark.parametrize("version", ["2.6.0", "2.12.1+cpu", "unknown"])
def test_a_torch_older_than_the_tried_ones_is_imported_plainly(tmp_path: Path, version: str) -> None:
    folder = write_torch(tmp_path, "from torch import export, func\n", version=version)
    script = "from dbrx_q.deferred_torch import defer\ndefer()\nimport torch\nprint(torch.order)\n"
    assert run(script, path=folder) == ["['export', 'func', 'torch']"]


def test_a_module_that_cannot_be_executed_raises_its_own_error_at_every_use(tmp_path: Path) -> None:
    folder = write_torch(tmp_path, "from torch import export, func\n", func="import a_package_that_is_missing\n")
    script = """
    from dbrx_q.deferred_torch import defer
    defer()
    import torch
    for _ in range(2):
        try:
            torch.func.vmap
        except ImportError as error:
            print(error)
    """
    assert run(script, path=folder) == ["No module named 'a_package_that_is_missing'"] * 2


def test_a_command_restarts_plainly_where_the_deferral_breaks_torch(tmp_path: Path) -> None:
    """This torch can be imported only if a deferred module was executed, which nothing shows while it is imported."""
    folder = write_torch(tmp_path, "from torch import export\nif not order: raise RuntimeError('no export')\n")
    script = """
    import os, sys
    from dbrx_q.cli import entry
    entry.run = lambda arguments: __import__("torch").order == ["export", "torch"] and print("plain", os.environ["DBRX_Q_DEFER_TORCH"])
    entry.main()
    """
    assert run(script, path=folder) == ["plain 0"]


def test_threads_wait_for_each_other(layout: Path) -> None:
    (layout / "torch" / "export.py").write_text("import time, torch\ntime.sleep(0.2)\ntorch.order.append('export')\n")
    script = """
    import threading
    from dbrx_q.deferred_torch import defer
    defer()
    import torch
    results = []
    threads = [threading.Thread(target=lambda: results.append(torch.func.vmap())) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(results, torch.order)
    """
    assert run(script, path=layout) == ["['vmap', 'vmap', 'vmap', 'vmap'] ['torch', 'export', 'func']"]


def test_the_listed_modules_are_those_of_the_installed_torch(plain: list[str]) -> None:
    assert [name for name in DEFERRED if name.startswith("torch") and name not in plain[-1].split()] == []
