"""Evaluate a trained model: its loss on each domain, what its routing does, and benchmarks.

python eval.py                              newest model under out/: loss of each domain, and the routing report
python eval.py out/tiny                     the same for another model
python eval.py --problems                   held-out arithmetic, for a model fine-tuned by sft.py
python eval.py --tasks=hellaswag,arc_easy   benchmarks, through EleutherAI's lm-evaluation-harness

Writes all numbers to eval.json beside the checkpoint, with plots of the routing and of the training.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import run, settings
from common.data import Conversations, Corpus, corpus_type, to_inputs
from common.generate import generate_texts
from common.routing import routing_stats
from common.settings import UserError, check_range
from common.tokenizer import encode_chat, get_tokenizer, stop_tokens
from common.weights import newest_checkpoint, open_model
from model import ModelConfig, PolychromaticLM

# The measures of routing_stats() by their names in print, with the paper's values.
MEASURES = {
    "static entropy": "1.3863 nats (100.00%)", "dynamic entropy": "0.0004 nats (0.03%)", "usage": "not measured",
    "input dependence": "not measured", "agreement": "not measured",
}  # fmt: skip


@dataclass
class EvalConfig:
    """Settings of an evaluation."""

    # model
    init_from: str | None = None  # run folder, checkpoint or any other model that loads; None: the newest under out/
    revision: str | None = None  # commit of a model on the hub
    router_context: str | None = None  # what the router reads: prefix, token or sequence; None: as trained
    # loss, routing and plots
    report: bool | None = None  # measure domain loss and routing; None: unless problems or tasks are given
    data_dir: str | None = None  # corpus whose validation files to read; None: the one the model was trained on
    domains: tuple[str, ...] = ()  # of the corpus; none: all of them
    max_tokens: int | None = None  # tokens of each validation file, evenly spread; None: the whole file
    picture_dir: str | None = None  # folder of the plots; None: beside the checkpoint
    # problems and tasks
    problems: bool = False  # ask the generated problems that are held out of all training data
    tasks: tuple[str, ...] = ()  # of the harness, for example hellaswag,arc_easy; finished ones are skipped
    task_dir: str | None = None  # folder of additional task files for the harness
    chat: bool = False  # put the prompts of the tasks into the chat format of sft.py
    limit: int | None = None  # problems of each family (None: 40), documents of each task (None: all)
    batch_size: int | None = None  # rows at once; None: 16,384 tokens, on CUDA 32,768
    seed: int = 1  # of the generated problems
    # machine
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32

    def __post_init__(self):
        check_range(self, 0, 2**63 - 1, "seed")
        highest_limit = 1000 if self.problems else 2**40  # a family has fewer than 1,000 held-out problems
        for name, highest in {"limit": highest_limit, "max_tokens": 2**40, "batch_size": 2**20}.items():
            if getattr(self, name) is not None:
                check_range(self, 1, highest, name)


def pick_batch_size(cfg: EvalConfig, model: PolychromaticLM) -> int:
    """Rows at once: cfg's number, else as many as hold 2^14 tokens, on CUDA 2^15."""
    if model.config.sees_future:
        return 1  # its router would read the padding
    tokens = 2**15 if model.device.type == "cuda" else 2**14
    return cfg.batch_size or max(1, tokens // model.config.block_size)


def in_batches(function: Callable[[Sequence], list], items: Sequence, name: str, batch_size: int) -> list:
    """The results of function(batch), one for each item, in order."""
    starts = tqdm(range(0, len(items), batch_size), desc=name, disable=not len(items))
    return [result for start in starts for result in function(items[start : start + batch_size])]


def print_table(rows: list[list[str]]):
    """Print rows of cells in aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]))
    print()


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float | None]:
    """Mean of values [n] and its standard error, which is None with one cluster. clusters [n] int: ids.

    Values of one cluster may depend on each other, as the tokens of a document do; the clusters are independent.
    Linearized variance of a ratio of sums (Cochran, Sampling Techniques, 1977, section 6.3).
    """
    mean, ids = values.mean(), np.unique(clusters, return_inverse=True)[1]
    deviations = np.bincount(ids, values - mean)  # of each cluster's sum
    n = len(deviations)
    return float(mean), math.sqrt((deviations**2).sum() * n / (n - 1)) / len(values) if n > 1 else None


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n independent trials (Wilson, 1927); unlike a standard error, not 0 wide at 0 of n."""
    z, share = 1.959964, successes / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, center - half_width), min(1.0, center + half_width)


# --------------------------------------------------------------------------------------------------------- domain loss


