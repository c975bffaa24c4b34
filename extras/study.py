"""Studies: what routing is worth, and whether that changes with training or with size.

python -m extras.study                             15 variants of config/tiny.py, 500 steps, five seeds (hours)
python -m extras.study config/study_middle.py      four of them, 1,600 steps, read at five points
python -m extras.study config/study_longer.py      five of them, 4,000 steps
python -m extras.study config/study_larger.py      four of them, 1,600 steps at 6.8M parameters, three seeds
python -m extras.study --variants=swiglu,mine      train some variants, or a new one, by its file in config/study/
python -m extras.study --jobs=0                    report the runs that are finished, without training
python -m extras.study --report=assets/study.json  print the tables and draw the figures again from the numbers alone

Runs that share a seed see the same data in the same order and start from identical weights, except the routing
parameters, so variants are compared within each seed. A finished run is kept: the same command continues the study.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from scipy import stats

from common import settings
from common.data import to_inputs
from common.routing import routing_stats
from common.run import Ranks, pick_autocast, pick_device, prepare_cpu, read_json, read_log, write_json
from common.weights import from_pretrained
from extras.bench import describe_machine, print_table
from model import PolychromaticLM
from train import TrainConfig, open_corpora, val_batches

VARIANTS = Path("config/study")  # one override file per variant
PUBLISHED = (  # in docs/study.md, the most important first
    "swiglu", "geglu", "prefix", "centred", "sequence", "token", "centred_no_noise", "no_noise", "constant_tau", "moa",
    "static", "dynamic", "centred_alpha_10", "alpha_10", "tau_half",
)  # fmt: skip
MAIN = PUBLISHED[:4]  # each seed of them before any other variant
BASELINES = ("swiglu", "geglu")  # also trained for the time that a routed variant takes
LR_CHECKED = ("swiglu", "geglu", "prefix")  # also trained at half and at twice the learning rate
CONTRASTS = (  # two estimates of what the leak of "sequence" is worth; what centring changes
    ("sequence, causal", "sequence"), ("prefix", "sequence"), ("centred", "token"), ("centred", "prefix"),
)  # fmt: skip
MEASURES = {  # of the routing: heading and format
    "static_entropy_share": ("static entropy", ".2%"),
    "dynamic_entropy_share": ("dynamic entropy", ".1%"),
    "input_dependence": ("input dependence, nats", ".3f"),
    "agreement": ("agreement", ".1%"),
}
GROWING = {  # of a run's points: heading
    "collapsed": "Share of layers that give over 90% of their weight to one activation",
    "input_dependence": "Input dependence, as a share of ln K",
}


@dataclasses.dataclass
class StudyConfig:
    """Settings of a study."""

    name: str = "short"  # of the study, in study.json
    base: str = "config/tiny.py"  # override file that all variants share
    variants: tuple[str, ...] = PUBLISHED  # names of files in config/study/
    seeds: int = 5  # runs of each variant, with the seeds 1, 2, ...
    max_steps: int = 500  # optimizer steps of a run
    points: int = 1  # evaluations of a run, evenly spread over its steps; the last is at its end
    cost_ratio: float = 1.19  # time of a routed variant's step over a baseline's, from the logs; 1: no equal time
    check_lr: int = 3  # seeds with which swiglu, geglu and prefix also train at half and at twice the learning rate
    eval_tokens: int = 131_072  # evaluate on at most this many tokens of each domain's val.bin
    out_dir: str = "out/study"  # where the runs, study.json and study.png go
    jobs: int | None = None  # runs at a time; None: one per CPU core, on a GPU one; 0: report finished runs
    report: tuple[str, ...] = ()  # study.json files to report, without any run; several are joined in out_dir
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device

    def __post_init__(self):
        settings.check_range(self, 1, 100, "seeds", "cost_ratio", "points")
        settings.check_range(self, 0, 1024, "check_lr", "jobs")
        if not self.variants:
            raise settings.UserError("variants is empty; name files of config/study/")


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass
class Run:
    """One training run of a study."""

    group: str  # of the runs that differ in their seed alone: "prefix", "swiglu, equal time", "prefix, lr x 2"
    arguments: list[str]  # of train.py
    settings: TrainConfig  # what the arguments say
    folder: Path

    def evaluation(self) -> dict | None:
        """The evaluation after the last step in its log; None if the run is not finished."""
        found = [line for line in read_log(self.folder) if "val" in line and line["step"] == self.settings.max_steps]
        return found[-1] if found else None

    def n_parameters(self) -> int:
        with torch.device("meta"):  # no storage
            return sum(p.numel() for p in PolychromaticLM(self.settings.model_config()).parameters())

    def points(self) -> list[dict]:
        """What each evaluation after a step measured: bits per byte, and what the routing does.

        "collapsed": share of the layers that give over 90% of their weight to one activation. "input_dependence": mean
        over the layers, as a share of ln K.
        """
        found = {line["step"]: line for line in read_log(self.folder) if "val" in line and line["step"] > 0}
        ln_K = np.log(len(self.settings.activations))
        return [{
            "tokens": step * self.settings.batch_size * self.settings.block_size,
            "tau": line["tau"],
            **(bits := {domain: val["bits_per_byte"] for domain, val in line["val"].items()}),
            "mean": statistics.fmean(bits.values()),
            **({
                "usage": line["routing"]["usage"],
                "collapsed": statistics.fmean(max(usage) > 0.9 for usage in line["routing"]["usage"]),
                "input_dependence": statistics.fmean(line["routing"]["input_dependence"]) / ln_K,
            } if line["routing"] else {}),
        } for step, line in sorted(found.items())]  # fmt: skip


def plan_runs(cfg: StudyConfig) -> list[Run]:
    """All runs of the study, the most important first."""

    def plan(group: str, seed: int, *flags: str, steps: int = cfg.max_steps) -> Run:
        folder = Path(cfg.out_dir) / f"{group.replace(', ', '-').replace(' x ', '_').replace(' ', '_')}-{seed}"
        arguments = [
            cfg.base, f"{VARIANTS / group.split(',')[0]}.py", *flags, f"--seed={seed}", f"--max_steps={steps}",
            f"--eval_interval={-(-steps // cfg.points)}", f"--eval_tokens={cfg.eval_tokens}", f"--out_dir={folder}",
            f"--device={cfg.device}",
        ]  # fmt: skip
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):  # load() prints the overrides
            run = Run(group, arguments, settings.load(TrainConfig, arguments), folder)
        if (folder / "ckpt.pt").exists():
            for name, theirs in read_json(folder / "settings.json").items():
                ours = json.loads(json.dumps(getattr(run.settings, name, None)))  # None: train.py chose a value
                if ours not in (None, theirs) and name not in ("resume", "overwrite", "out_dir", "device"):
                    found = f"{folder} was trained with {name}={theirs!r}, not {ours!r}"
                    raise settings.UserError(f"{found}; remove it, or choose another --out_dir")
        return run

    seeds, main = range(1, cfg.seeds + 1), [variant for variant in cfg.variants if variant in MAIN]
    runs = [plan(variant, seed) for seed in seeds for variant in main]
    runs += [plan(variant, seed) for variant in cfg.variants if variant not in main for seed in seeds]
    lr = {run.group: run.settings.lr for run in runs if run.group in LR_CHECKED}
    if cfg.cost_ratio > 1:
        steps = round(cfg.max_steps * cfg.cost_ratio)
        runs += [plan(f"{name}, equal time", seed, steps=steps) for seed in seeds for name in main if name in BASELINES]
    checks = [(seed, name, x) for seed in seeds[: cfg.check_lr] for name in lr for x in (0.5, 2.0)]
    runs += [plan(f"{name}, lr x {x:g}", seed, f"--lr={x * lr[name]!r}") for seed, name, x in checks]
    return runs


def train_runs(runs: list[Run], jobs: int) -> list[str]:
    """Train the runs that are not finished, `jobs` at a time, each in its own process. Returns what went wrong."""
    waiting, processes = [run for run in runs if not run.evaluation()], []
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them already done; {jobs} at a time", flush=True)

    def train(run: Run) -> str | None:
        run.folder.mkdir(parents=True, exist_ok=True)
        output = run.folder / "output.txt"
        command = [sys.executable, "train.py", *run.arguments, "--resume"]  # or start, without a checkpoint
        with open(output, "a") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
            processes.append(process)
        last_line = ["no output", *output.read_text(errors="replace").splitlines()][-1]
        print(f"{run.folder.name}: {last_line} ({sum(not x.evaluation() for x in runs)} runs to go)", flush=True)
        return None if run.evaluation() else f"{run.folder.name} did not finish ({last_line}); see {output}"

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return [error for error in pool.map(train, waiting) if error]
        finally:  # if interrupted, each run finishes its step and saves
            for process in processes:
                process.terminate()


# -------------------------------------------------------------------------------------------------------------- results


@torch.no_grad()
def causal_losses(run: Run, device: torch.device, rows=128, first=32, others=8) -> dict[str, float]:
    """Bits per byte of a "sequence" model in each domain when its router cannot read later tokens, as in generation.

    In at most `rows` rows, the `first` tokens and about `others` later ones, which stand for the rest, are predicted
    from the tokens before them alone. The mean difference to their loss in the whole row is added to the run's score.
    """
    T, bits = run.settings.block_size, {}
    cfg = dataclasses.replace(run.settings, eval_tokens=min(run.settings.eval_tokens, rows * T))
    model, (_, corpus) = from_pretrained(run.folder).to(device), open_corpora(cfg)
    autocast, stride = pick_autocast(cfg.dtype, device), max(1, (T - first) // others)
    for domain, val in run.evaluation()["val"].items():
        difference, count = 0.0, 0
        for i, (tokens, targets, doc_ids) in enumerate(val_batches(corpus, domain, cfg, Ranks(str(device)))):
            chosen = [t for t in range(T) if t < first or (t - first - i) % stride == 0]
            targets = targets[:, chosen]
            weights = torch.tensor([1 if t < first else stride for t in chosen], device=device) * (targets >= 0)
            with autocast:
                prefixes = [model(tokens[:, : t + 1], doc_ids=doc_ids[:, : t + 1])[:, -1] for t in chosen]
                causal, noncausal = torch.stack(prefixes, 1), model(tokens, doc_ids=doc_ids)[:, chosen]
            losses = noncausal.float().log_softmax(-1) - causal.float().log_softmax(-1)  # for every possible target
            losses = losses.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
            difference += (weights * losses).sum().item()
            count += weights.sum().item()
        bits[domain] = corpus.bits_per_byte(domain, val["loss"] + difference / count)
    return bits


def routing_by_domain(run: Run, device: torch.device, n_rows=32) -> dict[str, dict]:
    """The routing measures within each domain, and on "all" of this text: n_rows of each domain, evenly spread.

    A layer can depend on the input and still do the same at every token of a domain.
    """
    model, (_, corpus), rows = from_pretrained(run.folder).to(device), open_corpora(run.settings), {}
    for domain in corpus.domains:
        indices = corpus.spread_rows(domain, n_rows * run.settings.block_size)
        rows[domain] = np.stack([corpus.row(domain, index) for index in indices])
    rows["all"] = np.concatenate(list(rows.values()))
    found = {}
    for name in rows:
        tokens, targets, doc_ids = to_inputs(rows[name], device)
        found[name] = routing_stats(model, tokens, doc_ids, corpus.is_text(tokens, targets))
    return found


def stored(path: Path, compute: Callable[[], dict]) -> dict:
    """The contents of this file. If it is missing, computes and writes them."""
    if not path.exists():
        write_json(path, compute())
    return json.loads(path.read_text())


def collect_results(runs: list[Run], device: torch.device) -> list[dict]:
    """The measurements of every finished run, and of each "sequence" run once more with its causal score."""
    results = []
    for run in filter(Run.evaluation, runs):
        scores = {run.group: {domain: val["bits_per_byte"] for domain, val in run.evaluation()["val"].items()}}
        if run.settings.sees_future:
            causal = functools.partial(causal_losses, run, device)  # takes minutes
            scores[f"{run.group}, causal"] = stored(run.folder / "causal.json", causal)
        by_domain = {}
        if run.evaluation()["routing"]:
            by_domain = stored(run.folder / "domains.json", functools.partial(routing_by_domain, run, device))
        results += [{
            "group": group, "seed": run.settings.seed, "command": f"python train.py {shlex.join(run.arguments)}",
            "parameters": run.n_parameters(), "tokens": run.points()[-1]["tokens"],
            "activations": run.settings.activations, "causal": not run.settings.sees_future or group != run.group,
            "bits_per_byte": {**bits, "mean": statistics.fmean(bits.values())},  # variants are judged by the mean
            "routing": run.evaluation()["routing"] if group == run.group else {},
            "routing_by_domain": by_domain if group == run.group else {},
            "points": run.points() if group == run.group else [],
        } for group, bits in scores.items()]  # fmt: skip
    return results


def shared_settings(runs: list[Run]) -> dict:
    """The settings of train.py that all runs have in common."""
    first = dataclasses.asdict(runs[0].settings)
    return {name: x for name, x in first.items() if all(getattr(run.settings, name) == x for run in runs)}


def speeds(runs: list[Run]) -> dict[str, float]:
    """Tokens per second of each group of runs: the 90th percentile of their logs, since other work may slow them."""
    rates = {}
    for run in filter(Run.evaluation, runs):
        rates.setdefault(run.group, []).extend(x["tokens_per_second"] for x in read_log(run.folder) if "loss" in x)
    return {group: round(np.quantile(x, 0.9)) for group, x in rates.items()}


def holm(p: list[float]) -> list[float]:
    """p adjusted for the number of tests (Holm, 1979): the smallest times n, the next times n - 1, never falling."""
    adjusted, order = np.empty(len(p)), np.argsort(p)
    adjusted[order] = np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)).clip(max=1.0)
    return adjusted.tolist()


def estimate(values: list[float]) -> dict:
    """Mean of independent values, its 95% t-interval and the two-sided p of a mean of 0; None for a single value."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return {"mean": mean, "interval": None, "p": None}
    t = stats.t(n - 1, mean, max(statistics.stdev(values) / np.sqrt(n), 1e-300))  # never a division by zero
    return {"mean": mean, "interval": list(t.interval(0.95)), "p": 2 * min(t.cdf(0), t.sf(0))}


