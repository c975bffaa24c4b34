"""The study: what routing is worth.

python -m extras.study                             train every variant in config/study/ with a few seeds (hours)
python -m extras.study --variants=swiglu,prefix    train some of them; a new file in config/study/ is a new variant
python -m extras.study --help                      list the settings

Runs that share a seed see the same data in the same order and start from identical weights, except the routing
parameters. Each run is trained once: the same command continues where it was stopped. The run folders, study.json and
study.png are written to out_dir.
"""

import dataclasses
import functools
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import config
import train
from eval import print_table
from extras.bench import describe_machine, load_settings
from extras.weights import from_pretrained
from model import ModelConfig, PolychromaticLM
from prepare_data import write_json
from sft import Conversations, SFTConfig

REPOSITORY = Path(__file__).parent.parent
VARIANTS = Path("config/study")  # one override file per variant
BASELINE, ROUTED = "swiglu", "prefix"  # what the others are compared with; PolyGLU as model.py defines it
LR_FACTORS = (0.5, 2.0)  # both are also trained at these multiples of the learning rate
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5% quantile, 1 to 9 degrees of freedom
MEASURES = {  # of the routing: heading and format
    "static_entropy_share": ("static entropy", ".3%"),
    "dynamic_entropy_share": ("dynamic entropy", ".2%"),
    "input_dependence": ("input dependence, nats", ".4f"),
    "agreement": ("agreement", ".2%"),
}
MeanAndError = tuple[float, float | None]  # a mean over runs and its standard error; None for a single run


@dataclass
class StudyConfig:
    """Settings of a study."""

    base: str = "config/tiny.py"  # override file that all variants share
    variants: tuple[str, ...] = ()  # names of files in config/study/; empty: all of them
    seeds: int = 3  # runs of each variant, with the seeds 1, 2, ...
    max_steps: int = 500  # optimizer steps of a run
    eval_tokens: int = 131_072  # evaluate on at most this many tokens of each domain's val.bin
    check_lr: int = 1  # seeds with which swiglu and prefix also train at half and at twice the learning rate
    sft: str | None = "config/tiny_sft.py"  # override file for fine-tuning the prefix runs; None: no fine-tuning
    sft_steps: int = 400  # optimizer steps of the fine-tuning
    out_dir: str = "out/study"  # where the runs, study.json and study.png go
    jobs: int | None = None  # runs at a time; None: one per CPU core, on a GPU one
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device

    def __post_init__(self):
        config.check_range(self, 1, len(T95) + 1, "seeds")
        config.check_range(self, 0, self.seeds, "check_lr")
        config.check_range(self, 1, 10**8, "max_steps", "sft_steps", "eval_tokens")
        if self.jobs is not None:
            config.check_range(self, 1, 1024, "jobs")
        known = sorted(path.stem for path in VARIANTS.glob("*.py"))
        if not known:
            raise ValueError(f"there is no {VARIANTS}/ here; run from the repository root")
        self.variants = tuple(dict.fromkeys(self.variants)) or tuple(known)
        for name in self.variants:
            if name not in known:
                raise ValueError(f"there is no {VARIANTS / name}.py; there are {', '.join(known)}")


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(eq=False)
class Run:
    """One training run of a study."""

    name: str  # of its folder
    kind: str  # "variant", "lr x 0.5", "lr x 2" or "sft"
    variant: str
    seed: int
    arguments: list[str]  # of train.py, or of sft.py
    folder: Path

    @property
    def script(self) -> str:
        return "sft.py" if self.kind == "sft" else "train.py"

    @functools.cached_property
    def settings(self) -> train.TrainConfig:
        return load_settings(SFTConfig if self.kind == "sft" else train.TrainConfig, self.arguments)

    def started(self) -> bool:
        return (self.folder / "ckpt.pt").exists()

    def evaluations(self) -> list[dict]:
        """The evaluations in its log, from step 0 to the last step; none if the run is not finished."""
        found = [line for line in train.read_log(self.folder) if "val" in line]
        return found if found and (found[0]["step"], found[-1]["step"]) == (0, self.settings.max_steps) else []


