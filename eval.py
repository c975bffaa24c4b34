"""Evaluate a trained model: its loss on each domain, what its routing does, and benchmarks.

python eval.py                              newest model under out/: loss of each domain, and the routing report
python eval.py out/tiny                     the same for another model
python eval.py --problems                   held-out arithmetic, for a model fine-tuned by sft.py
python eval.py --tasks=hellaswag,arc_easy   benchmarks, through EleutherAI's lm-evaluation-harness

Writes all numbers to eval.json beside the checkpoint, with plots of the routing and of the training.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.data import Conversations, Corpus
from common.generate import generate_texts
from common.routing import routing_stats
from common.run import load_checkpoint, newest_checkpoint, pick_device, prepare_cpu, read_log, write_json
from common.settings import check_range, load, run
from common.tokenizer import encode_chat, get_tokenizer, stop_tokens
from extras.embedded import FAMILIES, problems
from extras.plots import save_plots
from model import PolychromaticLM
from sample import inference_dtype, open_model
from train import TrainConfig

ROUTING_TOKENS = 2**15  # of each domain, on which the routing is measured


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
    batch_size: int | str = "auto"  # rows at once, halved when GPU memory runs out; auto: depends on the device
    seed: int = 1  # of the generated problems
    # machine
    vocab: str | None = None  # vocab.json of the tokenizer; None: downloaded and cached
    device: str = "auto"  # auto (cuda, else mps, else cpu) or a torch device
    dtype: str = "auto"  # of the matmuls: auto (bfloat16 on CUDA), bfloat16 or float32

    def __post_init__(self):
        check_range(self, 0, 2**63 - 1, "seed")
        if self.limit is not None:  # a family has fewer than 1,000 held-out problems
            check_range(self, 1, 1000 if self.problems else 2**40, "limit")
        if self.max_tokens is not None:
            check_range(self, 1, 2**40, "max_tokens")
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ValueError(f"batch_size is {self.batch_size!r}; it must be auto or a number")
        if self.batch_size != "auto":
            check_range(self, 1, 2**20, "batch_size")


class Batcher:
    """Runs a function on batches of items. Halves the batch size for good when the GPU runs out of memory."""

    def __init__(self, model: PolychromaticLM, size: int | str):
        tokens = 2**18 if model.device.type == "cuda" else 2**14
        self.size = max(8, tokens // model.config.block_size) if size == "auto" else size
        if model.config.sees_future:
            self.size = 1  # its router would read the padding

    def __call__(self, function: Callable[[list], list], items: Sequence | Tensor, name: str) -> list:
        """The results of function(batch), one for each item, in order. Raises ValueError if one item does not fit."""
        results = []
        with tqdm(total=len(items), desc=name, disable=not len(items)) as bar:
            while len(results) < len(items):
                batch = items[len(results) : len(results) + self.size]
                try:
                    results += function(batch)
                    bar.update(len(batch))
                    continue
                except torch.OutOfMemoryError:
                    pass  # handled below: here the exception still holds the tensors
                if len(batch) == 1:
                    raise ValueError("out of memory with one row at a time; a smaller model or --device=cpu may fit")
                self.size = len(batch) // 2
                torch.cuda.empty_cache()
                bar.write(f"out of memory: continuing with a batch size of {self.size}")
        return results


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
    if n == 0:
        return 0.0, 1.0
    z, share = 1.959964, successes / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, center - half_width), min(1.0, center + half_width)


# --------------------------------------------------------------------------------------------------------- domain loss


def open_corpus(model: PolychromaticLM, cfg: EvalConfig, source: Path) -> Corpus:
    """The corpus of cfg, else the one that the model was trained on. Raises ValueError if it cannot be used."""
    settings, corpus_type, domains = {}, Corpus, cfg.domains or ["math"]
    with contextlib.suppress(OSError, ValueError):  # weights without a run have no settings
        settings = load_checkpoint(source).get("settings", {})
    folder = cfg.data_dir or settings.get("data_dir")
    if not folder:
        raise ValueError(f"{source} does not say what it was trained on; name a corpus, --data_dir=, or --report=False")
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # Corpus says what is wrong
        domains = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))["domains"]
        corpus_type = Conversations if any("val_targets" in counts for counts in domains.values()) else Corpus
    for domain in cfg.domains:
        if domain not in domains:
            raise ValueError(f"{folder} has no domain {domain!r}; there are {', '.join(domains)}")
    domains = list(dict.fromkeys(cfg.domains or domains))
    settings = {
        **dataclasses.asdict(model.config), "data_dir": folder, "init_from": cfg.init_from or "out", "max_steps": 1,
        "mixture": dict.fromkeys(domains, 1 / len(domains)), "mixture_end": None, "batch_size": 1,
        "micro_batch_size": 1, "eval_tokens": cfg.max_tokens or 2**40,
    }  # fmt: skip
    return corpus_type(TrainConfig(**settings))


def val_rows(corpus: Corpus, domain: str) -> Tensor:
    """Rows evenly spread over a domain's val.bin: their tokens, targets and doc_ids, [n, 3, block_size] int64.

    Unlike in training, a document keeps its id in every row that it spans.
    """
    T, total = corpus.cfg.block_size, corpus.n_rows(domain, "val")
    chosen = np.linspace(0, total - 1, min(total, max(1, corpus.cfg.eval_tokens // T))).astype(np.int64)
    rows = np.stack([corpus.row(domain, "val", index) for index in chosen])
    first_ids = chosen * T  # conversations lie whole in their rows, fewer than T in each
    if not isinstance(corpus, Conversations):
        ends = np.flatnonzero(corpus.tokens[domain]["val"] == corpus.end_of_text)
        first_ids = np.searchsorted(ends, chosen * T)  # number of documents that end before the row
    rows[:, 2] += first_ids[:, None]
    return torch.from_numpy(rows)


def token_losses(model: PolychromaticLM, rows: Tensor) -> list[Tensor]:
    """Loss in nats of every token of val_rows(), 0 where there is no target: [block_size] for each row."""
    tokens, targets, doc_ids = rows.to(model.device).unbind(1)
    chunks = zip(model.hidden(tokens, doc_ids).flatten(0, 1).split(1024), targets.flatten().split(1024))
    logits_and_targets = ((F.linear(hidden, model.head_weight).float(), target) for hidden, target in chunks)
    losses = [F.cross_entropy(*pair, ignore_index=-1, reduction="none") for pair in logits_and_targets]
    return list(torch.cat(losses).view_as(targets).cpu())


def measure_domains(model: PolychromaticLM, corpus: Corpus, batcher: Batcher) -> tuple[dict, dict[str, Tensor]]:
    """{domain: its losses}, and {domain: some of its rows, evenly spread}, on which to measure the routing."""
    results, samples, n_sample = {}, {}, max(1, ROUTING_TOKENS // model.config.block_size)
    for domain in corpus.cfg.mixture:
        rows = val_rows(corpus, domain)
        losses = torch.stack(batcher(lambda batch: token_losses(model, batch), rows, domain)).double()
        is_target = rows[:, 1] >= 0
        losses, documents = losses[is_target].numpy(), rows[:, 2][is_target].numpy()
        nats, error = clustered_mean(losses, documents)
        results[domain] = {
            "documents": len(np.unique(documents)), "tokens": len(losses), "nats_per_token": nats,
            "nats_per_token_error": error, "bits_per_byte": corpus.bits_per_byte(domain, nats),
            "bits_per_byte_error": error and corpus.bits_per_byte(domain, error), "perplexity": math.exp(nats),
            "perplexity_error": error and math.exp(nats) * error,
        }  # fmt: skip
        samples[domain] = rows[:: max(1, len(rows) // n_sample)][:n_sample]
    return results, samples


def print_domains(results: dict):
    formats = {"nats_per_token": ".4f", "bits_per_byte": ".4f", "perplexity": ".2f"}
    rows = [["domain", "documents", "tokens", "nats/token", "bits/byte", "perplexity"]]
    for domain, m in results.items():
        errors = ["-" if m[f"{name}_error"] is None else format(m[f"{name}_error"], f) for name, f in formats.items()]
        cells = [f"{m[name]:{f}} ± {error}" for (name, f), error in zip(formats.items(), errors)]
        rows.append([domain, f"{m['documents']:,}", f"{m['tokens']:,}", *cells])
    print("\nLoss on held-out text ± standard error, which takes documents, not tokens, as independent")
    print_table(rows)


# ------------------------------------------------------------------------------------------------------- routing report

# The measures of routing_stats() by their names in print: the paper's value, what each shows and what it cannot show.
MEASURES = {
    "static entropy": ("1.3863 nats (100.00%)",
        "entropy of softmax(alpha). It depends on neither the router nor tau, and alpha starts at 0 and barely moves, "
        "so a value near ln K does not show what training or fine-tuning did to the routing."),
    "dynamic entropy": ("0.0004 nats (0.03%)",
        "entropy of the weights g of a neuron at a token. Near 0 the choice is sharp. That does not show that neurons "
        "differ or that the input matters: a layer that always picks one activation also has 0."),
    "usage": ("not measured",
        "share of each activation over neurons and tokens. It shows what a layer computes with. It does not show "
        "whether even shares come from mixing, from neurons that differ or from tokens that differ."),
    "input dependence": ("not measured",
        "mutual information of a neuron's choice and the token, at most ln K. At 0 the choice is constant and the "
        "layer is a fixed GLU. Above 0 it depends on the input, which does not show that this helps."),
    "agreement": ("not measured",
        "largest share of a layer's neurons that prefer the same activation at a token. At 100% the layer chooses, "
        "not the neuron. Below that neurons differ, if only slightly."),
}  # fmt: skip


def measure_routing(model: PolychromaticLM, corpus: Corpus, samples: dict[str, Tensor]) -> dict[str, dict]:
    """routing_stats() of each domain and of "all"; empty for a plain GLU."""
    if len(model.config.activations) == 1:
        return {}
    stats, mixed = {}, torch.cat([rows[:: len(samples)] for rows in samples.values()])
    for name, rows in {"all": mixed, **samples}.items():
        tokens, targets, doc_ids = rows.to(model.device).unbind(1)
        stats[name] = routing_stats(model, tokens, doc_ids, corpus.is_text(tokens, targets))
    return stats


def format_shares(shares: Sequence[float]) -> str:
    return " / ".join(f"{share:.1%}" for share in shares)


def format_measures(stats: dict, layers: slice = slice(None)) -> list[str]:
    """The five measures as cells of a table, averaged over these layers."""
    mean = {name: np.mean(values[layers], axis=0) for name, values in stats.items()}
    entropies = [f"{mean[f'{x}_entropy']:.4f} nats ({mean[f'{x}_entropy_share']:.2%})" for x in ("static", "dynamic")]
    return [
        *entropies,
        format_shares(mean["usage"]),
        f"{mean['input_dependence']:.4f} nats",
        f"{mean['agreement']:.1%}",
    ]


def print_routing(stats: dict[str, dict], activations: Sequence[str]):
    domains, names = [name for name in stats if name != "all"], " / ".join(activations)
    header = [f"usage: {names}" if name == "usage" else name for name in MEASURES]
    print(f"Routing by layer; entropies also as shares of ln {len(activations)}")
    rows = [[str(i), *format_measures(stats["all"], slice(i, i + 1))] for i in range(len(stats["all"]["usage"]))]
    rows += [["mean", *format_measures(stats["all"])], ["paper", *(paper for paper, _ in MEASURES.values())]]
    print_table([["layer", *header], *rows])
    for name, (_, meaning) in MEASURES.items():
        print(textwrap.fill(f"{name}: {meaning}", 120, subsequent_indent="  "))
    print("\nRouting by domain, averaged over the layers")
    print_table([["domain", *header], *([domain, *format_measures(stats[domain])] for domain in domains)])
    if len(domains) > 1:
        usage = np.array([stats[domain]["usage"] for domain in domains]).swapaxes(0, 1)  # [n_layer, domains, K]
        distances = np.abs(usage[:, :, None] - usage[:, None]).sum(-1).max((1, 2)) / 2  # total variation, 0..1
        print(f"Usage ({names}) by layer and domain; distance: largest share of choices in which two domains differ")
        rows = [[str(i), *map(format_shares, u), f"{d:.1%}"] for i, (u, d) in enumerate(zip(usage, distances))]
        print_table([["layer", *domains, "distance"], *rows])


# ------------------------------------------------------------------------------------------------------------- problems


def is_correct(text: str, answer: str) -> bool:
    """Whether the last line of a generated text states the answer, to the letter."""
    return text.rstrip().rpartition("\n")[2] == f"Answer: {answer}"


def answer_questions(
    model: PolychromaticLM, encoding: tiktoken.Encoding, questions: list[str], batch_size: int | str
) -> list[str]:
    """The model's greedy answer to each question, up to <|im_end|> or the end of its context."""
    prompts = [encode_chat(encoding, [{"role": "user", "content": q}], reply=True)[0].tolist() for q in questions]

    def answer(batch: list[list[int]]) -> list[str]:
        room = max(1, model.config.block_size - max(map(len, batch)))
        return generate_texts(model, encoding, batch, room, stop_tokens(encoding))

    return Batcher(model, batch_size)(answer, prompts, "problems")