def correct(differences: list[dict]):
    """Correct the p of these differences, where there is one, for the number of them."""
    tested = [x for x in differences if x["p"] is not None]
    for x, p in zip(tested, holm([x["p"] for x in tested])):
        x |= {"p_holm": p, "survives": p < 0.05}


def summarize(results: list[dict]) -> dict:
    """The means of each group of runs, and differences of groups in mean bits per byte, paired by seed.

    "comparisons": each baseline with all other groups (its run at equal time: with all routed variants), p corrected
    for their number. "contrasts": single pairs, not corrected. Groups that share no seed are not compared.
    """
    groups, rows = {}, {}
    for run in results:
        groups.setdefault(run["group"], {})[run["seed"]] = run
        rows[run["group"]] = {key: run[key] for key in ("group", "activations", "causal")}
    for row, runs in zip(rows.values(), groups.values()):
        bits, routing = ([run[name] for run in runs.values()] for name in ("bits_per_byte", "routing"))
        row["seeds"] = list(runs)
        row["bits_per_byte"] = {domain: statistics.fmean(b[domain] for b in bits) for domain in bits[0]}
        if routing[0]:
            row["routing"] = {name: estimate([statistics.fmean(r[name]) for r in routing]) for name in MEASURES}
            row["usage"] = np.mean([r["usage"] for r in routing], axis=0).tolist()  # [n_layer, K]

    def compare(pairs: list[tuple[str, str]]):
        for ours, theirs in pairs:
            a, b = groups.get(ours, {}), groups.get(theirs, {})
            if seeds := [seed for seed in a if seed in b]:
                pairs = [(a[seed]["bits_per_byte"], b[seed]["bits_per_byte"]) for seed in seeds]
                values = {domain: [x[domain] - y[domain] for x, y in pairs] for domain in pairs[0][0]}
                found = {"ours": ours, "theirs": theirs, "seeds": seeds, **estimate(values["mean"])}
                yield found | {"by_seed": values.pop("mean"), "domains": {d: estimate(x) for d, x in values.items()}}

    compared = [name for name in groups if ", lr" not in name]
    routed = [name for name in compared if len(rows[name]["activations"]) > 1]
    comparisons = {}
    for baseline in (name for name in compared if name.split(",")[0] in BASELINES):
        others = [name for name in (compared if baseline in BASELINES else routed) if name != baseline]
        comparisons[baseline] = sorted(compare([(name, baseline) for name in others]), key=lambda x: x["mean"])
        correct([x for x in comparisons[baseline] if "equal time" not in x["ours"]])
    contrasts = list(compare([*CONTRASTS, *((name, name.split(",")[0]) for name in groups if ", lr" in name)]))
    summary = {"summary": list(rows.values()), "comparisons": comparisons, "contrasts": contrasts}
    return summary | {"growth": growth(results)}