def open_corpus(cfg: EvalConfig, source: Path, config: ModelConfig) -> Corpus:
    """The validation text of cfg's corpus, else of the one that the model was trained on."""
    folder = cfg.data_dir
    if not folder:
        with contextlib.suppress(UserError, KeyError):  # weights without a run have no settings
            folder = run.load_checkpoint(source)["settings"]["data_dir"]
    if not folder:
        raise UserError(f"{source} does not say what it was trained on; name a corpus, --data_dir=, or --report=False")
    corpus = corpus_type(folder)(folder, config.block_size, "val", cfg.domains or None)
    if corpus.tokenizer != config.tokenizer or corpus.vocab_size > config.vocab_size:
        ours = f"the model {config.tokenizer!r} with {config.vocab_size:,}"
        raise UserError(f"{folder} has tokenizer {corpus.tokenizer!r} with {corpus.vocab_size:,} tokens, {ours}")
    return corpus


def val_rows(corpus: Corpus, domain: str, max_tokens: int) -> np.ndarray:
    """Rows evenly spread over a domain's val.bin: their tokens, targets and doc_ids, [n, 3, block_size] int64.

    Unlike in training, a document keeps its id in every row that it spans.
    """
    chosen = corpus.spread_rows(domain, max_tokens)
    rows = np.stack([corpus.row(domain, index) for index in chosen])
    first_ids = chosen * corpus.block_size  # conversations lie whole in their rows, fewer than block_size in each
    if not isinstance(corpus, Conversations):
        ends = np.flatnonzero(corpus.tokens[domain] == corpus.end_of_text)
        first_ids = np.searchsorted(ends, first_ids)  # number of documents that end before the row
    rows[:, 2] += first_ids[:, None]
    return rows


def token_losses(model: PolychromaticLM, rows: np.ndarray) -> list[np.ndarray]:
    """Loss in nats of every token of val_rows(), 0 where there is no target: [block_size] for each row."""
    tokens, targets, doc_ids = to_inputs(rows, model.device)
    hidden = model.hidden(tokens, doc_ids).flatten(0, 1)
    losses = []
    for chunk, target in zip(hidden.split(1024), targets.flatten().split(1024)):
        logits = F.linear(chunk, model.head_weight).float()
        losses.append(F.cross_entropy(logits, target, ignore_index=-1, reduction="none"))
    return list(torch.cat(losses).view_as(targets).double().cpu().numpy())


def measure_domain(model: PolychromaticLM, corpus: Corpus, domain: str, max_tokens: int, batcher: Callable) -> dict:
    """The loss on held-out text in three units, each with its standard error, which is None for one document."""
    rows = val_rows(corpus, domain, max_tokens)
    losses = np.stack(batcher(functools.partial(token_losses, model), rows, domain))
    is_target = rows[:, 1] >= 0
    documents = rows[:, 2][is_target]
    nats, error = clustered_mean(losses[is_target], documents)
    result = {"documents": len(np.unique(documents)), "tokens": len(documents)}
    bits_of_a_nat = corpus.bits_per_byte(domain, 1.0)
    for name, value, slope in [
        ("nats_per_token", nats, 1.0),
        ("bits_per_byte", nats * bits_of_a_nat, bits_of_a_nat),
        ("perplexity", math.exp(nats), math.exp(nats)),
    ]:
        result |= {name: value, f"{name}_error": error and error * slope}
    return result


def print_domains(results: dict[str, dict]):
    table = [["domain", "documents", "tokens", "nats/token", "bits/byte", "perplexity"]]
    for domain, measured in results.items():
        cells = [domain, f"{measured['documents']:,}", f"{measured['tokens']:,}"]
        for name, spec in {"nats_per_token": ".4f", "bits_per_byte": ".4f", "perplexity": ".2f"}.items():
            error = measured[f"{name}_error"]
            cells.append(f"{measured[name]:{spec}} ± {'-' if error is None else format(error, spec)}")
        table.append(cells)
    print("\nLoss on held-out text ± standard error, which takes documents, not tokens, as independent")
    print_table(table)


# ------------------------------------------------------------------------------------------------------- routing report


def measure_routing(model: PolychromaticLM, corpus: Corpus, max_tokens: int) -> dict[str, dict]:
    """routing_stats() of at most max_tokens of each domain, and of "all", a mixture of them; empty for a plain GLU."""
    if len(model.config.activations) == 1:
        return {}
    samples = {domain: val_rows(corpus, domain, max_tokens) for domain in corpus.domains}
    mixed = np.concatenate([rows[:: len(samples)] for rows in samples.values()])
    stats = {}
    for name, rows in {"all": mixed, **samples}.items():
        tokens, targets, doc_ids = to_inputs(rows, model.device)
        stats[name] = routing_stats(model, tokens, doc_ids, corpus.is_text(tokens, targets))
    return stats


