"""The study: what routing is worth.

python -m extras.study                             train every variant in config/study/ with five seeds (hours)
python -m extras.study --variants=swiglu,prefix    train some of them; a new file in config/study/ is a new variant
python -m extras.study --jobs=0                    report the runs that are finished, without training
python -m extras.study --report=study.json         print the tables and draw the figure again from the numbers alone
python -m extras.study --help                      list the settings

Runs that share a seed see the same data in the same order and start from identical weights, except the routing
parameters, so variants are compared within each seed. Each run is trained once: the same command continues where it was
stopped. The most important runs come first. The run folders, study.json and study.png are written to out_dir.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common.settings
from common.run import Ranks, load_checkpoint, pick_device, pick_dtype, prepare_cpu, read_log, write_json
from common.settings import UserError, check_range, load
from common.weights import from_pretrained
from extras.bench import describe_machine, print_table
from train import TrainConfig, open_corpora, val_batches

VARIANTS = Path("config/study")  # one override file per variant
ORDER = (  # of training: the most important first; other files in config/study/ follow
    "swiglu", "geglu", "prefix", "centred", "sequence", "token", "centred_no_noise", "no_noise", "constant_tau", "moa",
    "static", "dynamic", "centred_alpha_10", "alpha_10", "tau_half",
)  # fmt: skip
MAIN = ORDER[:4]  # each seed of them before any other variant
BASELINES = {"swiglu": "SwiGLU", "geglu": "GEGLU"}  # also trained for the time that a routed variant takes
LR_CHECKED = ("swiglu", "geglu", "prefix")  # also trained at these multiples of the learning rate
LR_FACTORS = (0.5, 2.0)
CONTRASTS = (  # two estimates of what the leak of "sequence" is worth; what centring changes
    ("sequence, causal", "sequence"), ("prefix", "sequence"), ("centred", "token"), ("centred", "prefix"),
)  # fmt: skip
MEASURES = {  # of the routing: heading and format
    "static_entropy_share": ("static entropy", ".2%"),
    "dynamic_entropy_share": ("dynamic entropy", ".1%"),
    "input_dependence": ("input dependence, nats", ".3f"),
    "agreement": ("agreement", ".1%"),
}


@dataclass
class StudyConfig:
    """Settings of a study."""

    base: str = "config/tiny.py"  # override file that all variants share
    variants: tuple[str, ...] = ()  # names of files in config/study/; empty: all of them
    seeds: int = 5  # runs of each variant, with the seeds 1, 2, ...
    max_steps: int = 500  # optimizer steps of a run
    cost_ratio: float = 1.19  # time of a routed variant's step to a baseline's, by the runs' logs; 1: no equal time
    check_lr: int = 3  # seeds with which swiglu, geglu and prefix also train at half and at twice the learning rate
    eval_tokens: int = 131_072  # evaluate on at most this many tokens of each domain's val.bin
    out_dir: str = "out/study"  # where the runs, study.json and study.png go
    jobs: int | None = None  # runs at a time; None: one per CPU core, on a GPU one; 0: report finished runs
    report: str | None = None  # a study.json to report, without any run; the figure goes beside it
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device

    def __post_init__(self):
        check_range(self, 1, 100, "seeds")
        check_range(self, 0, 100, "check_lr")
        check_range(self, 1, 10**8, "max_steps", "eval_tokens")
        check_range(self, 1, 100, "cost_ratio")
        if self.jobs is not None:
            check_range(self, 0, 1024, "jobs")
        known = sorted(path.stem for path in VARIANTS.glob("*.py"))
        for name in self.variants:
            if name not in known:
                raise UserError(f"there is no {VARIANTS / name}.py; there are {', '.join(known)}")
        self.variants = tuple(sorted(set(self.variants or known), key=lambda name: ((*ORDER, name).index(name), name)))


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """One training run of a study."""

    group: str  # of the runs that differ in their seed alone: "prefix", "swiglu, equal time", "prefix, lr x 2"
    seed: int
    arguments: list[str]  # of train.py
    folder: Path

    @functools.cached_property
    def settings(self) -> TrainConfig:
        with contextlib.redirect_stderr(io.StringIO()):  # load() prints the overrides
            return load(TrainConfig, self.arguments)

    def evaluation(self) -> dict | None:
        """The evaluation after the last step in its log; None if the run is not finished."""
        found = [line for line in read_log(self.folder) if "val" in line]
        return found[-1] if found and found[-1]["step"] == self.settings.max_steps else None


def plan_runs(cfg: StudyConfig) -> list[Run]:
    """All runs of the study, the most important first."""

    def plan(group: str, seed: int, steps: int = cfg.max_steps, *more: str) -> Run:
        variant = group.split(",")[0]
        folder = Path(cfg.out_dir) / f"{group.replace(', ', '-').replace(' x ', '_').replace(' ', '_')}-{seed}"
        arguments = [
            cfg.base, f"{VARIANTS / variant}.py", *more, f"--seed={seed}", f"--max_steps={steps}",
            f"--eval_interval={steps}", f"--eval_tokens={cfg.eval_tokens}", f"--out_dir={folder}",
            f"--device={cfg.device}",
        ]  # fmt: skip
        return Run(group, seed, arguments, folder)

    seeds, main = range(1, cfg.seeds + 1), [variant for variant in cfg.variants if variant in MAIN]
    runs = [plan(variant, seed) for seed in seeds for variant in main]
    runs += [plan(variant, seed) for variant in cfg.variants if variant not in main for seed in seeds]
    lr = {run.group: run.settings.lr for run in runs if run.group in LR_CHECKED}
    if cfg.cost_ratio > 1:
        steps = round(cfg.max_steps * cfg.cost_ratio)
        runs += [plan(f"{name}, equal time", seed, steps) for seed in seeds for name in main if name in BASELINES]
    for seed, variant, x in itertools.product(seeds[: cfg.check_lr], lr, LR_FACTORS):
        runs.append(plan(f"{variant}, lr x {x:g}", seed, cfg.max_steps, f"--lr={x * lr[variant]!r}"))
    return runs


def is_finished(run: Run) -> bool:
    """Whether the run's folder holds the finished run. Raises UserError if it holds a run with other settings."""
    if not (run.folder / "ckpt.pt").exists():
        return False
    checkpoint = load_checkpoint(run.folder)
    saved, step = checkpoint["settings"], checkpoint["progress"]["step"]
    for name, value in dataclasses.asdict(run.settings).items():
        same = value is None or saved.get(name, value) == value  # None: train.py chose a value
        if not same and name not in ("resume", "overwrite", "out_dir", "device"):
            found = f"{run.folder} was trained with {name}={saved[name]!r}, not {value!r}"
            raise UserError(f"{found}; remove it, or choose another --out_dir")
    return step == run.settings.max_steps and run.evaluation() is not None