def growth(results: list[dict]) -> dict:
    """By baseline and group, at each point of the runs: the difference, paired by seed, and what the routing does."""
    groups = {}
    for run in results:
        if len(run.get("points", ())) > 1 and "," not in run["group"]:
            groups.setdefault(run["group"], {})[run["seed"]] = run["points"]
    found = {}
    for theirs, ours in itertools.product(BASELINES, groups):
        seeds = [seed for seed in groups[ours] if seed in groups.get(theirs, {})]
        pairs = [list(zip(groups[ours][seed], groups[theirs][seed])) for seed in seeds if ours != theirs]
        found.setdefault(theirs, {})[ours] = [
            {"tokens": points[0][0]["tokens"], **estimate([a["mean"] - b["mean"] for a, b in points])}
            | {name: estimate([a[name] for a, _ in points]) for name in GROWING if name in points[0][0]}
            for points in zip(*pairs)
        ]
    return {name: {group: points for group, points in x.items() if points} for name, x in found.items()}


def with_interval(x: dict, form: str) -> str:
    return format(x["mean"], form) + (" [{:{f}}, {:{f}}]".format(*x["interval"], f=form) if x["interval"] else "")


def size_and_tokens(report: dict) -> tuple[int, int]:
    """Parameters of a study's largest variant, and the training tokens of its runs at equal steps."""
    runs = [run for run in report["runs"] if "," not in run["group"]]
    return max(run["parameters"] for run in runs), max(run["tokens"] for run in runs)