def solve_problems(model: PolychromaticLM, encoding: tiktoken.Encoding, cfg: EvalConfig) -> dict[str, dict]:
    """Exact match by family: {family: {"n", "exact_match", "interval"}}, "all" last."""
    held_out = list(problems(cfg.seed, reserved=True, limit=cfg.limit or 40))
    texts = answer_questions(model, encoding, [question for _, question, _, _ in held_out], cfg.batch_size)
    outcomes: dict[str, list[bool]] = {name: [] for name in (*FAMILIES, "all")}
    for (family, _, _, answer), text in zip(held_out, texts):
        for name in (family, "all"):
            outcomes[name].append(is_correct(text, answer))
    results = {}
    for name, correct in outcomes.items():
        n, share = len(correct), sum(correct) / max(1, len(correct))
        results[name] = {"n": n, "exact_match": share, "interval": wilson_interval(sum(correct), n)}
    return results


def print_problems(results: dict[str, dict]):
    rows = [["held-out problems", "n", "exact match", "95% interval"]]
    for name, r in results.items():
        low, high = r["interval"]
        rows.append([name, str(r["n"]), f"{r['exact_match']:.1%}", f"{low:.1%} to {high:.1%}"])
    print_table(rows)


def weights_digest(model: PolychromaticLM) -> str:
    """A hash of the model's settings and weights."""
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def report(model: PolychromaticLM, cfg: EvalConfig, corpus: Corpus, results: dict, folder: Path):
    """Measure and print domain loss and routing, and save the plots."""
    results["data_dir"] = str(corpus.folder)
    results["domains"], samples = measure_domains(model, corpus, Batcher(model, cfg.batch_size))
    print_domains(results["domains"])
    stats = results["routing"] = measure_routing(model, corpus, samples)
    if stats:
        print_routing(stats, model.config.activations)
    else:
        print(f"a plain GLU of {model.config.activations[0]}: there is no routing to measure")
    save_plots(Path(cfg.picture_dir or folder), stats, model.config.activations, read_log(folder))