def plan_runs(cfg: StudyConfig) -> list[Run]:
    """All runs of the study: every variant with every seed, the checks of the learning rate, then the fine-tuning."""

    def plan(variant: str, seed: int, kind: str, *arguments: str) -> Run:
        name = f"{variant}-{seed}" if kind == "variant" else f"{variant}-{kind.replace(' x ', '_')}-{seed}"
        folder, steps = Path(cfg.out_dir) / name, cfg.sft_steps if kind == "sft" else cfg.max_steps
        arguments = [
            *arguments, f"--seed={seed}", f"--max_steps={steps}", f"--eval_interval={steps}",
            f"--eval_tokens={cfg.eval_tokens}", f"--out_dir={folder}", f"--device={cfg.device}",
        ]  # fmt: skip
        return Run(name, kind, variant, seed, arguments, folder)

    seeds, files = range(1, cfg.seeds + 1), {name: (cfg.base, f"{VARIANTS / name}.py") for name in cfg.variants}
    runs = [plan(variant, seed, "variant", *files[variant]) for seed in seeds for variant in cfg.variants]
    lr = {run.variant: run.settings.lr for run in runs if run.variant in (BASELINE, ROUTED)}
    for seed, variant, factor in itertools.product(range(1, cfg.check_lr + 1), lr, LR_FACTORS):
        runs.append(plan(variant, seed, f"lr x {factor:g}", *files[variant], f"--lr={factor * lr[variant]!r}"))
    if cfg.sft and ROUTED in cfg.variants:
        runs += [plan(ROUTED, n, "sft", cfg.sft, f"--init_from={Path(cfg.out_dir) / ROUTED}-{n}") for n in seeds]
    return runs


def check_runs(runs: list[Run]):
    """Find errors before the first run, not after hours. Raises ValueError."""
    first = runs[0].settings
    for run in runs:
        if run.kind == "sft":
            Conversations(dataclasses.replace(run.settings, **dataclasses.asdict(first.model_config())))
            continue
        train.Corpus(run.settings)
        if set(run.settings.mixture) != set(first.mixture):
            domains = ", ".join(run.settings.mixture)
            raise ValueError(f"{run.name} has the domains {domains}, {runs[0].name} has {', '.join(first.mixture)}")
        with torch.device("meta"):  # shapes without storage
            train.freeze(PolychromaticLM(run.settings.model_config()), run.settings.frozen)


def is_finished(run: Run) -> bool:
    """Whether the run's folder holds the finished run. Raises ValueError if it holds a run with other settings."""
    if not run.started():
        return False
    try:
        checkpoint = train.load_checkpoint(run.folder)
        saved, step = checkpoint["settings"], checkpoint["step"]
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{e}; remove {run.folder} to train it again") from None
    ignored = {"resume", "overwrite", "out_dir", "init_from", "device"}
    if run.kind == "sft":
        ignored |= {field.name for field in dataclasses.fields(ModelConfig)}  # they come from the model it starts from
    for name, value in dataclasses.asdict(run.settings).items():
        if name not in ignored and saved.get(name, value) != value:
            raise ValueError(
                f"{run.folder} was trained with {name}={saved[name]!r}, not {value!r}; remove it, or choose another "
                "--out_dir"
            )
    if step == run.settings.max_steps and not run.evaluations():
        raise ValueError(f"{run.folder / 'log.jsonl'} lacks evaluations; remove {run.folder} to train it again")
    return bool(run.evaluations())