def describe(name: str, report: dict) -> str:
    parameters, tokens = size_and_tokens(report)
    return f"{name}: {parameters / 1e6:.1f}M parameters, {tokens / 1e6:.1f}M tokens"


def print_differences(title: str, differences: list[dict]):
    print_table(title, [{
        "": f"{x['ours']} - {x['theirs']}",
        "pairs": len(x["seeds"]),
        "difference [95% interval]": with_interval(x, "+.4f"),
        "p": "-" if x["p"] is None else f"{x['p']:.2g}",
        "p, Holm": f"{x['p_holm']:.2g}" if "p_holm" in x else "-",
        "survives": {True: "yes", False: "no", None: "-"}[x.get("survives")],
    } for x in differences])  # fmt: skip


def print_report(report: dict):
    """Print the tables of docs/study.md."""
    scores, measures, usage = [], [], []
    for row in sorted(report["summary"], key=lambda row: row["bits_per_byte"]["mean"]):
        bits = {domain: f"{x:.4f}" for domain, x in row["bits_per_byte"].items()}
        scores.append({"": row["group"], "seeds": len(row["seeds"]), **bits})
        if "routing" in row and ", lr" not in row["group"]:
            cells = {heading: with_interval(row["routing"][name], f) for name, (heading, f) in MEASURES.items()}
            measures.append({"": row["group"], **cells})
            layers = {f"layer {i}": " / ".join(f"{x:.0%}" for x in layer) for i, layer in enumerate(row["usage"])}
            usage.append({"": row["group"], "activations": " / ".join(row["activations"]), **layers})
    print_table("Bits per byte of held-out text, mean over the seeds; mean: over the domains", scores)
    paired = "mean bits per byte, paired by seed"
    tables = {f"Compared with {name}: {paired}": x for name, x in report["comparisons"].items()}
    tables[f"Single differences of {paired}, not corrected"] = report["contrasts"]
    for title, differences in tables.items():
        print_differences(title, differences)
    for name in BASELINES:
        print_table(f"Compared with {name} by domain, not corrected, and by seed", [{
            "": f"{x['ours']} - {name}",
            **{domain: with_interval(difference, "+.4f") for domain, difference in x["domains"].items()},
            "mean of each seed": ", ".join(f"{value:+.4f}" for value in x["by_seed"]),
        } for x in report["comparisons"].get(name, ())])  # fmt: skip
    print_table("Routing at the end, mean over layers and seeds [95% interval]; entropies as shares of ln K", measures)
    print_table("Usage by layer, mean over the seeds", usage)
    print_domains(report["runs"])
    for theirs, groups in report["growth"].items():
        print_table(f"Mean bits per byte minus {theirs}'s, paired by seed [95% interval], by training tokens", [{
            "": ours, **{f"{x['tokens']:,}": with_interval(x, "+.4f") for x in points}
        } for ours, points in groups.items()])  # fmt: skip
    for name, title in GROWING.items():
        print_table(f"{title}, by training tokens, mean over the seeds", [{
            "": ours, **{f"{x['tokens']:,}": f"{x[name]['mean']:.0%}" for x in points}
        } for ours, points in report["growth"].get("swiglu", {}).items() if name in points[0]])  # fmt: skip