def main():
    cfg = load(EvalConfig)
    prepare_cpu()
    source, device = Path(cfg.init_from or newest_checkpoint()), pick_device(cfg.device)
    dtype = inference_dtype(cfg.dtype, device)
    model = open_model(source, device, cfg.revision, cfg.router_context)
    folder = source if source.is_dir() else source.parent if source.exists() else Path("out") / source  # a hub name
    wants_report = cfg.report if cfg.report is not None else not (cfg.problems or cfg.tasks)
    corpus = open_corpus(model, cfg, source) if wants_report else None
    encoding = get_tokenizer(model.config.tokenizer, cfg.vocab) if cfg.problems or cfg.tasks else None
    results, file = {"weights": weights_digest(model)}, folder / "eval.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or damaged
        earlier = json.loads(file.read_text(encoding="utf-8"))
        results = earlier if earlier["weights"] == results["weights"] else results
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if corpus:
            report(model, cfg, corpus, results, folder)
            write_json(file, results)
        if cfg.problems:
            results["problems"] = solve_problems(model, encoding, cfg)
            print_problems(results["problems"])
            write_json(file, results)
        if cfg.tasks:
            from extras.harness import run_tasks, task_table

            finished = results.setdefault("tasks", {})
            for name, result in run_tasks(model, encoding, Batcher(model, cfg.batch_size), cfg, str(dtype), finished):
                finished[name] = result
                write_json(file, results)  # a killed run resumes after the last finished task
            print("\nBenchmark tasks, accuracy in percent; the scores of the other models are the paper's")
            print_table(task_table(finished, cfg.tasks))
    print(f"numbers: {file}")


if __name__ == "__main__":
    run(main)