def train_runs(runs: list[Run], jobs: int, on_cpu: bool) -> list[str]:
    """Train the runs that are not finished, `jobs` at a time, and report each. Returns the errors of those that failed.

    On a CPU each run gets one thread, so that its results do not depend on the number of cores.
    """
    finished = {run.name for run in runs if is_finished(run)}
    for run in runs:
        if run.kind == "sft" and run.started() and f"{run.variant}-{run.seed}" not in finished:
            raise ValueError(f"{run.folder} was fine-tuned from an earlier {run.variant}-{run.seed}; remove it")
    print(f"{len(runs)} runs, {len(finished)} of them done before; {jobs} at a time", flush=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if on_cpu else {})}
    waiting = [run for run in runs if run.name not in finished]
    stages = [[run for run in waiting if run.script == script] for script in ("train.py", "sft.py")]
    ended = itertools.chain.from_iterable(train_in_parallel(stage, jobs, environment) for stage in stages)
    errors = []
    for i, (run, returncode, seconds) in enumerate(ended, 1):
        evaluations = run.evaluations()
        if returncode == 0 and evaluations:
            bits = [f"{domain} {val['bits_per_byte']:.3f}" for domain, val in evaluations[-1]["val"].items()]
            outcome = f"{'  '.join(bits)} bits per byte"
        else:
            output = run.folder / "output.txt"
            reason = (output.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            outcome = f"{run.name} did not finish ({reason}); see {output}"
            errors.append(outcome)
        print(f"[{i}/{len(waiting)}] {run.name}: {outcome}, {seconds:.0f} s", flush=True)
    return errors


def train_in_parallel(runs: list[Run], jobs: int, environment: dict) -> Iterator[tuple[Run, int, float]]:
    """Train each run in a process of its own. Yields the run, its exit status and its seconds when it ends."""
    waiting, running = list(runs), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = start_training(run, environment), time.monotonic()
            time.sleep(0.1)
            for run, (process, start) in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    yield run, process.returncode, time.monotonic() - start
    finally:  # if interrupted, each run finishes its step and saves
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def start_training(run: Run, environment: dict) -> subprocess.Popen:
    """Start or resume a run. Its output goes to output.txt in its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / run.script), *run.arguments, *["--resume"] * run.started()]
    with open(run.folder / "output.txt", "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


# -------------------------------------------------------------------------------------------------------------- results


@torch.no_grad()
def causal_losses(
    run: Run, device: torch.device, rows: int = 128, first: int = 32, others: int = 8
) -> dict[str, float]:
    """Bits per byte of a "sequence" model in each domain when its router cannot read later tokens, as in generation.

    Each token is then predicted by its own forward pass on the tokens before it. To save time this is done in at most
    `rows` rows, for the `first` tokens, where most of the difference is, and about `others` evenly spaced later ones,
    different in every batch. The mean difference to the loss with the whole row, each token weighted by how many it
    stands for, is added to the run's score.
    """
    cfg = run.settings
    model = from_pretrained(run.folder).to(device).eval()
    corpus = train.Corpus(dataclasses.replace(cfg, eval_tokens=min(cfg.eval_tokens, rows * cfg.block_size)))
    dtype = train.pick_dtype(cfg.dtype, device)
    first, losses = min(first, cfg.block_size), {}
    stride = max(1, (cfg.block_size - first) // others)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for domain in cfg.mixture:
            difference, count = 0.0, 0
            for i, (tokens, targets, doc_ids) in enumerate(corpus.val_batches(domain, train.Ranks(str(device)))):
                noncausal = model(tokens, doc_ids=doc_ids)
                for t in [*range(first), *range(first + i % stride, cfg.block_size, stride)]:
                    weight = 1 if t < first else stride
                    causal = model(tokens[:, : t + 1], doc_ids=doc_ids[:, : t + 1])[:, -1]
                    loss = functools.partial(F.cross_entropy, target=targets[:, t], ignore_index=-1, reduction="sum")
                    difference += weight * (loss(causal.float()) - loss(noncausal[:, t].float())).item()
                    count += weight * (targets[:, t] >= 0).sum().item()
            nats = run.evaluations()[-1]["val"][domain]["loss"] + difference / count
            losses[domain] = corpus.bits_per_byte(domain, nats)
    return losses


def with_mean(bits_per_byte: dict[str, float]) -> dict[str, float]:
    """With the mean over the domains."""
    return {**bits_per_byte, "mean": statistics.fmean(bits_per_byte.values())}


def collect_results(runs: list[Run], device: torch.device) -> list[dict]:
    """The measurements of every finished run: {"name", "kind", "variant", "seed", "bits_per_byte", "routing", ...}."""
    results = []
    for run in runs:
        if not (evaluations := run.evaluations()):
            continue
        speeds = [line["tokens_per_second"] for line in train.read_log(run.folder) if "tokens_per_second" in line]
        checkpoint = train.load_checkpoint(run.folder)
        result = {
            **{key: getattr(run, key) for key in ("name", "kind", "variant", "seed")},
            "command": shlex.join(["python", run.script, *run.arguments]),
            "parameters": sum(w.numel() for name, w in checkpoint["model"].items() if not name.endswith("tau")),
            "activations": checkpoint["model_config"]["activations"],
            "tokens_per_second": statistics.median(speeds),
            "bits_per_byte": with_mean({d: val["bits_per_byte"] for d, val in evaluations[-1]["val"].items()}),
            "routing": evaluations[-1]["routing"],
            "routing_before": evaluations[0]["routing"],
        }
        results.append(result)
        if run.kind == "variant" and run.settings.sees_future:
            path = run.folder / "causal.json"  # takes minutes to compute
            if not path.exists():
                write_json(path, causal_losses(run, device))
            names = {key: f"{result[key]}, causal" for key in ("name", "variant")}
            bits = with_mean(json.loads(path.read_text()))
            results.append({**result, **names, "bits_per_byte": bits, "routing": {}})
    return results


def means_and_errors(samples: Iterable[dict[str, float]]) -> dict[str, MeanAndError]:
    """Mean and standard error over the samples, for each key."""
    samples, result = list(samples), {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        result[key] = statistics.fmean(values), error
    return result


def mean_routing(stats: list[dict]) -> tuple[dict[str, MeanAndError], list]:
    """Of the runs' routing_stats(): each measure's mean over layers and runs, and the mean usage [n_layer, K]."""
    measures = means_and_errors({name: np.mean(s[name]) for name in MEASURES} for s in stats)
    return measures, np.mean([s["usage"] for s in stats], axis=0).tolist()


def summarize(results: list[dict]) -> list[dict]:
    """One row per kind and variant: bits per byte, and their difference to the baseline of the same seed."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["kind"], result["variant"]), []).append(result)
    groups.pop(("sft", ROUTED), None)  # another corpus
    baseline = {result["seed"]: result["bits_per_byte"] for result in groups.get(("variant", BASELINE), [])}
    rows = []
    for (kind, variant), group in groups.items():
        pairs = [(run["bits_per_byte"], baseline[run["seed"]]) for run in group if run["seed"] in baseline]
        row = {
            "kind": kind,
            "variant": variant,
            "parameters": group[0]["parameters"],
            "runs": len(group),
            "tokens_per_second": statistics.median(run["tokens_per_second"] for run in group),
            "bits_per_byte": means_and_errors(run["bits_per_byte"] for run in group),
            "pairs": len(pairs),
        }
        if pairs:
            row["difference"] = means_and_errors({d: ours[d] - theirs[d] for d in ours} for ours, theirs in pairs)
        if group[0]["routing"]:
            row["routing"], row["usage"] = mean_routing([run["routing"] for run in group])
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------- tables and picture


def label(row: dict) -> str:
    """The name of a row of the summary."""
    return row["variant"] if row["kind"] == "variant" else f"{row['variant']}, {row['kind']}"


def with_error(value: MeanAndError, form: str) -> str:
    """mean ± standard error."""
    mean, error = value
    return format(mean, form) + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def interval(row: dict, domain: str) -> float:
    """Half the width of the 95% interval of a row's difference to the baseline; 0 if there is only one pair."""
    return T95[row["pairs"] - 2] * row["difference"][domain][1] if row["pairs"] > 1 else 0.0


def routing_row(name: str, measures: dict[str, MeanAndError], usage: list) -> list[str]:
    figures = (with_error(measures[key], form) for key, (_, form) in MEASURES.items())
    return [name, *figures, " / ".join(f"{share:.1%}" for share in np.mean(usage, axis=0))]


def print_losses(rows: list[dict], seeds: int):
    domains = list(rows[0]["bits_per_byte"])
    table = [["variant", "seeds", *domains, f"mean - {BASELINE}", "parameters", "tokens/s"]]
    for row in sorted(rows, key=lambda row: row["bits_per_byte"]["mean"][0]):
        bits = (with_error(row["bits_per_byte"][domain], ".4f") for domain in domains)
        compared = "difference" in row and label(row) != BASELINE
        difference = with_error(row["difference"]["mean"], "+.4f") if compared else "-"
        figures = str(row["runs"]), *bits, difference, f"{row['parameters']:,}", f"{row['tokens_per_second']:,.0f}"
        table.append([label(row), *figures])
    note = f" (95% interval: ± {T95[seeds - 2]} standard errors)" if seeds > 1 else ""
    print(f"\nBits per byte of held-out text: mean ± standard error over the seeds{note}.")
    print("mean: over the domains. tokens/s: while other runs share the machine.")
    print_table(table)


def print_routing(rows: list[dict], results: list[dict]):
    routed = [row for row in rows if "routing" in row]
    if not routed:
        return
    runs = [result for result in results if result["kind"] == "variant" and result["routing"]]
    names = {tuple(result["activations"]) for result in runs}
    usage = f"usage: {' / '.join(*names)}" if len(names) == 1 else "usage, in the order of the activations"
    header = ["", *(heading for heading, _ in MEASURES.values()), usage]
    print("Routing at the end: mean over layers ± standard error over the seeds. Entropies as shares of ln K;")
    print("the paper measured only the static entropy.")
    print_table([header, *(routing_row(label(row), row["routing"], row["usage"]) for row in routed)])

    print("Usage by layer and run, in the same order")
    by_layer = [
        [run["name"], *(" / ".join(f"{share:.0%}" for share in layer) for layer in run["routing"]["usage"])]
        for run in runs
    ]
    print_table([["run", *(f"layer {i}" for i in range(len(by_layer[0]) - 1))], *by_layer])

    finetuned = [result for result in results if result["kind"] == "sft"]
    if finetuned:
        print(f"The {ROUTED} runs on conversations, before and after fine-tuning")
        before, after = (mean_routing([run[key] for run in finetuned]) for key in ("routing_before", "routing"))
        print_table([header, routing_row("before", *before), routing_row("after", *after)])


def draw_differences(axes, compared: list[dict]):
    """The difference of each variant to the baseline, by domain, with 95% intervals."""
    for k, domain in enumerate(compared[0]["difference"]):
        means = [row["difference"][domain][0] for row in compared]
        heights = np.arange(len(compared)) + (0.27 - 0.18 * k)
        color, errors = "k" if domain == "mean" else f"C{k + 4}", [interval(row, domain) for row in compared]
        axes.errorbar(means, heights, xerr=errors, fmt="o", color=color, markersize=4, capsize=2, label=domain)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(compared)), [row["variant"] for row in compared])
    axes.set_xlabel(f"bits per byte minus {BASELINE}'s (lower is better)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)


def draw_usage(axes, runs: list[dict]):
    """The share of each activation in every layer, one bar per run."""
    for i, run in enumerate(runs):
        usage = np.array(run["routing"]["usage"])  # [n_layer, K]
        x, width = np.arange(len(usage)) + 0.8 * (i + 0.5) / len(runs) - 0.4, 0.7 / len(runs)
        for k, name in enumerate(run["activations"]):
            bottom, legend = usage[:, :k].sum(1), name if i == 0 else None
            axes.bar(x, usage[:, k], width, bottom=bottom, color=f"C{k}", label=legend)
    axes.set(xlabel="layer (one bar per seed)", ylabel=f"usage, {ROUTED}", ylim=(0, 1), xticks=range(len(usage)))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)