def print_domains(runs: list[dict]):
    """Print what the routing does within each domain, and on all of them."""
    groups, rows = {}, []
    for run in runs:
        if run.get("routing_by_domain") and "," not in run["group"]:
            groups.setdefault(run["group"], []).append(run["routing_by_domain"])
    for name, found in groups.items():
        dependence = {domain: [statistics.fmean(x[domain]["input_dependence"]) for x in found] for domain in found[0]}
        usages = [usage for x in found for domain in x if domain != "all" for usage in x[domain]["usage"]]
        collapsed = sum(max(usage) > 0.9 for usage in usages)
        rows.append({
            "": name,
            **{domain: with_interval(estimate(values), ".3f") for domain, values in dependence.items()},
            "layers with over 90% in one activation within a domain": f"{collapsed} of {len(usages)}",
        })  # fmt: skip
    print_table("Input dependence within a domain and on all, nats, mean over layers and seeds [95% interval]", rows)


def print_ends(studies: dict[str, dict]):
    """Print the differences at the end of each study side by side, of the variants that several studies have."""
    headings = {name: describe(name, report) for name, report in studies.items()}
    for theirs in BASELINES:
        rows = {}  # by variant, the cells of the studies that have it
        for name, report in studies.items():
            for x in report["comparisons"].get(theirs, ()):
                if "," not in x["ours"]:
                    rows.setdefault(x["ours"], {})[headings[name]] = with_interval(x, "+.4f")
        print_table(f"Mean bits per byte minus {theirs}'s at the end of each study [95% interval, not corrected]", [
            {"": ours, **{heading: cells.get(heading, "-") for heading in headings.values()}}
            for ours, cells in rows.items() if len(cells) > 1
        ])  # fmt: skip