def train_run(run: Run, environment: dict[str, str], processes: list[subprocess.Popen]) -> tuple[str, bool]:
    """Train a run in a process of its own. Returns its scores, or its last line of output, and whether it finished."""
    run.folder.mkdir(parents=True, exist_ok=True)
    output, start = run.folder / "output.txt", time.monotonic()
    command = [sys.executable, "train.py", *run.arguments, "--resume"]  # or start, without a checkpoint
    with open(output, "a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    processes.append(process)
    if process.wait() == 0 and (evaluation := run.evaluation()):
        bits = (f"{domain} {val['bits_per_byte']:.3f}" for domain, val in evaluation["val"].items())
        return f"{'  '.join(bits)} bits per byte, {time.monotonic() - start:.0f} s", True
    lines = output.read_text(errors="replace").strip().splitlines() or ["no output"]
    return f"did not finish ({lines[-1]}); see {output}", False


def train_runs(runs: list[Run], jobs: int, on_cpu: bool) -> list[str]:
    """Train the runs that are not finished, `jobs` at a time, and report each. Returns the errors of those that failed.

    On a CPU a run gets one thread, so that its results do not depend on the number of cores.
    """
    waiting, errors, processes = [run for run in runs if not is_finished(run)], [], []
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done before; {jobs} at a time", flush=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if on_cpu else {})}
    with ThreadPoolExecutor(jobs) as pool:
        names = {pool.submit(train_run, run, environment, processes): run.folder.name for run in waiting}
        try:
            for count, future in enumerate(as_completed(names), 1):
                outcome, finished = future.result()
                print(f"[{count}/{len(waiting)}] {names[future]}: {outcome}", flush=True)
                if not finished:
                    errors.append(f"{names[future]} {outcome}")
        finally:  # if interrupted, each run finishes its step and saves
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
    return errors


# -------------------------------------------------------------------------------------------------------------- results


@torch.no_grad()
def causal_losses(run: Run, device: torch.device, rows=128, first=32, others=8) -> dict[str, float]:
    """Bits per byte of a "sequence" model in each domain when its router cannot read later tokens, as in generation.

    Each token is then predicted by its own forward pass on the tokens before it. To save time this is done in at most
    `rows` rows, for the `first` tokens, where most of the difference is, and about `others` evenly spaced later ones,
    different in every batch. The mean difference to the loss with the whole row, each token weighted by how many it
    stands for, is added to the run's score.
    """
    eval_tokens = min(run.settings.eval_tokens, rows * run.settings.block_size)
    cfg, losses = dataclasses.replace(run.settings, eval_tokens=eval_tokens), {}
    model = from_pretrained(run.folder).to(device)
    _, corpus = open_corpora(cfg)
    dtype = pick_dtype(cfg.dtype, device)
    first = min(first, cfg.block_size)
    stride = max(1, (cfg.block_size - first) // others)

    def loss(logits: Tensor, targets: Tensor) -> float:
        return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum").item()

    for domain, val in run.evaluation()["val"].items():
        difference, count = 0.0, 0
        for i, (tokens, targets, doc_ids) in enumerate(val_batches(corpus, domain, cfg, Ranks(str(device)))):
            weights = {t: 1 for t in range(first)}
            weights |= {t: stride for t in range(first + i % stride, cfg.block_size, stride)}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                noncausal = model(tokens, doc_ids=doc_ids)
                for t, weight in weights.items():
                    causal = model(tokens[:, : t + 1], doc_ids=doc_ids[:, : t + 1])[:, -1]
                    difference += weight * (loss(causal, targets[:, t]) - loss(noncausal[:, t], targets[:, t]))
                    count += weight * (targets[:, t] >= 0).sum().item()
        losses[domain] = corpus.bits_per_byte(domain, val["loss"] + difference / count)
    return losses


def collect_results(runs: list[Run], device: torch.device) -> list[dict]:
    """The measurements of every finished run, and of each "sequence" run once more with its causal score."""
    results = []

    def add(run: Run, group: str, causal: bool, bits_per_byte: dict[str, float], routing: dict):
        bits_per_byte["mean"] = statistics.fmean(bits_per_byte.values())  # what variants are judged by
        results.append({
            "group": group, "seed": run.seed, "command": shlex.join(["python", "train.py", *run.arguments]),
            "activations": run.settings.activations, "causal": causal, "bits_per_byte": bits_per_byte,
            "routing": routing,
        })  # fmt: skip

    for run in filter(is_finished, runs):
        evaluation, sees_future = run.evaluation(), run.settings.sees_future
        bits = {domain: val["bits_per_byte"] for domain, val in evaluation["val"].items()}
        add(run, run.group, not sees_future, bits, evaluation["routing"])
        if sees_future:
            path = run.folder / "causal.json"  # takes minutes to compute
            if not path.exists():
                write_json(path, causal_losses(run, device))
            add(run, f"{run.group}, causal", True, json.loads(path.read_text()), {})
    return results


# ----------------------------------------------------------------------------------------------------------- statistics


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted for the number of tests (Holm, 1979): the smallest times n, the next times n - 1, never falling."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        largest = adjusted[i] = max(largest, min(1.0, (len(p) - rank) * p[i]))
    return adjusted


def estimate(values: Sequence[float]) -> dict:
    """Mean of independent values, its 95% t-interval and the two-sided p of a mean of 0; None for a single value."""
    try:
        from scipy.stats import t
    except ImportError:
        raise UserError("the study's statistics need a package: pip install scipy") from None
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return {"mean": mean, "interval": None, "p": None}
    error = max(statistics.stdev(values) / math.sqrt(n), 1e-300)
    low, high = t.interval(0.95, n - 1, mean, error)
    return {"mean": mean, "interval": [float(low), float(high)], "p": float(2 * t.sf(abs(mean) / error, n - 1))}


def summarize_group(runs: list[dict]) -> dict:
    """The means of runs that differ in their seed alone."""
    first, routing = runs[0], [run["routing"] for run in runs]
    row = {key: first[key] for key in ("group", "activations", "causal")}
    row["seeds"] = [run["seed"] for run in runs]
    row["bits_per_byte"] = {
        d: statistics.fmean(run["bits_per_byte"][d] for run in runs) for d in first["bits_per_byte"]
    }
    if first["routing"]:
        row["routing"] = {name: estimate([statistics.fmean(r[name]) for r in routing]) for name in MEASURES}
        row["usage"] = np.mean([r["usage"] for r in routing], axis=0).tolist()  # [n_layer, K]
    return row


def compare(results: list[dict], pairs: Iterable[tuple[str, str]]) -> list[dict]:
    """Differences of groups in mean bits per byte, paired by seed. Leaves out groups that share no seed."""
    scores: dict[str, dict[int, float]] = {}
    for result in results:
        scores.setdefault(result["group"], {})[result["seed"]] = result["bits_per_byte"]["mean"]
    differences = []
    for ours, theirs in pairs:
        a, b = scores.get(ours, {}), scores.get(theirs, {})
        if seeds := [seed for seed in a if seed in b]:
            difference = estimate([a[seed] - b[seed] for seed in seeds])
            differences.append({"ours": ours, "theirs": theirs, "seeds": seeds, **difference})
    return differences


def summarize(results: list[dict]) -> dict:
    """The means of each group of runs, and differences between groups.

    "comparisons": each baseline with all other groups (its run at equal time: with all routed variants), p corrected
    for their number. "contrasts": single pairs, not corrected.
    """
    names = list(dict.fromkeys(result["group"] for result in results))
    rows = [summarize_group([result for result in results if result["group"] == name]) for name in names]
    lr_checks = [name for name in names if ", lr" in name]
    routed = [row["group"] for row in rows if len(row["activations"]) > 1]
    comparisons = {}
    for baseline in names:
        if baseline.split(",")[0] not in BASELINES or baseline in lr_checks:
            continue
        others = [name for name in (names if baseline in BASELINES else routed) if name not in (baseline, *lr_checks)]
        found = sorted(compare(results, [(name, baseline) for name in others]), key=lambda x: x["mean"])
        tested = [x for x in found if x["p"] is not None and "equal time" not in x["ours"]]
        for x, p in zip(tested, holm([x["p"] for x in tested])):
            x |= {"p_holm": p, "survives": p < 0.05}
        comparisons[baseline] = found
    contrasts = compare(results, [*CONTRASTS, *((name, name.split(",")[0]) for name in lr_checks)])
    return {"summary": rows, "comparisons": comparisons, "contrasts": contrasts}


# --------------------------------------------------------------------------------------------------- tables and figure


def with_interval(x: dict, form: str) -> str:
    """mean [95% interval]"""
    return format(x["mean"], form) + (" [{:{f}}, {:{f}}]".format(*x["interval"], f=form) if x["interval"] else "")


def print_differences(title: str, differences: list[dict]):
    table = [["", "pairs", "difference [95% interval]", "p", "p, Holm", "survives"]]
    for x in differences:
        p, corrected = ("-" if x.get(key) is None else f"{x[key]:.2g}" for key in ("p", "p_holm"))
        survives = {True: "yes", False: "no", None: "-"}[x.get("survives")]
        pair, seeds = f"{x['ours']} - {x['theirs']}", str(len(x["seeds"]))
        table.append([pair, seeds, with_interval(x, "+.4f"), p, corrected, survives])
    print_table(title, table)


def print_report(report: dict):
    """Print the tables of docs/study.md."""
    rows = sorted(report["summary"], key=lambda row: row["bits_per_byte"]["mean"])
    table = [["", "seeds", *rows[0]["bits_per_byte"]]]
    for row in rows:
        table.append([row["group"], str(len(row["seeds"])), *(f"{x:.4f}" for x in row["bits_per_byte"].values())])
    print_table("Bits per byte of held-out text, mean over the seeds; mean: over the domains", table)

    for name, differences in report["comparisons"].items():
        print_differences(f"Compared with {name}: mean bits per byte, paired by seed", differences)
    title = "Single differences of mean bits per byte, paired by seed, not corrected"
    print_differences(title, report["contrasts"])

    routed = [row for row in rows if "routing" in row and ", lr" not in row["group"]]
    n_layer = len(routed[0]["usage"]) if routed else 0
    measures = [["", *(heading for heading, _ in MEASURES.values())]]
    usage = [["", "activations", *(f"layer {i}" for i in range(n_layer))]]
    for row in routed:
        measures.append([row["group"], *(with_interval(row["routing"][m], f) for m, (_, f) in MEASURES.items())])
        layers = (" / ".join(f"{share:.0%}" for share in layer) for layer in row["usage"])
        usage.append([row["group"], " / ".join(row["activations"]), *layers])
    print_table("Routing at the end, mean over layers and seeds [95% interval]; entropies as shares of ln K", measures)
    print_table("Usage by layer, mean over the seeds", usage)


def finding(report: dict) -> str:
    """What the corrected comparisons show about the causal routed variants, as a sentence."""
    rows = [row for row in report["summary"] if row["causal"] and "," not in row["group"]]
    routed = {row["group"] for row in rows if len(row["activations"]) > 1}
    parts = []
    for baseline, name in BASELINES.items():
        tested = [x for x in report["comparisons"].get(baseline, ()) if x["ours"] in routed and "p_holm" in x]
        n_better = sum(x["survives"] and x["mean"] < 0 for x in tested)
        parts += [f"{n_better or 'none'} to beat {name}"] if tested else []
    found = "\nand ".join(parts).replace(" to beat", " are shown to beat", 1)
    return f"Of {len(routed)} causal routed variants, {found} (equal steps, Holm)" if parts else ""


def draw_differences(ax, report: dict):
    """Differences to SwiGLU with 95% intervals, at most ten rows, and a line for each baseline."""
    order = [row["group"] for row in sorted(report["summary"], key=lambda row: "equal time" not in row["group"])]
    found = sorted(report["comparisons"]["swiglu"], key=lambda x: order.index(x["ours"]))[9::-1]
    for i, x in enumerate(found):
        low, high = x["interval"] or (x["mean"], x["mean"])
        ax.errorbar(x["mean"], i, xerr=[[x["mean"] - low], [high - x["mean"]]], fmt="ko", markersize=4, capsize=2)
    lines = {"swiglu": 0.0, **{x["ours"]: x["mean"] for x in found if x["ours"] == "geglu"}}
    for style, (name, x) in zip(("-", "--"), lines.items()):
        ax.axvline(x, color="gray", linestyle=style, linewidth=1)
        ha = "left" if x == max(lines.values()) else "right"
        ax.text(x, len(found) - 0.4, f" {BASELINES[name]} ", color="gray", ha=ha)
    ax.margins(x=0.12)
    ax.set(yticks=range(len(found)), yticklabels=[x["ours"] for x in found], ylim=(-0.6, len(found) + 0.4))
    label = "bits per byte minus SwiGLU's, with the 95% interval of this difference (lower is better)"
    ax.set(xlabel=label, title=finding(report))


def draw_usage(ax, variant: str, runs: list[dict]):
    """Usage of the activations by layer, one bar per seed."""
    usage = np.array([run["routing"]["usage"] for run in runs])  # [seeds, n_layer, K]
    S, L, K = usage.shape
    x = np.arange(L) + 0.85 * ((np.arange(S)[:, None] + 0.5) / S - 0.5)  # [seeds, n_layer]
    for k, name in enumerate(runs[0]["activations"]):
        bottom = usage[..., :k].sum(-1).ravel()
        ax.bar(x.ravel(), usage[..., k].ravel(), 0.8 / S, bottom=bottom, color=f"C{k}", label=name)
    dependence = np.mean([run["routing"]["input_dependence"] for run in runs])
    ax.set(xlabel=f"layer, one bar per seed\n(input dependence {dependence:.2f} of {math.log(K):.2f} nats)")
    title = f"In {variant}, on average {usage.max(-1).mean():.0%} of a\nlayer's weight goes to its favourite"
    ax.set(ylabel="usage", ylim=(0, 1), xticks=range(L), title=title)


def draw_report(path: Path, report: dict):
    """Draw the differences to SwiGLU and, below, the usage by layer without and with centring."""
    try:
        import matplotlib.figure
    except ImportError:
        return print("no figure: pip install matplotlib")
    panels = {v: [run for run in report["runs"] if run["group"] == v] for v in ("prefix", "centred")}
    panels = {variant: runs for variant, runs in panels.items() if runs}
    if not panels or not report["comparisons"].get("swiglu"):
        return print("no figure: it compares swiglu with prefix and centred")
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10}):  # GitHub shows 100 pixels an inch
        figure = matplotlib.figure.Figure(figsize=(7, 6.5), dpi=200, layout="constrained")
        axes = figure.subplot_mosaic([["differences"] * len(panels), list(panels)], height_ratios=(3, 2))
        draw_differences(axes["differences"], report)
        for variant, runs in panels.items():
            draw_usage(axes[variant], variant, runs)
        figure.legend(*axes[variant].get_legend_handles_labels(), loc="outside lower center", ncols=9, frameon=False)
        figure.savefig(path)
    print(f"\nfigure: {path}")