def format_shares(shares: Sequence[float]) -> str:
    return " / ".join(f"{share:.1%}" for share in shares)


def format_measures(stats: dict, layers: slice = slice(None)) -> list[str]:
    """The five measures as cells of a table, averaged over these layers."""
    mean = {name: np.mean(values[layers], axis=0) for name, values in stats.items()}
    entropies = [f"{mean[f'{x}_entropy']:.4f} nats ({mean[f'{x}_entropy_share']:.2%})" for x in ("static", "dynamic")]
    dependence = f"{mean['input_dependence']:.4f} nats"
    return [*entropies, format_shares(mean["usage"]), dependence, f"{mean['agreement']:.1%}"]


def print_routing(stats: dict[str, dict], activations: Sequence[str]):
    names = " / ".join(activations)
    header = [f"usage: {names}" if name == "usage" else name for name in MEASURES]
    domains = [name for name in stats if name != "all"]
    print(f"Routing by layer; entropies also as shares of ln {len(activations)}")
    rows = [[str(i), *format_measures(stats["all"], slice(i, i + 1))] for i in range(len(stats["all"]["usage"]))]
    rows += [["mean", *format_measures(stats["all"])], ["paper", *MEASURES.values()]]
    print_table([["layer", *header], *rows])
    print("What each measure shows and what it cannot show: docs/routing.md\n")
    print("Routing by domain, averaged over the layers")
    print_table([["domain", *header], *([domain, *format_measures(stats[domain])] for domain in domains)])
    if len(domains) > 1:
        usage = np.array([stats[domain]["usage"] for domain in domains]).swapaxes(0, 1)  # [n_layer, domains, K]
        distances = np.abs(usage[:, :, None] - usage[:, None]).sum(-1).max((1, 2)) / 2  # total variation, 0..1
        print(f"Usage ({names}) by layer and domain; distance: largest share of choices in which two domains differ")
        rows = [[str(i), *map(format_shares, u), f"{d:.1%}"] for i, (u, d) in enumerate(zip(usage, distances))]
        print_table([["layer", *domains, "distance"], *rows])


def report(model: PolychromaticLM, corpus: Corpus, cfg: EvalConfig, batcher: Callable, folder: Path) -> dict:
    """Measure and print domain loss and routing, and save the plots."""
    from extras.plots import save_plots

    max_tokens = cfg.max_tokens or 2**40
    domains = {domain: measure_domain(model, corpus, domain, max_tokens, batcher) for domain in corpus.domains}
    print_domains(domains)
    stats = measure_routing(model, corpus, min(max_tokens, 2**15))
    if stats:
        print_routing(stats, model.config.activations)
    else:
        print(f"a plain GLU of {model.config.activations[0]}: there is no routing to measure")
    save_plots(Path(cfg.picture_dir or folder), stats, model.config.activations, run.read_log(folder))
    return {"data_dir": str(corpus.folder), "domains": domains, "routing": stats}


# --------------------------------------------------------------------------------------------------- problems and tasks


def is_correct(text: str, answer: str) -> bool:
    """Whether the last line of a generated text states the answer, to the letter."""
    return text.rstrip().rpartition("\n")[2] == f"Answer: {answer}"


def solve_problems(
    model: PolychromaticLM, encoding: tiktoken.Encoding, cfg: EvalConfig, batcher: Callable
) -> dict[str, dict]:
    """Exact match of greedy answers by family: {family: {"n", "exact_match", "interval"}}, "all" last."""
    from extras.embedded import problems

    def answer(batch: list[list[int]]) -> list[str]:
        room = max(1, model.config.block_size - max(map(len, batch)))
        return generate_texts(model, encoding, batch, room, stop_tokens(encoding))

    held_out = list(problems(cfg.seed, reserved=True, limit=cfg.limit or 40))
    chats = [[{"role": "user", "content": question}] for _, question, _, _ in held_out]
    prompts = [encode_chat(encoding, chat, reply=True)[0].tolist() for chat in chats]
    texts = batcher(answer, prompts, "problems")
    outcomes = defaultdict(list)
    for (family, _, _, expected), text in zip(held_out, texts):
        outcomes[family].append(is_correct(text, expected))
    outcomes["all"] = sum(outcomes.values(), [])
    results = {}
    for name, correct in outcomes.items():
        n, n_correct = len(correct), sum(correct)
        results[name] = {"n": n, "exact_match": n_correct / n, "interval": wilson_interval(n_correct, n)}
    return results