def print_changes(studies: dict[str, dict]):
    """Print how the differences change between two studies that differ in their tokens or in their size alone."""
    for (name, report), (other, other_report) in itertools.combinations(studies.items(), 2):
        if sum(a != b for a, b in zip(size_and_tokens(report), size_and_tokens(other_report))) != 1:
            continue
        changes = []
        for theirs in BASELINES:
            before, after = (
                {x["ours"]: dict(zip(x["seeds"], x["by_seed"])) for x in x["comparisons"].get(theirs, ())}
                for x in (report, other_report)
            )
            for ours in before:
                seeds = [seed for seed in before[ours] if seed in after.get(ours, {})]
                if seeds and "," not in ours and ours != "swiglu":  # which is geglu - swiglu once more
                    change = estimate([after[ours][seed] - before[ours][seed] for seed in seeds])
                    changes.append({"ours": ours, "theirs": theirs, "seeds": seeds, **change})
        correct(changes)
        print_differences(f"Change of the difference in mean bits per byte from {name} to {other}", changes)


def draw_usage(ax, variant: str, runs: list[dict]):
    """Usage of the activations by layer, one bar per seed."""
    usage = np.array([run["routing"]["usage"] for run in runs])  # [seeds, n_layer, K]
    S, L, K = usage.shape
    x = np.arange(L) + 0.85 * ((np.arange(S)[:, None] + 0.5) / S - 0.5)  # [seeds, n_layer]
    for k, name in enumerate(runs[0]["activations"]):
        bottom = usage[..., :k].sum(-1).ravel()
        ax.bar(x.ravel(), usage[..., k].ravel(), 0.8 / S, bottom=bottom, color=f"C{k}", label=name)
    dependence = np.mean([run["routing"]["input_dependence"] for run in runs])
    ax.set(xlabel=f"layer, one bar per seed\n(input dependence {dependence:.2f} of {np.log(K):.2f} nats)")
    title = f"In {variant}, on average {usage.max(-1).mean():.0%} of a\nlayer's weight goes to its favourite"
    ax.set(ylabel="usage", ylim=(0, 1), xticks=range(L), title=title)


@matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10})  # GitHub shows 100 pixels an inch
def draw_report(path: Path, report: dict):
    """Draw the differences to SwiGLU, at most ten, and below them the usage by layer without and with centring."""
    groups = {name: [run for run in report["runs"] if run["group"] == name] for name in MAIN}
    figure = matplotlib.figure.Figure(figsize=(7, 6.5), dpi=200, layout="constrained")
    axes = figure.subplot_mosaic([["differences"] * 2, ["prefix", "centred"]], height_ratios=(3, 2))
    ax, rows = axes["differences"], sorted(report["summary"], key=lambda row: "equal time" not in row["group"])
    to_swiglu = {x["ours"]: x for x in report["comparisons"]["swiglu"]}
    names = [row["group"] for row in rows if row["group"] in to_swiglu][9::-1]
    means = np.array([to_swiglu[name]["mean"] for name in names])
    intervals = np.array([to_swiglu[name]["interval"] or 2 * [to_swiglu[name]["mean"]] for name in names])
    ax.errorbar(means, names, xerr=abs(intervals.T - means), fmt="ko", markersize=4, capsize=2)
    x_geglu = to_swiglu["geglu"]["mean"]
    for name, x, style in (("SwiGLU", 0.0, "-"), ("GEGLU", x_geglu, "--")):
        ax.axvline(x, color="gray", linestyle=style, linewidth=1)
        ax.text(x, len(names) - 0.4, f" {name} ", color="gray", ha="left" if x == max(0.0, x_geglu) else "right")
    routed = {row["group"] for row in rows if row["causal"] and "usage" in row and "," not in row["group"]}
    better = [x for name in BASELINES for x in report["comparisons"][name] if x["mean"] < 0 and x.get("survives")]
    swiglu, geglu = (sum(x["theirs"] == name and x["ours"] in routed for x in better) or "none" for name in BASELINES)
    found = f"{swiglu} significantly beat SwiGLU\nand {geglu} beat GEGLU"
    label = "bits per byte minus SwiGLU's, with the 95% interval of this difference (lower is better)"
    ax.set(xlabel=label, title=f"Of {len(routed)} causal routed variants, {found} (equal steps, Holm)")
    ax.set(xmargin=0.12, ylim=(-0.6, len(names) + 0.4))
    for variant in ("prefix", "centred"):
        draw_usage(axes[variant], variant, groups[variant])
    figure.legend(*axes[variant].get_legend_handles_labels(), loc="outside lower center", ncols=9, frameon=False)
    figure.savefig(path)
    print(f"\nfigure: {path}")