def draw_study(path: Path, rows: list[dict], results: list[dict], seeds: int):
    """Differences to the baseline, and the usage of PolyGLU's activations in every layer."""
    compared = [row for row in rows if row["kind"] == "variant" and row["variant"] != BASELINE and "difference" in row]
    compared.sort(key=lambda row: row["difference"]["mean"][0], reverse=True)
    if not compared:
        return print(f"no picture: it compares variants with {BASELINE}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: pip install matplotlib")
    routed = [result for result in results if (result["kind"], result["variant"]) == ("variant", ROUTED)]
    figure = Figure(figsize=(11, 2.2 + 0.42 * len(compared)), dpi=120, layout="constrained")
    left, *right = figure.subplots(1, 2, width_ratios=(3, 2)) if routed else (figure.subplots(),)
    draw_differences(left, compared)
    if routed:
        draw_usage(*right, routed)
    figure.suptitle(f"{seeds} paired seeds, 95% intervals" if seeds > 1 else "1 seed, no intervals")
    figure.savefig(path)
    print(f"picture: {path}")


def main():
    cfg = config.load(StudyConfig)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    device, out, runs = train.pick_device(cfg.device), Path(cfg.out_dir), plan_runs(cfg)
    on_cpu = device.type == "cpu"
    out.mkdir(parents=True, exist_ok=True)
    check_runs(runs)
    train.prepare_cpu()
    with config.locked(out):
        try:
            errors = train_runs(runs, cfg.jobs or (os.cpu_count() if on_cpu else 1), on_cpu)
        except KeyboardInterrupt:
            raise ValueError("stopped; the same command continues from here") from None
        results = collect_results(runs, device)
        rows = summarize(results)
        if not rows:
            raise ValueError(errors[0])
        print_losses(rows, cfg.seeds)
        print_routing(rows, results)
        machine = describe_machine(device) + ("; one thread per run" if on_cpu else "")
        report = {"machine": machine, "settings": dataclasses.asdict(cfg), "summary": rows, "runs": results}
        write_json(out / "study.json", report)
        print(f"figures: {out / 'study.json'}")
        draw_study(out / "study.png", rows, results, cfg.seeds)
    if errors:
        raise ValueError(f"{len(errors)} of {len(runs)} runs: {errors[0]}")


if __name__ == "__main__":
    config.run(main)
