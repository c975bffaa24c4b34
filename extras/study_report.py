"""What the runs of extras/study.py show: differences with intervals and corrected p-values, tables, figures."""

import itertools
import statistics
from pathlib import Path

import matplotlib.figure
import numpy as np
from scipy import stats

from common.routing import COLLAPSED
from common.run import name_write_errors
from extras.bench import print_table

MAIN = ("swiglu", "geglu", "prefix", "centred")  # run before all other variants; the figure needs all four
BASELINES = MAIN[:2]  # also trained for the time that a routed variant takes
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


# ---------------------------------------------------------------------------------------------------------- differences


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
        x.update(p_holm=p, survives=p < 0.05)


def summarize(results: list[dict]) -> dict:
    """The means of each group of runs, and differences of groups in mean bits per byte, paired by seed.

    "comparisons": each baseline with all groups at the usual learning rate, and its equal-time runs with the routed
    ones. Holm's correction of p leaves out equal-time groups. "contrasts": single pairs, not corrected. Groups that
    share no seed are not compared.
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
                bits = [(a[seed]["bits_per_byte"], b[seed]["bits_per_byte"]) for seed in seeds]
                values = {domain: [x[domain] - y[domain] for x, y in bits] for domain in bits[0][0]}
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


# --------------------------------------------------------------------------------------------------------------- tables


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
    """Print the tables of a study."""
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
        collapsed = sum(max(usage) > COLLAPSED for usage in usages)
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
    """Print how the differences change between two studies of equal size or of equal tokens."""
    for (name, report), (other, other_report) in itertools.combinations(studies.items(), 2):
        if sum(a != b for a, b in zip(size_and_tokens(report), size_and_tokens(other_report))) != 1:
            continue
        changes = []
        for theirs in BASELINES:
            before, after = (
                {x["ours"]: dict(zip(x["seeds"], x["by_seed"])) for x in study["comparisons"].get(theirs, ())}
                for study in (report, other_report)
            )
            for ours in before:
                seeds = [seed for seed in before[ours] if seed in after.get(ours, {})]
                if seeds and "," not in ours and ours != "swiglu":  # which is geglu - swiglu once more
                    change = estimate([after[ours][seed] - before[ours][seed] for seed in seeds])
                    changes.append({"ours": ours, "theirs": theirs, "seeds": seeds, **change})
        correct(changes)
        print_differences(f"Change of the difference in mean bits per byte from {name} to {other}", changes)


# -------------------------------------------------------------------------------------------------------------- figures


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
    ax.set(ylabel="usage (share of weight)", ylim=(0, 1), xticks=range(L), title=title)


def has_figure(report: dict) -> bool:
    """Whether the runs are there that draw_report() shows."""
    is_compared = any(x["ours"] == "geglu" for x in report["comparisons"].get("swiglu", ()))
    return is_compared and {run["group"] for run in report["runs"]} >= set(MAIN)


@matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10})  # GitHub shows 100 pixels an inch
def draw_report(path: Path, report: dict):
    """Draw the differences from both baselines at equal steps, and the usage by layer without and with centring."""
    figure = matplotlib.figure.Figure(figsize=(7, 7.5), dpi=200, layout="constrained")
    axes = figure.subplot_mosaic([[*BASELINES], ["prefix", "centred"]], height_ratios=(3, 2))
    means = {x["ours"]: x["mean"] for x in report["comparisons"]["swiglu"] if "equal time" not in x["ours"]}
    means["swiglu"] = 0.0
    names = sorted(means, key=means.get, reverse=True)  # the best one on top
    _, tokens = size_and_tokens(report)
    for theirs, title in zip(BASELINES, ("SwiGLU", "GEGLU")):
        ax, differences = axes[theirs], [x for x in report["comparisons"][theirs] if x["ours"] in names]
        ax.axvline(0, color="gray", linewidth=1)
        ax.plot(0, names.index(theirs), "o", color="gray", markersize=4)
        for x in differences:
            left, right = x["interval"] or 2 * [x["mean"]]
            ax.plot([left, right], 2 * [names.index(x["ours"])], "k-", linewidth=1)
            ax.plot(x["mean"], names.index(x["ours"]), "ko", markersize=4)
        better = sum(x["mean"] < 0 and x.get("survives", False) for x in differences)
        found = f"{better or 'none'} of {len(differences)}\nsignificantly better than {title}\nafter correction"
        ax.set(title=f"After {tokens / 1e6:.1f}M tokens, {found}")
        ax.set(xlabel=f"bits per byte minus {title}'s\n(lower is better; 95%, uncorrected)")
        ax.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4))
    axes[BASELINES[1]].set_yticklabels([])
    for variant in ("prefix", "centred"):
        draw_usage(axes[variant], variant, [run for run in report["runs"] if run["group"] == variant])
    figure.legend(*axes[variant].get_legend_handles_labels(), loc="outside lower center", ncols=9, frameon=False)
    with name_write_errors(path):
        figure.savefig(path)
    print(f"\nfigure: {path}")


def draw_growth(path: Path, studies: dict[str, dict]):
    """Draw by training tokens, a column for each study: differences from the baselines, and what the routing does."""
    figure = matplotlib.figure.Figure(figsize=(7, 9), dpi=200, layout="constrained")
    axes = figure.subplots(4, len(studies), sharex="col", sharey="row", squeeze=False)
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
                    column[3].plot(tokens, [x["input_dependence"]["mean"] for x in points], **style)
        parameters, tokens = (number / 1e6 for number in size_and_tokens(report))
        size = f"{parameters:.1f}M parameters\n{tokens:.1f}M tokens"
        column[0].set(title=f"{name}, {report['settings']['seeds']} seeds\n{size}")
        column[2].set(ylim=(-0.04, 1.04))
        column[3].set(xlabel="training tokens, millions")
    for ax, name in zip(axes[:, 0], ("SwiGLU", "GEGLU")):
        ax.set(ylabel=f"bits per byte\nminus {name}'s\n(lower is better;\n95%, uncorrected)")
    axes[2, 0].set(ylabel="share of layers with\nover 90% of their weight\nin one activation")
    axes[3, 0].set(ylabel="input dependence,\nas a share of ln K")
    handles = [legend[name] for name in variants if name in legend]
    figure.legend(handles=handles, loc="outside lower center", ncols=9, frameon=False)
    with name_write_errors(path):
        figure.savefig(path)
    print(f"\nfigure: {path}")


def report_studies(file: Path, studies: dict[str, dict]):
    """Print the tables of these studies and draw their figures beside the file."""
    drawable = [name for name, report in studies.items() if has_figure(report)]
    for name, report in studies.items():
        print(f"\n{name}: {report['machine']}")
        print_report(report)
        if name in drawable:
            suffix = f"_{name}" if len(drawable) > 1 else ""
            draw_report(file.with_name(f"{file.stem}{suffix}.png"), report)
    if len(studies) > 1:
        print_ends(studies)
        print_changes(studies)
    if growing := {name: report for name, report in studies.items() if report["growth"].get("swiglu")}:
        draw_growth(file.with_name(f"{file.stem}_growth.png"), growing)