def print_problems(results: dict[str, dict]):
    table = [["held-out problems", "n", "exact match", "95% interval"]]
    for name, r in results.items():
        low, high = r["interval"]
        table.append([name, str(r["n"]), f"{r['exact_match']:.1%}", f"{low:.1%} to {high:.1%}"])
    print_table(table)


def headline(result: dict, preferred: str | None) -> tuple[str, float, tuple[float, float] | None]:
    """Name, value and 95% interval of a task's main metric: the preferred one, else the first common one.

    Shares are in percent, with Wilson's interval; another metric has 1.96 times the harness's standard error, if any.
    """
    metrics, n = result["metrics"], result["n"]
    numbers = [key for key, value in metrics.items() if isinstance(value, float) and "_stderr," not in key]
    names = (preferred, "acc_norm", "acc", "exact_match")
    common = [key for name in names for key in numbers if key.split(",")[0] == name]
    key = (common + numbers)[0]
    name, value, error = key.replace(",none", ""), metrics[key], metrics.get(key.replace(",", "_stderr,"))
    if common:
        low, high = wilson_interval(value * n, n)
        return name, 100 * value, (100 * low, 100 * high)
    return name, value, (value - 1.96 * error, value + 1.96 * error) if isinstance(error, float) else None


def task_table(results: dict[str, dict], names: Sequence[str]) -> list[list[str]]:
    """The scores beside those of the paper, in percent, as rows for print_table()."""
    from extras.harness import REFERENCES

    others = ["paper, base", "paper, SFT", "Qwen3-0.6B-Base", "guess", "of Qwen3"]
    table = [["task", "metric", "n", "this model", "95% interval", *others]]
    for name in names:
        preferred, base, sft, qwen3, guess = REFERENCES.get(name, (None,) * 5)
        metric, score, interval = headline(results[name], preferred)
        cells = [(base, ".2f"), (sft, ".2f"), (qwen3, ".2f"), (guess, "g"), (qwen3 and score / qwen3, ".0%")]
        others = ["-" if value is None else format(value, spec) for value, spec in cells]
        between = "{:.2f} to {:.2f}".format(*interval) if interval else "-"
        table.append([name, metric, str(results[name]["n"]), f"{score:.2f}", between, *others])
    return table


# ----------------------------------------------------------------------------------------------------------------- main


def weights_digest(model: PolychromaticLM) -> str:
    """A hash of the model's settings and weights."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def read_results(file: Path, weights: str) -> dict:
    """The results in an eval.json, if they are of these weights."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or damaged
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["weights"] == weights:
            return results
    return {"weights": weights}


def main():
    cfg = settings.load(EvalConfig)
    run.prepare_cpu()
    source, device = Path(cfg.init_from or newest_checkpoint()), run.pick_device(cfg.device)
    dtype = run.inference_dtype(cfg.dtype, device)
    model = open_model(source, device, cfg.revision, cfg.router_context)
    folder = source if source.is_dir() else source.parent if source.exists() else Path("out") / source  # a hub name
    wants_report = cfg.report if cfg.report is not None else not (cfg.problems or cfg.tasks)
    corpus = open_corpus(cfg, source, model.config) if wants_report else None
    encoding = get_tokenizer(model.config.tokenizer, cfg.vocab) if cfg.problems or cfg.tasks else None
    batcher = functools.partial(in_batches, batch_size=pick_batch_size(cfg, model))
    file = folder / "eval.json"
    results = read_results(file, weights_digest(model))

    def save():
        with run.name_write_errors(file):
            folder.mkdir(parents=True, exist_ok=True)
            run.write_json(file, results)

    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if corpus:
            results |= report(model, corpus, cfg, batcher, folder)
            save()
        if cfg.problems:
            results["problems"] = solve_problems(model, encoding, cfg, batcher)
            print_problems(results["problems"])
            save()
        if cfg.tasks:
            from extras.harness import run_tasks

            finished = results.setdefault("tasks", {})
            for name, result in run_tasks(model, encoding, batcher, cfg, str(dtype), finished):
                finished[name] = result
                save()  # a killed run resumes after the last finished task
            print("\nBenchmark tasks, accuracy in percent; the scores of the other models are the paper's")
            print_table(task_table(finished, cfg.tasks))
    print(f"numbers: {file}")


if __name__ == "__main__":
    settings.run(main)
