"""Settings and one-line errors, for every script.

Settings are a dataclass of defaults, overridden by files and then by --name=value flags; later ones win. An override
file holds lines of `name = value`. The values are literals: nothing in the file is executed.
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
import textwrap
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None]):
    """Run a script's main(). A user's error is printed as one line, exit status 1; a bug keeps its traceback.

    The functions of this project raise ValueError or OSError with the whole message. A ValueError that no `raise` of
    ours made, such as numpy's for a wrong shape, is a bug.
    """
    with contextlib.suppress(AttributeError):  # not a text file
        sys.stdout.reconfigure(errors="replace")  # print ? for a character that the terminal cannot show
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit("error: stopped") from None
    except (OSError, ValueError) as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        raised_by_us = "site-packages" not in frame.filename and (frame.line or "raise").startswith("raise")
        if isinstance(e, ValueError) and not raised_by_us:
            raise
        raise SystemExit(f"error: {e}") from None


def load(cls: type, argv: list[str] | None = None):
    """An instance of the dataclass `cls`, overridden by argv (default: the command line); prints each override.

    argv: paths of override files (ending in .py), --name=value flags, --name for a bool, --name.key=value for an entry
    of a dict, --help; any other word is the value of init_from, for a class that has one. The result's attribute
    `overridden` is the set of names that argv set. Raises ValueError with the file or flag at fault, the type that was
    expected, and for an unknown name the nearest valid one.
    """
    argv = sys.argv[1:] if argv is None else argv
    wants_help = "--help" in argv or "-h" in argv
    values = {f.name: default(f) for f in dataclasses.fields(cls)}
    hints, overridden = {name: typing.get_type_hints(cls)[name] for name in values}, set()
    for arg in argv:
        if arg in ("--help", "-h"):
            continue
        if arg.startswith("-"):
            overrides = [read_flag(arg, values, hints)]
        elif arg.endswith(".py"):
            overrides = [(f"{arg}:{line}", name, value) for line, name, value in read_overrides(Path(arg))]
        elif Path(f"{arg}.py").is_file():
            raise ValueError(f"{arg!r} is not a file of settings; did you mean {arg}.py?")
        elif "init_from" in hints and ("/" in arg or Path(arg).exists()):
            overrides = [(arg, "init_from", arg)]
        else:
            model = ", nor a model" if "init_from" in hints else ""
            raise ValueError(f"{arg!r} is neither a .py file of settings nor a --name=value flag{model}")
        for where, name, value in overrides:
            check_name(name, hints, where)
            values[name] = convert(value, hints[name], where, name)
            overridden.add(name)
        changed = ", ".join(f"{name}={values[name]!r}" for _, name, _ in overrides) or "the defaults"
        if not wants_help:
            print(f"{arg if arg.endswith('.py') else 'override'}: {changed}", file=sys.stderr)
    if wants_help:
        print(describe(cls, values))
        raise SystemExit(0)
    settings = cls(**values)
    settings.overridden = frozenset(overridden)
    return settings


def default(field: dataclasses.Field):
    """The default of a dataclass field."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def read_flag(arg: str, values: dict, hints: dict) -> tuple[str, str, object]:
    """(flag, name, value) of a --name=value, --name or --name.key=value."""
    name, equals, text = arg.lstrip("-").partition("=")
    name, _, key = name.partition(".")
    check_name(name, hints, where=f"--{name}")
    if key:
        kinds = [hint for hint in (hints[name], *typing.get_args(hints[name])) if typing.get_origin(hint) is dict]
        if not kinds:
            raise ValueError(f"--{name}.{key}: {name} is one value, without entries")
        if isinstance(values[name], str):
            raise ValueError(f"--{name}.{key}= and --{name}= exclude each other")
        entries = values[name] or {}
        return f"--{name}.{key}", name, {**entries, key: parse(text, typing.get_args(kinds[0])[1])}
    if not equals and hints[name] not in (bool, bool | None):
        raise ValueError(f"--{name} needs a value: --{name}=<{type_name(hints[name])}>")
    return f"--{name}", name, parse(text, hints[name]) if equals else True


def read_overrides(path: Path) -> list[tuple[int, str, object]]:
    """The (line, name, value) assignments of an override file; values are Python literals."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a file of settings") from None
    except OSError:
        files = [str(p) for p in Path("config").rglob("*.py")]
        near = difflib.get_close_matches(str(path), files, n=1)
        raise ValueError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else "")) from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise ValueError(f"{path}: not lines of `name = value` ({e})") from None
    found = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        try:
            (target,) = node.targets
            found.append((node.lineno, target.id, ast.literal_eval(node.value)))
        except (AttributeError, ValueError, TypeError, MemoryError, RecursionError):
            line = ast.unparse(node).splitlines()[0][:60]
            raise ValueError(
                f"{path}:{node.lineno}: expected `name = value` with a literal value, found `{line}`"
            ) from None
    return found


def check_range(settings, low: float, high: float, *names: str):
    """Raise ValueError, naming the first, if one of these settings lies outside low..high, both included."""
    for name in names:
        if not low <= getattr(settings, name) <= high:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must lie in {low:g}..{high:g}")


def check_name(name: str, known: dict, where: str):
    """Raise ValueError for an unknown setting, with the nearest known name."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them"
        raise ValueError(f"{where}: there is no setting {name!r}; {hint}")


def parse(text: str, hint) -> object:
    """The value of a flag's text: the text itself for str, else a Python literal where it is one."""
    if hint is str or (hint == str | None and text != "None"):
        return text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return tuple(text.split(",")) if typing.get_origin(hint) is tuple else text


def convert(value, hint, where: str, name: str):
    """value as the field's type. Raises ValueError with the type that was expected."""
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
    raise ValueError(f"{where}: {name} takes {type_name(hint)}, not {repr(value)[:60]}")


def type_name(hint) -> str:
    """The type as a person would write it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "comma-separated names"
    if typing.get_origin(hint) is dict:
        return "{'name': value, ...}"
    return {int: "int", float: "float", bool: "True or False", str: "str", type(None): "None"}.get(hint, str(hint))


def describe(cls: type, values: dict) -> str:
    """The --help text: every setting with its value and the comment beside it, under the headings in the source."""
    comments, headings = {}, {}
    for base in reversed(cls.__mro__[:-1]):
        heading = base.__name__.removesuffix("Config").lower()
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"(?:    |class .*:  )# (.*)", line):
                heading = match[1]
            elif match := re.match(r"    (\w+): .*?  # (.*)", line):
                comments[match[1]] = match[2]
                headings.setdefault(match[1], heading)
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        value = ",".join(value) if isinstance(value, tuple) else value
        flag, indent = f"  --{name}={value if isinstance(value, str) else repr(value)}", " " * 32
        text = textwrap.fill(comments[name], 120, initial_indent=indent, subsequent_indent=indent)
        text = f"{flag:<31} {text.lstrip()}" if len(flag) < 32 else f"{flag}\n{text}"
        groups.setdefault(headings.get(name, ""), []).append(text)
    doc = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    settings = ["\n".join([f"{heading}:", *texts]) for heading, texts in groups.items()]
    return "\n\n".join([doc, "Settings, as --name=value or as lines of an override file", *settings])