def main():
    cfg, errors = load(StudyConfig), []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    file = Path(cfg.report or f"{cfg.out_dir}/study.json")
    if cfg.report:
        report = json.loads(file.read_text())
        report |= summarize(report["runs"])
    else:
        device, runs = pick_device(cfg.device), plan_runs(cfg)
        on_cpu = device.type == "cpu"
        jobs = (os.cpu_count() if on_cpu else 1) if cfg.jobs is None else cfg.jobs
        file.parent.mkdir(parents=True, exist_ok=True)
        open_corpora(runs[0].settings)  # a missing corpus or package is an error now, not after hours
        estimate([0, 1])
        prepare_cpu()
        if jobs:
            errors = train_runs(runs, jobs, on_cpu)
        results = collect_results(runs, device)
        if not results:
            raise UserError(errors[0] if errors else f"no run in {file.parent} is finished")
        machine = describe_machine(device) + ("; one thread per run" if on_cpu else "")
        report = {"machine": machine, "settings": dataclasses.asdict(cfg), **summarize(results), "runs": results}
        write_json(file, report)
    print_report(report)
    draw_report(file.with_suffix(".png"), report)
    if errors:
        raise UserError(f"{len(errors)} runs failed: {errors[0]}")


if __name__ == "__main__":
    common.settings.run(main)
