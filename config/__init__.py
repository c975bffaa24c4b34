"""What every script needs: its settings, errors of one line, and files that are whole or not there.

Settings are a dataclass of defaults, then override files, then --name=value flags; later ones win. An override file is
lines of `name = value`, nothing else: values are literals, and nothing in it is run. All of it goes through load(),
which answers a mistake with one line and exit status 1.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path


def fail(message: str) -> typing.NoReturn:
    """End the script with one line for the person at the keyboard, exit status 1."""
    raise SystemExit(f"error: {message}")


def run(main: Callable[[], None]):
    """Run a script's main(); Ctrl-C ends it with one line, and a reader that goes away (`| head`) without a word."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail("stopped")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its exit
        raise SystemExit(1) from None


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to this folder meanwhile; ends the script if one does so already."""
    with open(folder / ".lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                fail(f"another process is writing to {folder}; wait for it, or choose another folder")
            except OSError:  # a file system without locks
                pass
        yield


def write_whole(path: Path, write: Callable[[typing.BinaryIO], object]):
    """Let write(file) fill a file that is at `path` whole or not at all: flushed to disk first, then renamed."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError):
        partial.unlink(missing_ok=True)
        raise


def load(cls: type, argv: list[str] | None = None):
    """An instance of the dataclass `cls`, overridden by argv (default: the command line); prints what was overridden.

    Its attribute `overridden` is the set of the settings that argv gave.
    argv: paths of override files (ending in .py), --name=value flags, --name for a bool, --name.key=value for an entry
    of a dict, --help. Raises SystemExit with one line that names the file or flag, the nearest valid name and the type.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(describe(cls))
        raise SystemExit(0)
    values = {f.name: default(f) for f in dataclasses.fields(cls)}
    hints, given = {name: typing.get_type_hints(cls)[name] for name in values}, set()
    for arg in argv:
        if arg.startswith("-"):
            name, equals, text = arg.lstrip("-").partition("=")
            name, _, key = name.partition(".")
            check_name(name, hints, where=f"--{name}")
            if key and not isinstance(values[name], dict):
                fail(f"--{name}.{key}: {name} is one value, without entries")
            if not equals and hints[name] not in (bool, bool | None):
                fail(f"--{name} needs a value: --{name}=<{type_name(hints[name])}>")
            where, value = f"--{name}", parse(text, hints[name]) if equals else True
            if key:
                where, value = f"--{name}.{key}", {**values[name], key: parse(text, typing.get_args(hints[name])[1])}
            overrides = [(where, name, value)]
        elif arg.endswith(".py"):
            overrides = [(f"{arg}:{line}", name, value) for line, name, value in read_overrides(Path(arg))]
        else:
            fail(f"{arg!r} is neither a .py file of settings nor a --name=value flag")
        for where, name, value in overrides:
            check_name(name, hints, where)
            values[name] = convert(value, hints[name], where, name)
            given.add(name)
        changed = ", ".join(f"{name}={values[name]!r}" for _, name, _ in overrides)
        print(f"override: {changed}" if arg.startswith("-") else f"{arg}: {changed}", file=sys.stderr)
    try:
        settings = cls(**values)
    except ValueError as e:
        fail(str(e))
    settings.overridden = frozenset(given)
    return settings


def default(field: dataclasses.Field):
    """The default of a dataclass field."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def read_overrides(path: Path) -> list[tuple[int, str, object]]:
    """The (line, name, value) assignments of an override file; values are Python literals."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except IsADirectoryError:
        fail(f"{path} is a folder, not a file of settings")
    except OSError:
        near = difflib.get_close_matches(str(path), [str(p) for p in Path("config").rglob("*.py")], n=1)
        fail(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        fail(f"{path}: not lines of `name = value` ({e})")
    found = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        try:
            (target,) = node.targets
            found.append((node.lineno, target.id, ast.literal_eval(node.value)))
        except (AttributeError, ValueError, TypeError, MemoryError, RecursionError):
            line = ast.unparse(node).splitlines()[0][:60]
            fail(f"{path}:{node.lineno}: expected `name = value` with a literal value, found `{line}`")
    return found


def check_range(settings, low: float, high: float, *names: str):
    """Raise ValueError, naming the first, if one of these settings does not lie in low..high, both included."""
    for name in names:
        if not low <= getattr(settings, name) <= high:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must lie in {low:g}..{high:g}")


def check_name(name: str, known: dict, where: str):
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them"
        fail(f"{where}: there is no setting {name!r}; {hint}")


def parse(text: str, hint) -> object:
    """The value that a flag's text stands for: the text itself for str, else a Python literal where it is one."""
    if hint is str or (hint == str | None and text != "None"):
        return text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return tuple(text.split(",")) if typing.get_origin(hint) is tuple else text


def convert(value, hint, where: str, name: str):
    """value as the field's type, or one line that says what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        return convert(value, type(value) if type(value) in kinds else kinds[0], where, name)
    if origin is tuple and isinstance(value, str):
        value = tuple(value.split(","))
    if origin is tuple and isinstance(value, (tuple, list)) and all(isinstance(v, args[0]) for v in value):
        return tuple(value)
    if origin is dict and isinstance(value, dict) and value and all(isinstance(k, str) for k in value):
        return {k: convert(v, args[1], where, f"{name}.{k}") for k, v in value.items()}
    if hint is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e6
        return int(value)
    out_of_range = (type(value) is int and abs(value) >= 2**63) or (type(value) is float and not math.isfinite(value))
    if isinstance(hint, type) and type(value) is hint and not out_of_range:
        return value
    fail(f"{where}: {name} takes {type_name(hint)}, not {repr(value)[:60]}")


def type_name(hint) -> str:
    """How a person would write the type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "comma-separated names"
    if typing.get_origin(hint) is dict:
        return "{'name': value, ...}"
    return {int: "int", float: "float", bool: "True or False", str: "str", type(None): "None"}.get(hint, str(hint))


def describe(cls: type) -> str:
    """The --help text: every field with its default and the comment beside it in the source."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        for match in re.finditer(r"^    (\w+):.*?  # (.*)$", inspect.getsource(base), re.M):
            comments[match[1]] = match[2]
    doc = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    lines = [doc, "", "Settings, as --name=value or as lines of an override file:", ""]
    for field in dataclasses.fields(cls):
        lines.append(f"  --{field.name}={default(field)!r}\n        {comments.get(field.name, '')}")
    return "\n".join(lines)
