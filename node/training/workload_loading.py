"""Finds the user's class: "FILE.py:Name", "module:Name" or "text", and tells the user's mistakes from ours.

Everything that can go wrong here is the user's, so all of it is `UserError`. When the user's own code raises, the message
is that code's traceback from its first line on: frames of p2pcoord above it say nothing to whoever wrote it.

`parse_spec` reads nothing but the disk and is quick; `load_workload` runs the user's module and belongs in the trainer.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType, TracebackType

import msgspec

from p2pcoord.errors import UserError
from p2pcoord.workload import Workload

BUILT_IN = {"text": "node.training.text_workload:Text"}

REQUIRED_METHODS = ("model", "data", "loss")

_OURS = tuple(f"{Path(__file__).resolve().parents[2] / package}/" for package in ("node", "p2pcoord"))


class WorkloadSpec(msgspec.Struct, frozen=True):
    """A --workload that was understood: `file` (absolute) or `module`, and the class's name."""

    text: str
    file: str | None
    module: str | None
    name: str

    @property
    def portable(self) -> str:
        """What the run says: the file without its folder, which is another on every machine."""
        return f"{Path(self.file).name}:{self.name}" if self.file else self.text


def parse_spec(text: str) -> WorkloadSpec:
    """Understands --workload. Raises UserError (exit code 2) for a form that is none and for a file that is not there."""
    place, _, name = BUILT_IN.get(text, text).rpartition(":")
    if not place:
        if text.endswith(".py") and Path(text).is_file():
            known = ", ".join(f"{text}:{name}" for name in _classes_in(Path(text))) or "it has no class"
            raise UserError(f"--workload {text}: say which class of the file: {known}", exit_code=2)
        if text.endswith(".py"):
            raise UserError(f"--workload {text}: there is no file {text}", exit_code=2)
        raise UserError(
            f"--workload {text}: expected FILE.py:Name, module:Name or the built-in {', '.join(BUILT_IN)}",
            exit_code=2,
        )
    if not name.isidentifier():
        raise UserError(f"--workload {text}: {name!r} cannot be a class's name", exit_code=2)
    if place.endswith(".py") or "/" in place:
        file = Path(place)
        if not file.is_file():
            raise UserError(f"--workload {text}: there is no file {place}", exit_code=2)
        return WorkloadSpec(text, str(file.resolve()), None, name)
    if not all(part.isidentifier() for part in place.split(".")):
        raise UserError(f"--workload {text}: {place!r} is neither a FILE.py nor a module's name", exit_code=2)
    return WorkloadSpec(text, None, place, name)


def load_workload(spec: WorkloadSpec) -> type[Workload]:
    """The class, after running its module. Raises UserError: exit code 2 when there is no such class, 1 when its code fails."""
    module = _run_file(Path(spec.file)) if spec.file else _import(spec)
    found = getattr(module, spec.name, None)
    if found is None:
        names = [name for name, value in vars(module).items() if _is_workload(value)]
        close = difflib.get_close_matches(spec.name, names, n=1) or names[:5]
        hint = (
            f"; did you mean {' or '.join(close)}?" if close else "; it has no subclass of p2pcoord.Workload"
        )
        raise UserError(f"--workload {spec.text}: there is no class {spec.name} in it{hint}", exit_code=2)
    if not _is_workload(found):
        raise UserError(
            f"--workload {spec.text}: {spec.name} is no subclass of p2pcoord.Workload", exit_code=2
        )
    workload: type[Workload] = found
    missing = [name for name in REQUIRED_METHODS if getattr(workload, name) is getattr(Workload, name)]
    if missing:
        raise UserError(
            f"--workload {spec.text}: {spec.name} does not define {', '.join(f'{m}()' for m in missing)}",
            exit_code=2,
        )
    return workload


def source_hash(workload: type[Workload]) -> bytes:
    """SHA-256 of the file that the class was read from, with Unix line ends; of nothing where there is no file."""
    try:
        source = Path(inspect.getfile(workload)).read_bytes()
    except (OSError, TypeError):
        source = b""
    return sha256(source.replace(b"\r\n", b"\n")).digest()


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Around every call into the user's code: what it raises becomes a UserError with the user's traceback.

    `what` names the call, for example "loss()". A UserError passes as it is; SystemExit is the user's too.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} of the workload failed:\n{user_traceback(error)}") from None


def user_traceback(error: BaseException) -> str:
    """The error as Python prints it, from the user's first frame on."""
    shown = error.__traceback__
    while shown is not None and _is_ours(shown):
        shown = shown.tb_next
    return "".join(traceback.format_exception(type(error), error, shown)).rstrip()


def _is_ours(frame: TracebackType) -> bool:
    name = frame.tb_frame.f_code.co_filename
    return name.startswith((*_OURS, "<frozen ")) or name == importlib.__file__


def _run_file(file: Path) -> ModuleType:
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as if Python ran the file: it may import its neighbours
    name = f"workload_file_{file.stem}"  # a file may be called torch.py
    loading = importlib.util.spec_from_file_location(name, file)
    if loading is None or loading.loader is None:
        raise UserError(f"{file} cannot be imported: is it Python?")
    module = importlib.util.module_from_spec(loading)
    sys.modules[name] = module
    with user_code(f"importing {file.name}"):
        loading.loader.exec_module(module)
    return module


def _import(spec: WorkloadSpec) -> ModuleType:
    wanted = spec.module or ""
    try:
        found = importlib.util.find_spec(wanted.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UserError(
            f"--workload {spec.text}: there is no module {wanted}: install it, or start where Python can import it",
            exit_code=2,
        )
    with user_code(f"importing {wanted}"):
        return importlib.import_module(wanted)


def _is_workload(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Workload) and value is not Workload


def _classes_in(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
