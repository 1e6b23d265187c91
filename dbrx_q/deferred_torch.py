"""`defer`: `import torch` then leaves out what inference does not use, until something uses it.

A plain `import torch` spends half of its time on torch.export, operators written in Python for meta tensors, quantization for training,
data loaders and the like. With `defer`, these modules are entered in `sys.modules` without being executed. The first use of one of them, or
the import of any module of torch that is not loaded yet (as by torch.compile, FakeTensor or transformers), executes all of them, in the
order of the plain import. Until then torch differs in one point: operators on meta tensors that torch implements in Python raise
NotImplementedError.

If torch itself uses one of these modules while it is imported, they are executed at once and nothing more is deferred.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from opcode import opmap
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

__all__ = ["DEFERRED", "SWITCH", "defer", "is_wanted", "preload"]

SWITCH = "DBRX_Q_DEFER_TORCH"
"""The environment variable that says whether to defer: 0 or 1."""

DEFERRED = frozenset(
    (
        # Graphs: their compilation and export.
        "torch._higher_order_ops",
        "torch._subclasses",
        "torch.compiler",
        "torch.export",
        "torch.func",
        "torch.nested",
        "torchgen",
        "torchgen.model",
        # Operators in Python, for graphs and meta tensors.
        "torch._decomp",
        "torch._meta_registrations",
        "torch._prims",
        "torch._refs",
        "torch.distributed._meta_registrations",
        # Kernels in Python for GPUs.
        "torch._native",
        # Training, and quantization by torch.
        "torch._lobpcg",
        "torch.ao",
        "torch.distributions",
        "torch.masked",
        "torch.nn.intrinsic",
        "torch.nn.parallel",
        "torch.nn.qat",
        "torch.nn.quantizable",
        "torch.nn.quantized",
        "torch.quantization",
        "torch.utils.data",
        # Docstrings, and what only tests use.
        "torch._size_docs",
        "torch._storage_docs",
        "torch._tensor_docs",
        "unittest.mock",
        # What numba imports for a file of settings that few have.
        "yaml",
    )
)
"""The modules that are executed when they are used. Kernels for GPUs are among them: defer nothing in a process that uses one."""

_EXPORTED = {
    ("torch", "torch._higher_order_ops"): ("cond", "while_loop"),
    ("torch", "torch._lobpcg"): ("lobpcg",),
    ("torch", "torch.func"): ("vmap",),
    ("torch.nn", "torch.nn.parallel"): ("DataParallel",),
}
"""(package, deferred module): names that the package exports as its own."""

# Extension modules that every command loads. The system loads one library at a time, so they come before torch's: Python can then import
# modules beside it.
_EXTENSIONS: tuple[str, ...] = ("math", "zlib", "_bz2", "_lzma", "fcntl", "_posixsubprocess", "select", "_datetime", "_uuid", "_heapq")
_EXTENSIONS = (*_EXTENSIONS, "_json", "_socket", "_pickle", "_bisect", "_random", "_sha512", "array")
_METACLASSES = (("torch._opaque_base", "OpaqueBaseMeta"), ("torch._custom_class_base", "CustomClassBaseMeta"))
_IMPORT_CODES = {opmap["IMPORT_NAME"], opmap["IMPORT_FROM"]}
_OLDEST = (2, 13)  # the oldest version of torch that the lists above were tried with


def is_wanted(*, default: bool) -> bool:
    """Whether to defer, as the environment variable `SWITCH` says."""
    return {"0": False, "1": True}.get(os.environ.get(SWITCH, ""), default)


def defer(restart: Callable[[], None] | None = None, imported: Callable[[], None] | None = None) -> None:
    """Defer parts of the coming `import torch`; does nothing if torch is imported already.

    Args:
        restart: called if torch cannot be imported in this way, to import it plainly in a new process. None raises torch's error.
        imported: called when torch is imported.
    """
    if "torch" not in sys.modules and not any(isinstance(finder, _Deferral) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Deferral(restart, imported))


def preload() -> threading.Thread | None:
    """Load torch's largest library in a thread: a third of `import torch`, beside which Python imports other modules.

    Returns:
        The thread, which Python waits for at its end; None where there is no such library, or no thread can be started.
    """
    spec = None if "torch" in sys.modules or sys.platform != "linux" else PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).with_name("lib")
    libraries = (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_cpu.so", 0))  # as `import torch` loads them
    if not all((folder / name).is_file() for name, _ in libraries):
        return None
    for name in _EXTENSIONS:
        with suppress(ImportError):
            import_module(name)
    # A function that ctypes calls runs without the interpreter lock, which Python 3.11's CDLL(path) holds.
    open_library = ctypes.CDLL(None).dlopen
    open_library.restype, open_library.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]

    def load() -> None:
        for name, flags in libraries:  # where one needs others that torch prepares, it is not loaded here
            open_library(os.fsencode(folder / name), os.RTLD_NOW | flags)

    thread = threading.Thread(target=load)
    with suppress(RuntimeError):  # at a limit of threads
        thread.start()
        return thread
    return None


class _Deferral:
    """The finder on `sys.meta_path` that enters deferred modules; it leaves when they are executed."""

    def __init__(self, restart: Callable[[], None] | None, imported: Callable[[], None] | None) -> None:
        self._restart, self._imported = restart, imported
        self._pending: dict[str, ModuleType] = {}  # in the order in which the plain import executes them
        self._exports: list[_Export] = []
        self._lock = threading.RLock()
        self._importing = self._completing = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder.find_spec`; called for every module that is not loaded yet."""
        if name == "torch" or (name in DEFERRED and (self._importing or not name.startswith("torch"))):
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None and (name != "torch" or _is_known(spec)):
                loader: Any = _Loader(spec.loader, self._import_torch if name == "torch" else self._enter)
                spec.loader = loader
            return spec
        parent = name.rpartition(".")[0]
        if parent in self._pending:
            self.need(parent)
        elif self._finishes(name) and self._lock.acquire(blocking=False):
            # Where another thread executes the deferred modules, this one does not wait: it may hold the lock of an import.
            try:
                if not self._completing:
                    self._complete()
            finally:
                self._lock.release()
        return _spec_of_loaded(name) if name in sys.modules else None

    def _finishes(self, name: str) -> bool:
        """Whether the import of a module that is not loaded executes the deferred ones first."""
        return not self._importing and bool(self._pending) and name.startswith("torch.")

    def attribute(self, module: ModuleType, name: str, importer: str | None) -> Any:
        """An attribute of a deferred module, which is executed first.

        Args:
            importer: the module whose import statement asks for the attribute; None for other code.
        """
        own: str = vars(module)["__name__"]
        if self._importing and importer is not None and name in _EXPORTED.get((importer, own), ()):
            export = _Export(importer, own, name)
            self._exports.append(export)
            return export
        self.need(own)
        return ModuleType.__getattribute__(module, name)

    def need(self, name: str) -> None:
        """Execute a deferred module: with all others, or alone if it is not torch's or another one that is being executed needs it."""
        with self._lock:
            if self._completing or not name.startswith("torch"):
                self._execute(name)
            elif name in self._pending:
                self._complete()

    def _import_torch(self, torch: ModuleType, execute: Callable[[ModuleType], None]) -> None:
        self._importing = True
        try:
            execute(torch)
        except Exception:
            if self._restart is not None:
                self._restart()
            raise
        finally:
            self._importing = False
        if self._imported is not None:
            self._imported()
        for package in {export.package for export in self._exports}:
            names = {export.name: export.module for export in self._exports if export.package == package}
            _export_when_used(sys.modules[package], names, self.need)
        if not self._pending or not _has_generators(torch):
            self._complete()

    def _enter(self, module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
        namespace = vars(module)
        namespace["__deferral__"], namespace["__execute__"] = self, execute
        module.__class__ = _DeferredModule
        self._pending[namespace["__name__"]] = module

    def _complete(self) -> None:
        """Execute all deferred modules. What torch still imports, if it is being imported, is not deferred."""
        self._importing, self._completing = False, True
        try:
            for name in list(self._pending):
                self._execute(name)
        finally:
            self._completing = False
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def _execute(self, name: str) -> None:
        parent = name.rpartition(".")[0]
        if parent in self._pending:
            self._execute(parent)
        module = self._pending.pop(name, None)
        if module is None:
            return
        try:
            vars(module)["__execute__"](module)  # this thread has its attributes meanwhile; others wait for the lock
        except BaseException:
            self._pending[name] = module
            raise
        del vars(module)["__deferral__"], vars(module)["__execute__"]
        if type(module) is _DeferredModule:  # a module may give itself another class
            ModuleType.__setattr__(module, "__class__", ModuleType)


class _DeferredModule(ModuleType):
    """A module that is executed when it is used: when anything but its import attributes and its submodules is asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name in {"__class__", "__dict__", "__path__"}:
            return ModuleType.__getattribute__(self, name)
        namespace = vars(self)
        if name in namespace and (name.startswith("__") or isinstance(namespace[name], ModuleType)):
            return namespace[name]
        return namespace["__deferral__"].attribute(self, name, _importer(sys._getframe(1)))

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name.startswith("__") or isinstance(value, ModuleType)):
            vars(self)["__deferral__"].need(vars(self)["__name__"])
        ModuleType.__setattr__(self, name, value)

    def __dir__(self) -> list[str]:
        vars(self)["__deferral__"].need(vars(self)["__name__"])
        return sorted(vars(self))


def _importer(frame: FrameType) -> str | None:
    """The module whose import statement is running in a frame; None for any other code."""
    while frame.f_back is not None and frame.f_globals.get("__name__") == "importlib._bootstrap":
        frame = frame.f_back
    return frame.f_globals.get("__name__") if frame.f_code.co_code[frame.f_lasti] in _IMPORT_CODES else None


class _Export:
    """Stands in the namespace of a package, while it is imported, for a name of a deferred module."""

    def __init__(self, package: str, module: str, name: str) -> None:
        self.package, self.module, self.name = package, module, name


class _Loader:
    """Hands a new module and its loader's `exec_module` to a function."""

    def __init__(self, loader: Any, then: Callable[[ModuleType, Callable[[ModuleType], None]], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As `importlib.abc.Loader.create_module`."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """As `importlib.abc.Loader.exec_module`."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._then(module, self._loader.exec_module)


class _Loaded:
    """Gives the import system a module that was loaded while it looked for one."""

    def __init__(self, spec: ModuleSpec | None) -> None:
        self._spec = spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """As `importlib.abc.Loader.create_module`."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """As `importlib.abc.Loader.exec_module`: undoes what the import system did to the module."""
        module.__spec__ = self._spec


def _spec_of_loaded(name: str) -> ModuleSpec:
    return ModuleSpec(name, _Loaded(sys.modules[name].__spec__))  # type: ignore[arg-type]


def _export_when_used(package: ModuleType, names: dict[str, str], need: Callable[[str], None]) -> None:
    """Replace the placeholders of `names` (name to deferred module) by a `__getattr__` that executes the module first."""
    own = vars(package).get("__getattr__")
    for name in names:
        delattr(package, name)

    def get(name: str) -> Any:
        if name in names:
            need(names[name])
            value = getattr(sys.modules[names[name]], name)
            setattr(package, name, value)
            return value
        if own is None:
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        return own(name)

    vars(package)["__getattr__"] = get


def _has_generators(torch: Any) -> bool:
    """Whether generators of random numbers work; torch._prims, which is deferred, gives their class its metaclass."""
    for module, name in _METACLASSES:
        if metaclass := getattr(sys.modules.get(module), name, None):
            torch._C._set_generator_metaclass(metaclass)
    with suppress(RuntimeError):
        torch.Generator()
        return True
    return False


def _is_known(spec: ModuleSpec) -> bool:
    """Whether the version of torch is one that the lists of this file were tried with, or a newer one."""
    with suppress(OSError, TypeError):
        text = Path(spec.origin or "").with_name("version.py").read_text(encoding="utf-8")
        if version := re.search(r"__version__ = '(\d+)\.(\d+)", text):
            return (int(version[1]), int(version[2])) >= _OLDEST
    return False
