"""A report on runs that can be sent to others: a folder with report.md and its plots.

python -m extras.report --runs=out/tiny,out/tiny_sft --out_dir=out/tiny_report

It reads what the scripts wrote: settings.json, log.jsonl, eval.json and the plots of eval.py. It also reads what
extras/speedrun.sh leaves in its folder: sample.txt, answer.txt, and times.tsv with each stage's time.
"""

import contextlib
import datetime
import json
import platform
import re
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import train
from common import run as runtime
from common import settings
from common.settings import UserError
from extras.bench import describe_machine

PICTURES = {
    "training.png": "Loss and entropies over training",
    "usage.png": "Usage of the activations in each layer over training",
    "layers.png": "Routing of each layer at the end",
}


@dataclass
class ReportConfig:
    """Settings of a report."""

    runs: tuple[str, ...] = ("out/tiny", "out/tiny_sft")  # run folders, in the order of the report
    out_dir: str = "out/tiny_report"  # folder of the report
    question: str = ""  # what answer.txt answers

    def __post_init__(self):
        if not self.runs:
            raise UserError("runs is empty; name the folders of runs")


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, with a blank line after it."""
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in cells] + [""]


def quote(title: str, path: Path) -> list[str]:
    """The text of a file as a block of code under a title; nothing if there is no such file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    return [title, "", *(f"    {line}" for line in text.splitlines()), ""]


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """A run's settings and log. UserError unless it has reached its last step."""
    try:
        found = runtime.read_json(folder / "settings.json")
        n_steps = found["max_steps"]
    except (UserError, KeyError):
        raise UserError(f"{folder} is not the folder of a run: it has no readable settings.json") from None
    log = runtime.read_log(folder)
    step = max((line["step"] for line in log if "val" in line), default=0)
    with name_damage(folder):
        losses = [val["loss"] for line in log if line["step"] == step and "val" in line for val in line["val"].values()]
    if None in losses:
        raise UserError(f"{folder} has diverged: its held-out loss is not finite; start over with a lower --lr")
    if step < n_steps:
        done = f"its last evaluation was at step {step} of {n_steps}"
        raise UserError(f"{folder} has not finished: {done}; run the same command again, or resume it with --resume")
    return found, log


@contextlib.contextmanager
def name_damage(folder: Path):
    """Turn what a damaged log or evaluation causes into a UserError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(f"a file in {folder} is damaged or of another version ({e!r})") from None


def stages(path: Path) -> list[str]:
    """The stages of extras/speedrun.sh with their times, as a table."""
    if not path.is_file():
        return []
    rows = re.findall(r"^(.+)\t(\d+)$", path.read_text(), re.M)  # a full disk may have cut a line
    times = [[name, datetime.timedelta(seconds=int(seconds))] for name, seconds in rows]
    total = sum((time for _, time in times), datetime.timedelta())
    note = "A stage that was stopped and resumed counts from its last start."
    return table(["stage", "hours:minutes:seconds"], [*times, ["**all**", f"**{total}**"]]) + [note, ""]


def training(log: list[dict]) -> list[str]:
    """The evaluations during training, as a table."""
    evaluations, rows = [line for line in log if "val" in line], []
    is_routed = bool(evaluations[-1]["routing"])
    # a resumed run may have changed the domains
    domains = list(dict.fromkeys(domain for line in evaluations for domain in line["val"]))
    for line in evaluations:
        bits = [f"{line['val'][x]['bits_per_byte']:.3f}" if x in line["val"] else "" for x in domains]
        names = ("dynamic_entropy_share", "agreement") if is_routed else ()
        rows.append([line["step"], *bits, *(f"{statistics.mean(line['routing'][name]):.1%}" for name in names)])
    measures = ["dynamic entropy, of ln K", "agreement"] if is_routed else []
    return ["Held-out text during training, in bits per byte:", "", *table(["step", *domains, *measures], rows)]


def results(path: Path) -> list[str]:
    """The losses and the problems of an eval.json, as tables."""
    found, lines = runtime.read_json(path) if path.is_file() else {}, []
    if "domains" in found:
        rows = []
        for name, x in found["domains"].items():
            error = x["bits_per_byte_error"]
            rows.append([name, f"{x['tokens']:,}", f"{x['nats_per_token']:.4f}", f"{x['bits_per_byte']:.4f}"])
            rows[-1].append("" if error is None else f"{error:.4f}")
        header = ["domain", "tokens", "nats per token", "bits per byte", "standard error"]
        title = f"Held-out text of {found['data_dir']}"
        title += f" at step {found['step']}" if found.get("step") else ""
        title += f", at most {found['max_tokens']:,} tokens of each domain" if found.get("max_tokens") else ""
        lines += [f"{title}:", "", *table(header, rows)]
    if "problems" in found:
        rows = []
        for name, x in found["problems"].items():
            low, high = x["interval"]
            rows.append([name, x["n"], f"{x['exact_match']:.0%}", f"{low:.0%} to {high:.0%}"])
        header = ["problems", "n", "exact match", "95% interval"]
        lines += ["Problems that are held out of all training data:", "", *table(header, rows)]
    return lines


def describe(number: int, folder: Path, out_dir: Path) -> list[str]:
    """The section of a run. Copies its plots to out_dir, under its number and name."""
    found, log = read_run(folder)
    defaults = json.loads(json.dumps(vars(train.TrainConfig())))  # as in settings.json: lists, no tuples
    changed = [[f"`{name}`", f"`{value}`"] for name, value in found.items() if value != defaults.get(name)]
    rate = statistics.median(line["tokens_per_second"] for line in log if "loss" in line)
    n_tokens = found["batch_size"] * found["block_size"]
    steps = f"{found['max_steps']:,} steps ({n_tokens:,} tokens each at the end)"
    lines = [f"## {folder}", "", f"It took {steps} and read {rate:,.0f} tokens a second.", ""]
    lines += training(log) + results(folder / "eval.json")
    for name, title in PICTURES.items():
        if (folder / name).exists():
            copy = f"{number}_{folder.name}_{name}"
            with runtime.name_write_errors(out_dir / copy):
                shutil.copy(folder / name, out_dir / copy)
            lines += [f"![{title}]({copy})", ""]
    return lines + ["Settings that differ from the defaults of train.py:", "", *table(["setting", "value"], changed)]


def main():
    cfg = settings.load(ReportConfig)
    for folder in cfg.runs:
        read_run(Path(folder))
    out_dir = Path(cfg.out_dir)
    with runtime.name_write_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    lines = [f"# PolyGLU: {', '.join(Path(folder).name for folder in cfg.runs)}", ""]
    lines += quote("A new document, by the first run:", out_dir / "sample.txt")
    lines += quote(f"The last run's answer to: {cfg.question}", out_dir / "answer.txt")
    try:
        device = runtime.pick_device(read_run(Path(cfg.runs[0]))[0]["device"])
    except (UserError, KeyError):  # a run of another machine
        device = runtime.pick_device("auto")
    machine = describe_machine(device)
    lines += [f"Machine: {machine}, Python {platform.python_version()}, {platform.platform()}.", ""]
    lines += stages(out_dir / "times.tsv")
    for number, folder in enumerate(cfg.runs, 1):
        with name_damage(folder):
            lines += describe(number, Path(folder), out_dir)
    runtime.write_atomically(out_dir / "report.md", lambda file: file.write("\n".join(lines).encode()))
    print(f"report: {out_dir / 'report.md'}; send the whole folder, which has its plots")


if __name__ == "__main__":
    settings.run(main)