def draw_growth(path: Path, studies: dict[str, dict]):
    """Draw by training tokens, a column for each study: differences from the baselines, and what the routing does."""
    figure = matplotlib.figure.Figure(figsize=(7, 8), dpi=200, layout="constrained")
    axes = figure.subplots(3, len(studies), sharex="col", sharey="row", squeeze=False)
    variants = list(dict.fromkeys(run["group"] for report in studies.values() for run in report["runs"]))
    legend = {}
    for column, (name, report) in zip(axes.T, studies.items()):
        for ax, theirs in zip(column, BASELINES):
            ax.axhline(0, color="gray", linewidth=1)
            for i, (group, points) in enumerate(report["growth"][theirs].items()):
                style = {"color": f"C{variants.index(group)}", "marker": "o", "markersize": 3, "linewidth": 1}
                tokens, means = np.array([[x["tokens"] / 1e6, x["mean"]] for x in points]).T
                shift = (i - 1.5) * tokens[-1] / 80  # or the intervals would hide each other
                errors = abs(np.array([x["interval"] or 2 * [x["mean"]] for x in points]).T - means)
                legend[group] = ax.errorbar(tokens + shift, means, yerr=errors, capsize=2, label=group, **style)
                if theirs == "swiglu" and "collapsed" in points[0]:
                    column[2].plot(tokens, [x["collapsed"]["mean"] for x in points], **style)
                    dependence = [x["input_dependence"]["mean"] for x in points]
                    column[2].plot(tokens, dependence, linestyle="--", **style)
        parameters, _ = size_and_tokens(report)
        column[0].set(title=f"{name}: {parameters / 1e6:.1f}M parameters,\n{report['settings']['seeds']} seeds")
        column[2].set(xlabel="training tokens, millions", ylim=(0, 1))
    for ax, name in zip(axes[:, 0], ("SwiGLU", "GEGLU")):
        ax.set(ylabel=f"bits per byte minus {name}'s,\n95% interval (lower is better)")
    label = "solid: share of layers with over 90%\nin one activation; dashed: input\ndependence, as a share of ln K"
    axes[2, 0].set(ylabel=label)
    figure.legend(handles=list(legend.values()), loc="outside lower center", ncols=9, frameon=False)
    figure.savefig(path)
    print(f"\nfigure: {path}")


def report_studies(file: Path, studies: dict[str, dict]):
    """Print the tables of these studies and draw their figures beside the file."""
    for name, report in studies.items():
        print(f"\n{name}: {report['machine']}")
        print_report(report)
        if {run["group"] for run in report["runs"]} >= set(MAIN):
            draw_report(file.with_suffix(".png"), report)
    if len(studies) > 1:
        print_ends(studies)
        print_changes(studies)
    if growing := {name: report for name, report in studies.items() if report["growth"].get("swiglu")}:
        draw_growth(file.with_name(f"{file.stem}_growth.png"), growing)


def run_study(cfg: StudyConfig) -> tuple[dict, list[str]]:
    """Train what is missing: the report of all finished runs, and what went wrong."""
    device, runs = pick_device(cfg.device), plan_runs(cfg)
    default_jobs = os.cpu_count() if device.type == "cpu" else 1
    jobs = default_jobs if cfg.jobs is None else cfg.jobs
    corpus, _ = open_corpora(runs[0].settings)  # fail now if the corpus is missing, not once per run
    prepare_cpu()
    os.environ["OMP_NUM_THREADS"] = "1"  # of a run: its results do not depend on the number of cores
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    errors = train_runs(runs, jobs) if jobs else []
    results = collect_results(runs, device)
    if not results:
        raise settings.UserError(errors[0] if errors else f"no run in {cfg.out_dir} is finished")
    report = {"machine": f"{describe_machine(device)}; one thread per run", "settings": dataclasses.asdict(cfg)}
    report |= {"shared": shared_settings(runs), "corpus": corpus.domains, "tokens_per_second": speeds(runs)}
    return {**report, "runs": results}, errors


def main():
    cfg, errors = settings.load(StudyConfig), []
    is_there = len(cfg.report) == 1
    file = Path(cfg.report[0]) if is_there else Path(cfg.out_dir) / "study.json"
    if cfg.report:
        studies = {name: report for path in cfg.report for name, report in read_json(Path(path)).items()}
    else:
        report, errors = run_study(cfg)
        studies = {cfg.name: report}
    if not is_there:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, studies)
    report_studies(file, {name: report | summarize(report["runs"]) for name, report in studies.items()})
    if errors:
        raise settings.UserError(f"{len(errors)} runs failed: {errors[0]}")


if __name__ == "__main__":
    settings.run(main)
