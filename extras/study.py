"""Four studies: what routing is worth, and whether that changes with training or with size.

python -m extras.study                             15 variants of config/tiny.py, 500 steps, five seeds (hours)
python -m extras.study config/study_longer.py      five variants, 4,000 steps
python -m extras.study config/study_larger.py      four variants, 6.8M parameters, 1,600 steps, three seeds; it names
                                                   the command of its control, the middle study
python -m extras.study --variants=swiglu,mine      train some variants, or a new one, by its file in config/study/
python -m extras.study --jobs=0                    report the runs that are finished, without training
python -m extras.study --report=assets/study.json  print the tables and draw the figures again from the numbers alone

Runs that share a seed see the same data in the same order and start from identical weights, except the routing
parameters, so variants are compared within each seed. A finished run is kept: the same command continues the study.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common import settings
from common.data import Corpus, to_inputs
from common.routing import COLLAPSED, routing_stats
from common.run import Ranks, load_checkpoint, pick_autocast, pick_device, prepare_cpu, read_json, read_log, write_json
from common.weights import from_pretrained
from extras.bench import describe_machine
from extras.study_report import BASELINES, MAIN, report_studies, summarize
from model import PolychromaticLM
from train import TrainConfig, open_corpora, val_batches

VARIANTS = Path("config/study")  # one override file per variant
PUBLISHED = (  # in docs/study.md, the most important first
    "swiglu", "geglu", "prefix", "centred", "sequence", "token", "centred_no_noise", "no_noise", "constant_tau", "moa",
    "static", "dynamic", "centred_alpha_10", "alpha_10", "tau_half",
)  # fmt: skip
LR_CHECKED = ("swiglu", "geglu", "prefix")  # also trained at half and at twice the learning rate


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
        self.variants = tuple(dict.fromkeys(self.variants))
        if not re.fullmatch(r"[\w-]+", self.name):
            raise settings.UserError(f"the name {self.name!r} becomes part of a file's; use letters, digits, - and _")
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
        """The evaluation after the last step in its log; None if the run is not finished, or has diverged."""
        found = [line for line in self.evaluations() if line["step"] == self.settings.max_steps]
        return found[-1] if found else None

    def evaluations(self) -> list[dict]:
        """The evaluations in its log. One whose loss is not finite, null in the log, is left out."""
        found = [line for line in read_log(self.folder) if "val" in line]
        return [line for line in found if all(val["loss"] is not None for val in line["val"].values())]

    def n_parameters(self) -> int:
        with torch.device("meta"):  # no storage
            return sum(p.numel() for p in PolychromaticLM(self.settings.model_config()).parameters())

    def points(self) -> list[dict]:
        """What each evaluation after a step measured: bits per byte, and what the routing does.

        "collapsed": share of the layers that give over 90% of their weight to one activation. "input_dependence": mean
        over the layers, as a share of ln K.
        """
        points, cfg = [], self.settings
        found = {line["step"]: line for line in self.evaluations() if line["step"] > 0}
        for step, line in sorted(found.items()):
            bits = {domain: val["bits_per_byte"] for domain, val in line["val"].items()}
            point = {"tokens": step * cfg.batch_size * cfg.block_size, "tau": line["tau"], **with_mean(bits)}
            if line["routing"]:
                usage, dependence = line["routing"]["usage"], line["routing"]["input_dependence"]
                point |= {"usage": usage, "collapsed": statistics.fmean(max(layer) > COLLAPSED for layer in usage)}
                point["input_dependence"] = statistics.fmean(dependence) / np.log(len(cfg.activations))
            points.append(point)
        return points


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
        if (folder / "ckpt.pt").exists() or run.evaluation():
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


def saw_other_data(run: Run, corpus: Corpus) -> bool:
    """Whether this run was trained on this corpus when it had other domains, or other text in them."""
    if Path(run.settings.data_dir) != corpus.folder or run.settings.mixture:  # a variant with data of its own
        return False
    try:
        return load_checkpoint(run.folder, verify=False)["domains"] != corpus.domains
    except (settings.UserError, KeyError):  # no checkpoint, or a damaged one, which train.py names
        return False


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
    corpus, rows = open_corpora(dataclasses.replace(run.settings))[1], {}  # a copy, which it fills in
    model = from_pretrained(run.folder).to(device)
    for domain in corpus.domains:
        indices = corpus.spread_rows(domain, n_rows * run.settings.block_size)
        rows[domain] = np.stack([corpus.row(domain, index) for index in indices])
    rows["all"] = np.concatenate(list(rows.values()))
    found = {}
    for name in rows:
        tokens, targets, doc_ids = to_inputs(rows[name], device)
        found[name] = routing_stats(model, tokens, doc_ids, corpus.is_text(tokens, targets))
    return found


def measure_once(run: Run, name: str, measure: Callable[[Run, torch.device], dict], device: torch.device) -> dict:
    """measure(run, device), cached in eval_<name>.json; empty if there is neither that file nor a checkpoint."""
    path = run.folder / f"eval_{name}.json"  # train.py --overwrite removes it
    if not path.exists() and (run.folder / "ckpt.pt").exists():
        write_json(path, measure(run, device))
    return read_json(path) if path.exists() else {}


def collect_results(runs: list[Run], device: torch.device) -> list[dict]:
    """The measurements of every finished run, and of each "sequence" run once more with its causal score."""
    results = []
    for run in runs:
        measured, points = run.evaluation(), run.points()
        if not measured:
            if any("val" in line and line["step"] == run.settings.max_steps for line in read_log(run.folder)):
                print(f"{run.folder.name} is left out: its loss is not finite")
            continue
        by_domain = measure_once(run, "domains", routing_by_domain, device) if measured["routing"] else {}
        result = {
            "group": run.group, "seed": run.settings.seed, "command": f"python train.py {shlex.join(run.arguments)}",
            "parameters": run.n_parameters(), "tokens": points[-1]["tokens"], "activations": run.settings.activations,
            "causal": not run.settings.sees_future,
            "bits_per_byte": with_mean({domain: val["bits_per_byte"] for domain, val in measured["val"].items()}),
            "routing": measured["routing"], "routing_by_domain": by_domain, "points": points,
        }  # fmt: skip
        results.append(result)
        if run.settings.sees_future:
            bits = measure_once(run, "causal", causal_losses, device)  # takes minutes
            if not bits:
                print(f"{run.folder.name} has no causal score: its checkpoint is gone")
                continue
            score = {"group": f"{run.group}, causal", "causal": True, "bits_per_byte": with_mean(bits)}
            results.append({**result, **score, "routing": {}, "routing_by_domain": {}, "points": []})
    return results


def with_mean(bits: dict[str, float]) -> dict[str, float]:
    """Bits per byte of each domain, and their mean, by which variants are judged."""
    return {**bits, "mean": statistics.fmean(bits.values())}


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


def run_study(cfg: StudyConfig) -> tuple[dict, list[str]]:
    """Train what is missing: the report of all finished runs, and what went wrong."""
    device, runs = pick_device(cfg.device), plan_runs(cfg)
    default_jobs = os.cpu_count() if device.type == "cpu" else 1
    jobs = default_jobs if cfg.jobs is None else cfg.jobs
    # fail now if the corpus is missing, not once per run; a copy, because open_corpora() fills it in
    corpus, _ = open_corpora(dataclasses.replace(runs[0].settings))
    if others := [run.folder.name for run in runs if saw_other_data(run, corpus)]:
        found = f"{corpus.folder} has changed since these runs were trained: {', '.join(others)[:200]}"
        raise settings.UserError(f"{found}; remove them from {cfg.out_dir}, or choose another --out_dir")
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
        named = [item for path in cfg.report for item in read_json(Path(path)).items()]
        studies = dict(named)
        if len(studies) < len(named):
            found = f"two studies in {', '.join(cfg.report)} have the same name"
            raise settings.UserError(f"{found}; to give one another name, collect it again: --jobs=0 --name=")
    else:
        report, errors = run_study(cfg)
        studies = {cfg.name: report}
    for name, report in studies.items():
        if not isinstance(report, dict) or not {"machine", "settings", "runs"} <= report.keys():
            raise settings.UserError(f"{name!r} in {', '.join(cfg.report)} is not a study")
    if not is_there:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, studies)
    report_studies(file, {name: report | summarize(report["runs"]) for name, report in studies.items()})
    if errors:
        raise settings.UserError(f"{len(errors)} runs failed: {errors[0]}")


if __name__ == "__main__":
    settings.run(main)
