"""Plots of the routing by layer and over training."""

from pathlib import Path

import numpy as np

from common.routing import COLLAPSED


def make_figure(title: str, xlabel: str, n_rows: int, n_columns: int = 1):
    """A matplotlib figure and its [n_rows, n_columns] of axes. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), dpi=200, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    figure.supxlabel(xlabel)
    return figure, figure.subplots(n_rows, n_columns, sharex=True, sharey="row", squeeze=False)


def plot_layers(path: Path, stats: dict, activations: tuple[str, ...]):
    """The measures by layer: usage, and below it the others."""
    usage, dependence = np.array(stats["usage"]), np.array(stats["input_dependence"])  # [n_layer, K], [n_layer]
    n_collapsed, layer, ln_K = (usage.max(1) > COLLAPSED).sum(), dependence.argmax(), np.log(len(activations))
    title = f"{n_collapsed} of {len(usage)} layers give over 90% of the weight to one activation;\n"
    title += f"input dependence is highest in layer {layer}: {dependence[layer]:.2g} of {ln_K:.2f} nats"
    figure, ((top,), (bottom,)) = make_figure(title, "layer (0 reads the embedding)", 2)
    for k, name in enumerate(activations):
        top.bar(range(len(usage)), usage[:, k], bottom=usage[:, :k].sum(1), color=f"C{k}", label=name)
    top.set(ylabel="usage", ylim=(0, 1))
    top.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    bottom.plot(stats["static_entropy_share"], "k--", label="static entropy")
    bottom.plot(stats["dynamic_entropy_share"], "C4o-", label="dynamic entropy")
    bottom.plot(dependence / ln_K, "C5s-", label="input dependence")
    bottom.plot(stats["agreement"], "C6^-", label="agreement")
    bottom.set(ylabel="share of ln K, or of neurons", ylim=(-0.04, 1.04), xticks=range(len(usage)))
    bottom.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def plot_usage(path: Path, evaluations: list[dict], activations: tuple[str, ...]):
    """Usage over training, a stacked area for each layer."""
    steps = [line["step"] for line in evaluations]
    usage = np.array([line["routing"]["usage"] for line in evaluations])  # [evaluations, L, K]
    n_collapsed, L = (usage.max(2) > COLLAPSED).sum(1), usage.shape[1]
    since = steps[max((i + 1 for i, n in enumerate(n_collapsed) if n != n_collapsed[-1]), default=0)]
    n_columns = int(np.ceil(np.sqrt(L)))
    when = f"From step {since} on" if since < steps[-1] else f"At step {since}"
    title = f"{when}, {n_collapsed[-1]} of {L} layers give over 90% of the weight\nto one activation"
    figure, axes = make_figure(title, "optimizer step", -(-L // n_columns), n_columns)
    for i, ax in enumerate(axes.flat[:L]):
        areas = ax.stackplot(steps, usage[:, i].T, colors=[f"C{k}" for k in range(len(activations))])
        ax.set(title=f"layer {i}", xlim=(steps[0], steps[-1]), ylim=(0, 1))
        ax.plot(steps, np.zeros(len(steps)), "k|", clip_on=False)  # the evaluations
    for ax in axes.flat[L:]:
        ax.set_axis_off()
    figure.supylabel("usage")
    figure.legend(areas, activations, loc="outside right", reverse=True)
    figure.savefig(path)


def plot_training(path: Path, log: list[dict], evaluations: list[dict]):
    """Loss over the steps, and below it the entropies of the routing with tau."""
    steps, losses, taus = zip(*[(line["step"], line["loss"], line["tau"]) for line in log if line.get("loss")])
    title = f"The training loss went from {losses[0]:.3g} to {losses[-1]:.3g} nats"
    if evaluations:
        static = [np.mean(line["routing"]["static_entropy_share"]) for line in evaluations]
        dynamic = [np.mean(line["routing"]["dynamic_entropy_share"]) for line in evaluations]
        first, last = (f"{evaluations[i]['tau']:.2g}" for i in (0, -1))
        title += f".\nWhile tau went from {first} to {last}, " if first != last else f".\nWith tau at {last}, "
        title += f"the dynamic entropy went from {dynamic[0]:.1%} to {dynamic[-1]:.1%}\nof ln K; "
        title += f"the static entropy stayed at {min(static):.2%} or more\n(means over the layers)"
    figure, axes = make_figure(title, "optimizer step", 1 + bool(evaluations))
    axes[0, 0].plot(steps, losses, "C7")
    axes[0, 0].set(ylabel="loss, nats per token", ylim=(0, None))
    if evaluations:
        ax, measured = axes[1, 0], [line["step"] for line in evaluations]
        ax.plot(steps, taus, "k:", label="tau")
        ax.plot(measured, static, "k--", label="static entropy")
        ax.plot(measured, dynamic, "C4o-", label="dynamic entropy")
        ax.set(ylabel="tau, or share of ln K", ylim=(0, None))
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def save_plots(folder: Path, stats: dict, activations: tuple[str, ...], log: list[dict]):
    """Write the plots that have data and print their names; if that fails, as without matplotlib, print why."""
    evaluations, written = [line for line in log if line.get("routing")], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if stats:
            plot_layers(folder / "layers.png", stats["all"], activations)
            written.append("layers.png")
        if stats and len(evaluations) > 1:
            plot_usage(folder / "usage.png", evaluations, activations)
            written.append("usage.png")
        if sum(bool(line.get("loss")) for line in log) > 1:  # one point is no curve
            plot_training(folder / "training.png", log, evaluations)
            written.append("training.png")
    except (ImportError, OSError) as e:  # no matplotlib, or no room for the plots
        print(f"no plots: {e}")
    except (LookupError, TypeError, ValueError) as e:
        print(f"no plots of the training: log.jsonl is damaged or of another version ({e!r})")
    if written:
        print(f"plots in {folder}: {', '.join(written)}")
