"""What a trained model knows, and what its routing does, in numbers.

python eval.py                              newest checkpoint under out/: loss of each domain, and the routing report
python eval.py --init_from=out/tiny         the same of another model
python eval.py --problems                   held-out arithmetic, asked of a model of sft.py
python eval.py --tasks=hellaswag,arc_easy   benchmarks, through EleutherAI's lm-evaluation-harness

Beside the checkpoint it leaves eval.json, which holds every number, and pictures of the routing and of the training.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import logging
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import config
from model import PolychromaticLM, chunked_cross_entropy, entropy, routing_stats
from prepare_data import (
    CHAT_SPECIALS,
    FAMILIES,
    ROLES,
    encode,
    encode_chat,
    get_tokenizer,
    problems,
    stop_tokens,
    write_json,
)
from sample import inference_dtype, load_model, newest_checkpoint
from sft import Conversations
from train import Corpus, Ranks, TrainConfig, load_checkpoint, pick_device, prepare_cpu, read_log

ROUTING_TOKENS = 2**15  # of each domain, on which the routing is measured


@dataclass
class EvalConfig:
    """Settings of an evaluation."""

    init_from: str | None = None  # any model that loads, see the README; None: the newest checkpoint under out/
    revision: str | None = None  # of a model on the hub
    router_context: str | None = None  # what the router reads, prefix, token or sequence; None: as it was trained
    report: bool | None = None  # measure the domain loss and the routing; None: unless problems or tasks are asked for
    data_dir: str | None = None  # corpus whose validation files to read; None: what the model was trained on
    domains: tuple[str, ...] = ()  # of the corpus; none named: all of them
    max_tokens: int | None = None  # tokens of each validation file, evenly spread; None: the whole file
    picture_dir: str | None = None  # where the pictures go; None: beside the checkpoint
    problems: bool = False  # ask the generated problems that are held out of all training data
    tasks: tuple[str, ...] = ()  # of the harness, for example hellaswag,arc_easy; finished ones are not done again
    task_dir: str | None = None  # a folder of further task files for the harness
    chat: bool = False  # put the prompts of the tasks into the chat format of sft.py
    limit: int | None = None  # problems of each family (None: 40), documents of each task (None: all)
    batch_size: int | str = "auto"  # rows at once, halved when GPU memory runs out; auto: what suits the device
    seed: int = 1  # of the generated problems
    vocab: str | None = None  # vocab.json of a qwen3 model's tokenizer; None: from the hub, kept in its cache
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32

    def __post_init__(self):
        config.check_range(self, 0, 2**63 - 1, "seed")
        if self.limit is not None:  # a family has few more problems that are held out
            config.check_range(self, 1, 1000 if self.problems else 2**40, "limit")
        if self.max_tokens is not None:
            config.check_range(self, 1, 2**40, "max_tokens")
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f"batch_size is {self.batch_size!r}; it must be auto or a number")
        if self.batch_size != "auto":
            config.check_range(self, 1, 2**20, "batch_size")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, bfloat16 or float32")


class Batcher:
    """Does work on a batch of items at a time; a batch that the GPU's memory does not hold is halved, for good."""

    def __init__(self, model: PolychromaticLM, size: int | str):
        tokens = 2**18 if model.device.type == "cuda" else 2**14
        self.size = max(8, tokens // model.config.block_size) if size == "auto" else size
        if model.config.sees_future:
            self.size = 1  # its routing would read the padding too

    def __call__(self, work: Callable[[list], list], items: Sequence, name: str) -> list:
        """What work(batch) returns for each item, in their order; ends the script if not even one item fits."""
        done = []
        with tqdm(total=len(items), desc=name, disable=not items) as bar:
            while len(done) < len(items):
                batch, out_of_memory = items[len(done) : len(done) + self.size], False
                try:
                    done += work(batch)
                    bar.update(len(batch))
                except torch.OutOfMemoryError:
                    out_of_memory = True  # cleared below: here the exception still holds the tensors
                if out_of_memory and len(batch) == 1:
                    raise ValueError("out of memory with one row at a time; a smaller model or --device=cpu may fit")
                if out_of_memory:
                    self.size = len(batch) // 2
                    torch.cuda.empty_cache()
                    bar.write(f"out of memory: going on with {self.size} at once")
        return done


def print_table(rows: list[list[str]]):
    """Rows of words, the first of them the header, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print("  ".join([first.ljust(widths[0]), *(word.rjust(n) for word, n in zip(others, widths[1:]))]))
    print()


def shown(value: float | None, form: str) -> str:
    """A number in that format; "-" for one that there is not."""
    return "-" if value is None else format(value, form)


# --------------------------------------------------------------------------------------------------------- domain loss


def open_corpus(model: PolychromaticLM, cfg: EvalConfig, folder: str) -> Corpus:
    """The corpus in a folder, to be read a row at a time; ends the script with one line if it cannot be used."""
    try:
        found = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))["domains"]
        kind = Conversations if any("val_targets" in counts for counts in found.values()) else Corpus
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        kind, found = Corpus, ["math"]  # it says what is wrong
    domains = tuple(dict.fromkeys(cfg.domains or found))
    settings = {
        **dataclasses.asdict(model.config), "data_dir": folder, "init_from": cfg.init_from or "out", "max_steps": 1,
        "mixture": dict.fromkeys(domains, 1 / len(domains)), "mixture_end": None, "batch_size": 1,
        "micro_batch_size": 1, "eval_tokens": cfg.max_tokens or 2**40,
    }  # fmt: skip
    return kind(TrainConfig(**settings))


Row = tuple[Tensor, Tensor, Tensor]  # tokens, targets, doc_ids of a window, each [1, block_size] int64


def joined(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and doc_ids of several rows, each [B, block_size] int64."""
    tokens, targets, doc_ids = (torch.cat(part).to(device) for part in zip(*rows))
    return tokens, targets, doc_ids


def window_losses(model: PolychromaticLM, rows: list[Row]) -> list[tuple[float, int]]:
    """Of each row: the sum of its losses, in nats, and the number of its targets."""
    tokens, targets, doc_ids = joined(rows, model.device)
    hidden, counts = model.hidden(tokens, doc_ids), (targets >= 0).sum(1)
    means = [chunked_cross_entropy(h, model.head_weight, t) for h, t in zip(hidden, targets)]
    return list(zip((torch.stack(means) * counts).tolist(), counts.tolist()))


def mean_loss(windows: list[tuple[float, int]]) -> tuple[float, float | None]:
    """Nats per token over all windows (sum, count), and the standard error, windows taken as independent."""
    total, count = map(sum, zip(*windows))
    mean, n = total / count, len(windows)
    squares = sum((nats - mean * targets) ** 2 for nats, targets in windows)
    return mean, math.sqrt(squares * n / (n - 1)) / count if n > 1 else None


def measure_domains(model: PolychromaticLM, corpus: Corpus, batcher: Batcher) -> tuple[dict, dict[str, list[Row]]]:
    """{domain: its losses}, and some rows of each domain, evenly spread, on which to measure the routing."""
    measured, samples, n_sample = {}, {}, max(1, ROUTING_TOKENS // model.config.block_size)
    for domain in corpus.cfg.mixture:
        rows = list(corpus.val_batches(domain, Ranks("cpu")))
        windows = batcher(lambda batch: window_losses(model, batch), rows, domain)
        nats, error = mean_loss(windows)
        measured[domain] = {
            "windows": len(windows), "tokens": sum(n for _, n in windows), "nats_per_token": nats,
            "nats_per_token_error": error, "bits_per_byte": corpus.bits_per_byte(domain, nats),
            "bits_per_byte_error": error and corpus.bits_per_byte(domain, error), "perplexity": math.exp(nats),
            "perplexity_error": error and math.exp(nats) * error,
        }  # fmt: skip
        samples[domain] = rows[:: max(1, len(rows) // n_sample)][:n_sample]
    return measured, samples


def print_domains(measured: dict):
    table = [["domain", "windows", "tokens", "nats/token", "bits/byte", "perplexity"]]
    for domain, m in measured.items():
        cells = (f"{m[name]:.4f} ± {shown(m[f'{name}_error'], '.4f')}" for name in ("nats_per_token", "bits_per_byte"))
        perplexity = f"{m['perplexity']:.2f} ± {shown(m['perplexity_error'], '.2f')}"
        table.append([domain, f"{m['windows']:,}", f"{m['tokens']:,}", *cells, perplexity])
    print("\nLoss on held-out text; ± is the standard error over windows of block_size tokens")
    print_table(table)


# ------------------------------------------------------------------------------------------------------- routing report

# The measures of routing_stats() by their names in print: the paper's figure, what each can show and what it cannot.
MEASURES = {
    "static entropy": ("1.3863 nats (100.00%)",
        "What softmax(alpha) alone leaves open. It is blind to the router and to tau, and alpha starts at 0 and hardly "
        "moves, so a figure near ln K says nothing of what training or fine-tuning did to the routing."),
    "dynamic entropy": ("0.0004 nats (0.03%)",
        "What the weights g leave open for one neuron at one token. Near 0 they are sharp; it does not show that "
        "neurons differ, or that the input matters: a layer that always takes one activation has 0 too."),
    "usage": ("not measured",
        "The share of each activation over neurons and tokens. It shows what a layer computes with; not whether even "
        "shares come of mixing, of neurons that differ or of tokens that differ."),
    "input dependence": ("not measured",
        "What the token tells of a neuron's choice (mutual information, at most ln K). At 0 the choice is a constant, "
        "and the layer a fixed GLU; above 0 it depends on the input, which is not to say that this helps."),
    "agreement": ("not measured",
        "The largest share of a layer's neurons that favour the same activation at a token. At 100% the layer chooses, "
        "not its neurons; lower, neurons differ, be it by a hair."),
}  # fmt: skip


def measure_routing(model: PolychromaticLM, corpus: Corpus, samples: dict[str, list[Row]]) -> dict[str, dict]:
    """routing_stats() on all domains together ("all", with each neuron's usage) and on each; empty for a plain GLU."""
    together = [row for rows in samples.values() for row in rows[:: len(samples)]]
    stats = {}
    for name, rows in {"all": together, **samples}.items():
        tokens, targets, doc_ids = joined(rows, model.device)
        stats[name] = routing_stats(model, tokens, doc_ids, corpus.is_text(tokens, targets), neurons=name == "all")
    return stats if stats["all"] else {}


def percents(shares: Sequence[float]) -> str:
    return " / ".join(f"{share:.1%}" for share in shares)


def figures(stats: dict, layers: slice) -> list[str]:
    """The five measures as they are printed, means over these layers."""
    mean = {name: np.mean(values[layers], axis=0) for name, values in stats.items() if name != "neuron_usage"}
    static, dynamic = (
        f"{mean[f'{x}_entropy']:.4f} nats ({mean[f'{x}_entropy_share']:.2%})" for x in ("static", "dynamic")
    )
    return [
        static,
        dynamic,
        percents(mean["usage"]),
        f"{mean['input_dependence']:.4f} nats",
        f"{mean['agreement']:.1%}",
    ]


def usage_distances(stats: dict[str, dict]) -> np.ndarray:
    """How far two domains lie apart at most, by layer [n_layer]: total variation distance of their usage, 0..1."""
    usage = np.array([stats[domain]["usage"] for domain in stats if domain != "all"])  # [domains, n_layer, K]
    return np.abs(usage[:, None] - usage[None]).sum(-1).max((0, 1)) / 2


def print_routing(stats: dict[str, dict], activations: Sequence[str]):
    layers, everything = range(len(stats["all"]["usage"])), slice(None)
    domains, names = [name for name in stats if name != "all"], list(MEASURES)
    names[2] = "usage: " + " / ".join(activations)
    print(f"Routing by layer; entropies also as shares of ln {len(activations)}")
    rows = [["layer", *names], *([str(i), *figures(stats["all"], slice(i, i + 1))] for i in layers)]
    rows += [["mean", *figures(stats["all"], everything)], ["paper", *(paper for paper, _ in MEASURES.values())]]
    print_table(rows)
    for name, (_, meaning) in MEASURES.items():
        print(textwrap.fill(f"{name}: {meaning}", 120, subsequent_indent="  "))
    print("\nRouting by domain; means over the layers")
    print_table([["domain", *names], *([domain, *figures(stats[domain], everything)] for domain in domains)])
    if len(domains) > 1:
        print(f"Usage ({' / '.join(activations)}) by layer and domain; distance: the share of the choices that differ")
        rows = [[str(i), *(percents(stats[domain]["usage"][i]) for domain in domains)] for i in layers]
        rows = [[*row, f"{distance:.1%}"] for row, distance in zip(rows, usage_distances(stats))]
        print_table([["layer", *domains, "distance"], *rows])


# ------------------------------------------------------------------------------------------------------------- pictures


def canvas(rows: int, title: str, xlabel: str):
    """A matplotlib figure and its axes, one above the other. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5 + rows / 2), dpi=120, layout="constrained")
    axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title)
    axes[-1].set_xlabel(xlabel)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def draw_usage(path: Path, stats: dict, activations: Sequence[str]):
    """The share of each activation, by depth."""
    usage = np.array(stats["usage"])  # [n_layer, K]
    one, best = (usage.max(1) > 0.99).sum(), usage.mean(0).argmax()
    title = f"{one} of {len(usage)} layers use one activation over 99% of the time;\n"
    title += f"{activations[best]} has the largest share, {usage.mean(0)[best]:.0%} over all layers"
    figure, (ax,) = canvas(1, title, "layer (0 reads the embedding)")
    for k, name in enumerate(activations):
        ax.bar(range(len(usage)), usage[:, k], bottom=usage[:, :k].sum(1), color=f"C{k}", label=name)
    ax.set(ylabel="usage, share of neurons x tokens", ylim=(0, 1))
    figure.legend(title="activation", loc="outside right", reverse=True)
    figure.savefig(path)


def draw_entropy(path: Path, stats: dict, activations: Sequence[str]):
    """The entropies, as shares of ln K, and the agreement, by depth."""
    most, dependence = math.log(len(activations)), np.array(stats["input_dependence"])
    layer, layers = dependence.argmax(), range(len(dependence))
    title = (
        f"The choice depends on the input most in layer {layer}: {dependence[layer]:.2g} of at most {most:.2f} nats;\n"
    )
    title += f"static entropy reads at least {min(stats['static_entropy_share']):.1%} of ln K in every layer"
    figure, (above, below) = canvas(2, title, "layer (0 reads the embedding)")
    evenness = entropy(torch.tensor(stats["usage"]).T) / most
    above.plot(layers, stats["static_entropy_share"], "k--", label="static entropy, of softmax(alpha)")
    above.plot(layers, evenness, "C1", linewidth=7, alpha=0.5, label="entropy of the layer's usage")
    above.plot(layers, dependence / most, "C3s-", label="input dependence")
    above.plot(layers, stats["dynamic_entropy_share"], "C0o-", label="dynamic entropy, of g")
    above.set(ylabel=f"share of ln {len(activations)} nats", ylim=(-0.04, 1.04))
    below.plot(layers, stats["agreement"], "C2o-", label="agreement")
    below.set(ylabel="share of neurons", ylim=(-0.04, 1.04))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path)


def draw_neurons(path: Path, stats: dict, activations: Sequence[str]):
    """What every neuron prefers, on average over the tokens: a row a layer, a column a neuron."""
    from matplotlib.colors import to_rgb

    usage, K = np.array(stats["neuron_usage"]), len(activations)  # [n_layer, K, d_ff]
    order = np.lexsort((-usage.max(1), usage.argmax(1)), axis=-1)
    usage = np.take_along_axis(usage, order[:, None], 2)
    preferred, strength = usage.argmax(1), (usage.max(1) - 1 / K) / (1 - 1 / K)
    alike = sum(len(set(row)) == 1 for row in preferred)
    title = f"In {alike} of {len(usage)} layers all neurons prefer the same activation"
    figure, (ax,) = canvas(1, title, "neurons of the layer, sorted by what they prefer")
    inks = 1 - np.array([to_rgb(f"C{k}") for k in range(K)])
    ax.imshow(1 - strength[..., None] * inks[preferred], aspect="auto", interpolation="nearest")
    ax.set_ylabel("layer (0 reads the embedding)")
    ax.yaxis.get_major_locator().set_params(integer=True)
    for k, name in enumerate(activations):
        ax.bar(0, 0, color=f"C{k}", label=name)
    figure.legend(title="preferred; white:\nall equally", loc="outside right")
    figure.savefig(path)


def draw_training(path: Path, log: list[dict]):
    """Loss, learning rate, tau and dynamic entropy over the steps of log.jsonl."""
    steps, routed = ([line for line in log if line.get(name)] for name in ("loss", "routing"))
    title = f"The training loss went from {steps[0]['loss']:.2f} to {steps[-1]['loss']:.2f} nats"
    curves = {"loss, nats per token": "loss", "learning rate": "lr", "tau": "tau"}
    series = {label: [line[name] for line in steps] for label, name in curves.items()}
    if routed:
        label, shares = (
            "dynamic entropy,\nshare of ln K",
            [np.mean(x["routing"]["dynamic_entropy_share"]) for x in routed],
        )
        series[label] = shares
        title += f",\nthe layers' mean dynamic entropy from {shares[0]:.1%} to {shares[-1]:.1%} of ln K"
    figure, axes = canvas(len(series), title, "optimizer step")
    for k, (ax, (label, values)) in enumerate(zip(axes, series.items())):
        ax.plot([line["step"] for line in (routed if k == 3 else steps)], values, f"C{k}", marker="o" * (k == 3))
        ax.set_ylabel(label)
        ax.set_ylim(0, None)
    figure.align_ylabels(axes)
    figure.savefig(path)


def draw(folder: Path, stats: dict, activations: Sequence[str], log: list[dict]):
    """Write the pictures that there are numbers for, and say where; or which package they need."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if stats:
            draw_usage(folder / "usage.png", stats["all"], activations)
            draw_entropy(folder / "entropy.png", stats["all"], activations)
            draw_neurons(folder / "neurons.png", stats["all"], activations)
        if any(line.get("loss") for line in log):
            draw_training(folder / "training.png", log)
        print(f"pictures: {folder}/*.png")
    except ImportError:
        print("no pictures: they need a package: pip install matplotlib")
    except OSError as e:
        print(f"no pictures: cannot write to {folder}: {e.strerror}")


# ------------------------------------------------------------------------------------------------------------- problems


def write_texts(
    model: PolychromaticLM, encoding: tiktoken.Encoding, prompts: list[list[int]], max_new_tokens: int,
    ends: set[int], until: Sequence[str] = (), temperature: float = 0.0,
) -> list[str]:  # fmt: skip
    """How the model continues each prompt (token ids), up to a token in `ends` or to where a text of `until` begins."""
    stops = [text.encode() for text in until if text]
    written, going = [b""] * len(prompts), set(range(len(prompts)))
    for tokens in model.generate(prompts, max_new_tokens, temperature, stop_tokens=ends):
        for i, token in enumerate(tokens.tolist()):
            if i not in going:
                continue
            piece = encoding.decode_single_token_bytes(token) if 0 <= token < encoding.eot_token else b""
            written[i] += piece  # specials have no text
            fresh = max(map(len, stops), default=0) + len(piece)  # a stop that is new in the text ends in the piece
            if token == -1 or token in ends or any(stop in written[i][-fresh:] for stop in stops):
                going.discard(i)
        if not going:
            break
    firsts = [min((text.find(stop) for stop in stops if stop in text), default=len(text)) for text in written]
    return [text[:first].decode(errors="replace") for text, first in zip(written, firsts)]


def answers(model: PolychromaticLM, encoding, questions: list[str], batch_size: int | str) -> Iterator[str]:
    """The model's answer to each question, greedily, many at once, until <|im_end|> or the end of its context."""
    prompts = [encode_chat(encoding, [{"role": "user", "content": q}], reply=True)[0].tolist() for q in questions]

    def answer(batch: list[list[int]]) -> list[str]:
        room = max(1, model.config.block_size - max(map(len, batch)))
        return write_texts(model, encoding, batch, room, stop_tokens(encoding))

    yield from Batcher(model, batch_size)(answer, prompts, "problems")


def is_right(said: str, answer: str) -> bool:
    """Whether the last line of what was said is the answer, to the letter."""
    return said.rstrip().rpartition("\n")[2] == f"Answer: {answer}"


def standard_error(share: float, n: int) -> float:
    """Of a share of n independent trials."""
    return math.sqrt(share * (1 - share) / n)


def solve_problems(model: PolychromaticLM, encoding, cfg: EvalConfig) -> dict[str, dict[str, float]]:
    """Exact match per family: {family: {"n", "exact_match", "standard_error"}}, "all" last."""
    asked = list(problems(cfg.seed, reserved=True, limit=cfg.limit or 40))
    right: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    two_digit = []
    said = answers(model, encoding, [question for _, question, _, _ in asked], cfg.batch_size)
    for (family, question, _, answer), text in zip(asked, said):
        right[family].append(is_right(text, answer))
        if family == "addition" and sum(len(word) > 1 and word.isdigit() for word in question.strip("?").split()) == 2:
            two_digit.append(right[family][-1])
    groups = {**right, "addition, both of two digits": two_digit, "all": list(itertools.chain(*right.values()))}
    results = {}
    for name, outcomes in groups.items():
        share = sum(outcomes) / max(1, len(outcomes))
        error = standard_error(share, max(1, len(outcomes)))
        results[name] = {"n": len(outcomes), "exact_match": share, "standard_error": error}
    return results


def print_problems(results: dict[str, dict[str, float]]):
    table = [["held-out problems", "n", "exact match", "standard error"]]
    for name, r in results.items():
        table.append([name, str(r["n"]), f"{r['exact_match']:.1%}", f"{r['standard_error']:.1%}"])
    print_table(table)


# ------------------------------------------------------------------------------------------------------ benchmark tasks


# The paper's tasks: metric, and in percent the paper's base model, its SFT model, Qwen3-0.6B-Base, guessing.
REFERENCES = {
    "hellaswag": ("acc_norm", 28.51, 27.84, 41.10, 25),
    "arc_easy": ("acc_norm", 41.04, 36.11, 65.60, 25),
    "arc_challenge": ("acc_norm", 22.27, 24.15, 33.90, 25),
    "piqa": ("acc_norm", 58.87, 54.52, 70.00, 50),
    "winogrande": ("acc", 52.17, 52.72, 58.50, 50),
    "boolq": ("acc", 61.13, 55.63, 69.70, 50),
    "sciq": ("acc_norm", 61.20, 52.70, None, 25),
    "openbookqa": ("acc_norm", 29.00, 26.80, None, 25),
    "mmlu_stem": ("acc", 25.28, 28.42, None, 25),
    "lambada_openai": ("acc", 15.35, 7.01, None, 0),
    "gsm8k": ("exact_match", None, None, None, 0),
}
SHOTS = {"mmlu_stem": 5}  # examples before each question, as in the paper; other tasks have their own number, mostly 0
MARKS = {name: chr(0xFDD0 + i) for i, name in enumerate(CHAT_SPECIALS)}  # noncharacters of Unicode: in no text


@torch.no_grad()
def log_likelihoods(model: PolychromaticLM, requests: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Of each continuation after its context, both token ids: log-probability in nats, and whether greedy writes it.

    What is longer than block_size is cut on the left.
    """
    T, device = model.config.block_size, model.device
    rows = [tuple((context + continuation)[-T - 1 : -1]) for context, continuation in requests]
    unique = list(dict.fromkeys(rows))  # answers of one token share a row
    longest = max(map(len, unique))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in unique], device=device)
    hidden = dict(zip(unique, model.hidden(padded)))  # causal: the padding after a row changes nothing in it
    totals, greedy = [], []
    for row, (_, continuation) in zip(rows, requests):
        targets = torch.tensor(continuation[-T:], device=device)
        logits = F.linear(hidden[row][len(row) - len(targets) : len(row)], model.head_weight).float()
        totals.append(logits.log_softmax(-1).gather(1, targets[:, None]).sum())
        greedy.append((logits.argmax(-1) == targets).all())
    return list(zip(torch.stack(totals).tolist(), torch.stack(greedy).tolist()))


def harness_model(model: PolychromaticLM, encoding: tiktoken.Encoding, batcher: Batcher):
    """The model as lm-evaluation-harness asks it, a lm_eval.api.model.TemplateLM. Raises ImportError without it."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):
        eot_token_id = encoding.eot_token
        tokenizer_name = encoding.name
        ends = {encoding.eot_token}

        def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
            """Tokens of a text in which a mark of apply_chat_template() stands for its special token."""
            # A role with its newline is encoded by itself, as encode_chat() does.
            roles = "|".join(f"(?<={MARKS['<|im_start|>']}{role}\n)" for role in ROLES)
            ids = []
            for piece in filter(None, re.split(f"([{''.join(MARKS.values())}])|{roles}", string)):
                special = next((name for name, mark in MARKS.items() if mark == piece), None)
                ids += [encoding.encode_single_token(special)] if special else encode(encoding, piece).tolist()
            return ids

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """Messages in the chat format, as text; without the prompt, an answer that the last message has begun."""
            self.ends = stop_tokens(encoding)
            begun = "" if add_generation_prompt else chat_history[-1]["content"]
            whole = chat_history if add_generation_prompt else chat_history[:-1]
            marks = {encoding.encode_single_token(name): mark.encode() for name, mark in MARKS.items()}
            ids = encode_chat(encoding, whole, reply=True)[0].tolist()
            return b"".join(marks.get(i) or encoding.decode_single_token_bytes(i) for i in ids).decode() + begun

        def _loglikelihood_tokens(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            if cut := sum(len(a) + len(b) > model.config.block_size + 1 for a, b in pairs):
                tqdm.write(f"{cut:,} of {len(pairs):,} requests do not fit the context: cut on the left")
            order = Collator(pairs, sort_fn=lambda pair: (-len(pair[0]) - len(pair[1]), pair[0] + pair[1]))
            results = []
            for longest_first in order.get_batched(n=len(pairs)):
                results += batcher(lambda batch: log_likelihoods(model, batch), longest_first, "log-likelihoods")
            return order.get_original(results)

        def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
            windows = []
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                of_text = get_rolling_token_windows(ids, encoding.eot_token, model.config.block_size, context_len=1)
                windows += [(i, *make_disjoint_window(window)) for window in of_text]
            totals = [0.0] * len(requests)
            for (i, _, _), (nats, _) in zip(windows, self._loglikelihood_tokens(windows)):
                totals[i] += nats
            return totals

        def generate_until(self, requests, disable_tqdm=False) -> list[str]:
            prompts = [request.args for request in requests]  # each with its settings
            by_length = Collator(prompts, lambda x: (-len(x[0]), x[0]), lambda x: x[1], group_by="gen_kwargs")
            results = []
            for group in by_length.get_batched(n=len(requests)):
                results += batcher(self.generate_batch, group, "generations")
            return by_length.get_original(results)

        def generate_batch(self, batch: list[tuple[str, dict]]) -> list[str]:
            """Continuations of (prompt, settings), the settings the same for all; prompts are cut on the left."""
            kwargs, T = batch[0][1], model.config.block_size
            until, length = kwargs.get("until") or [], kwargs.get("max_gen_toks", 256)
            temperature = kwargs.get("temperature", 1.0) if kwargs.get("do_sample") else 0.0
            prompts = [self.tok_encode(text)[-max(T // 2, T - length) :] or [encoding.eot_token] for text, _ in batch]
            until = [until] if isinstance(until, str) else until
            return write_texts(model, encoding, prompts, length, self.ends, until, temperature)

    return HarnessModel()


def run_tasks(
    model: PolychromaticLM, encoding, cfg: EvalConfig, dtype: str, done: dict[str, dict], save: Callable[[], None]
):
    """Run the harness's tasks that are not in `done` yet with these settings, one after the other, saving after each.

    Ends the script with one line for a missing package, an unknown task, or data that cannot be fetched.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        asked = harness_model(model, encoding, Batcher(model, cfg.batch_size))
    except ImportError:
        raise ValueError("--tasks needs a package: pip install lm-eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=cfg.task_dir)
    for name in cfg.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise ValueError(f"the harness has no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if name in manager.all_tags:
            raise ValueError(f"{name!r} is a tag that several tasks of the harness share; name the tasks")
    for name in cfg.tasks:
        settings = {"limit": cfg.limit, "chat": cfg.chat, "num_fewshot": SHOTS.get(name), "dtype": dtype}
        if name in done and done[name]["settings"] == settings:
            print(f"{name}: done before with these settings; delete eval.json to do it again")
            continue
        try:
            found = lm_eval.simple_evaluate(
                model=asked, tasks=[name], limit=cfg.limit, num_fewshot=SHOTS.get(name), task_manager=manager,
                apply_chat_template=cfg.chat, log_samples=False,
            )  # fmt: skip
        except OSError as e:
            raise ValueError(f"cannot get the data of task {name!r}: {' '.join(str(e).split())[:200]}") from None
        metrics = {**found["results"], **found.get("groups", {})}[name]
        n = sum(counts["effective"] for counts in found["n-samples"].values())
        done[name] = {"settings": settings, "n": n, "metrics": metrics, "lm_eval": lm_eval.__version__}
        save()


def headline(metrics: dict, wanted: str | None) -> tuple[str, float, float | None]:
    """Name, value and standard error of the metric to show: the wanted one, else the first of the usual ones."""
    numbers = [key for key, value in metrics.items() if isinstance(value, float) and "_stderr," not in key]
    usual = [key for name in (wanted, "acc_norm", "acc", "exact_match") for key in numbers if key.split(",")[0] == name]
    key = (usual + numbers)[0]
    error, scale = metrics.get(key.replace(",", "_stderr,")), 100 if usual else 1
    return key.replace(",none", ""), scale * metrics[key], scale * error if isinstance(error, float) else None


def print_tasks(done: dict[str, dict], names: Sequence[str]):
    table = [["task", "metric", "n", "this model", "paper, base", "paper, SFT", "Qwen3-0.6B-Base", "guess", "of Qwen3"]]
    for name in names:
        wanted, base, sft, qwen3, guess = REFERENCES.get(name, (None,) * 5)
        metric, score, error = headline(done[name]["metrics"], wanted)
        others = [shown(value, ".2f") for value in (base, sft, qwen3)]
        ours = f"{score:.2f} ± {shown(error, '.2f')}"
        ratio = shown(qwen3 and score / qwen3, ".0%")
        table.append([name, metric, str(done[name]["n"]), ours, *others, shown(guess, "g"), ratio])
    print("\nBenchmark tasks, accuracies in percent ± standard error; the others' figures are those of the paper")
    print_table(table)


def weights_digest(model: PolychromaticLM) -> str:
    """What tells this model's settings and weights from any other's."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def report(model: PolychromaticLM, cfg: EvalConfig, corpus: Corpus, results: dict, folder: Path):
    """Measure and print the domain loss and the routing, and draw the pictures."""
    results["data_dir"] = str(corpus.folder)
    results["domains"], samples = measure_domains(model, corpus, Batcher(model, cfg.batch_size))
    print_domains(results["domains"])
    stats = results["routing"] = measure_routing(model, corpus, samples)
    if stats:
        print_routing(stats, model.config.activations)
    else:
        print(f"a plain GLU of {model.config.activations[0]}: there is no routing to measure")
    draw(Path(cfg.picture_dir or folder), stats, model.config.activations, read_log(folder))
    if stats:
        del stats["all"]["neuron_usage"]  # best seen in the picture; of a large model it is half a million numbers


def main():
    cfg = config.load(EvalConfig)
    prepare_cpu()
    path, device = Path(cfg.init_from or newest_checkpoint()), pick_device(cfg.device)
    model = load_model(str(path), device, cfg.revision, cfg.router_context)
    folder, settings = path if path.is_dir() else path.parent if path.exists() else Path("out") / path, {}
    asked_for_report = cfg.report if cfg.report is not None else not (cfg.problems or cfg.tasks)
    with contextlib.suppress(OSError, ValueError):  # weights without a run have no settings
        settings = load_checkpoint(path).get("settings", {})
    data_dir, corpus = cfg.data_dir or settings.get("data_dir"), None
    if asked_for_report and data_dir:
        corpus = open_corpus(model, cfg, data_dir)
    elif asked_for_report:
        raise ValueError(f"{path} does not say what it was trained on; name a corpus, --data_dir=, or --report=False")
    encoding = get_tokenizer(model.config.tokenizer, cfg.vocab) if cfg.problems or cfg.tasks else None
    results, file = {"weights": weights_digest(model)}, folder / "eval.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or a damaged one
        before = json.loads(file.read_text(encoding="utf-8"))
        results = before if before["weights"] == results["weights"] else results

    def save():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, results)
        except OSError as e:
            raise ValueError(f"cannot write {file}: {e.strerror}") from None

    dtype = inference_dtype(cfg.dtype, device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if corpus:
            report(model, cfg, corpus, results, folder)
            save()
        if cfg.problems:
            results["problems"] = solve_problems(model, encoding, cfg)
            print_problems(results["problems"])
            save()
        if cfg.tasks:
            run_tasks(model, encoding, cfg, str(dtype), results.setdefault("tasks", {}), save)
            print_tasks(results["tasks"], cfg.tasks)
    print(f"numbers: {file}")


if __name__ == "__main__":
    config.run(main)
