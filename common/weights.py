"""Load and save models: checkpoints, model folders, the paper's release, Qwen3, on disk or on the hub; upcycling."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from common.run import (
    build_model,
    load_checkpoint,
    name_write_errors,
    read_config,
    read_json,
    write_atomically,
    write_json,
)
from common.settings import UserError, reason
from model import ModelConfig, PolychromaticLM

NAMES = {  # parts of tensor names in other layouts, and ours
    # the paper's release
    "embeddings": "embedding", "output_head": "head", "model_core": "blocks", "rmsnorm": "norm", "gama": "weight",
    "gqa": "attn", "polyglu": "ffn", "W_": "w_", "gate_net.0": "router_in", "gate_net.2": "router_out",
    # Qwen3
    "model.embed_tokens": "embedding", "lm_head": "head", "model.layers": "blocks", "model.norm": "norm",
    "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "self_attn": "attn", "mlp": "ffn",
    "q_norm": "norm_q", "k_norm": "norm_k", "q_proj": "w_q", "k_proj": "w_k", "v_proj": "w_v", "o_proj": "w_o",
    "gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down",
}  # fmt: skip


def from_pretrained(source: str | Path, revision=None, router_context=None) -> PolychromaticLM:
    """A float32 model on the CPU in evaluation mode, from any of four layouts, recognized by their tensor names:

    - a checkpoint of train.py or sft.py, or a run folder that holds one
    - config.json and model.safetensors of save_pretrained()
    - the paper's release or training checkpoint: a "sequence" router, no noise, and the file's tau or 0.1
    - a Qwen3 (config.json, .safetensors, sharded or not): a model with one activation, K = 1
    source: a local path, or owner/name of a model on the hub, at a revision. router_context replaces the model's own.
    Raises UserError, which names the file and the fault.
    """
    config, state, path, isolates_documents = load_weights(source, revision)
    try:
        config = dataclasses.replace(config, router_context=router_context or config.router_context)
    except ValueError as e:  # model.py, which imports nothing from common/, raises no UserError
        raise UserError(str(e)) from None
    model = build_model(config, state, path).eval()
    model.isolates_documents = isolates_documents
    return model


def open_model(
    source: str | Path, device: torch.device, revision=None, router_context=None, fine_tuned=False
) -> PolychromaticLM:
    """from_pretrained()'s model on a device. Notes about it go to stderr: stdout is for generated text.

    fine_tuned: warn if the model was not trained by sft.py to answer questions.
    """
    model = from_pretrained(source, revision, router_context)
    print(f"model: {source}", file=sys.stderr)
    if fine_tuned and is_fine_tuned(source) is False:
        print(f"{source} was never fine-tuned to answer questions; see python sft.py --help", file=sys.stderr)
    if model.config.sees_future:
        print("slow: its router averages the whole row; --router_context=prefix reads only the past", file=sys.stderr)
    return model.to(device)


def load_weights(source: str | Path, revision: str | None = None) -> tuple[ModelConfig, dict[str, Tensor], Path, bool]:
    """Configuration, tensors under our names, and file of a model; arguments and errors as from_pretrained()'s.

    The last value says whether it was trained on isolated documents, as all models of train.py are.
    """
    path = find_weights(source, revision)
    files = sorted(path.glob("model*.safetensors")) or [path]
    config_file, is_safe = files[0].with_name("config.json"), files[0].suffix == ".safetensors"
    try:
        saved = {"model": load_safetensors(files)} if is_safe else load_checkpoint(path)
        state = {re.sub(r"\b(module|_orig_mod)\.", "", name): tensor for name, tensor in saved["model"].items()}
        isolates_documents = state.keys().isdisjoint({"embeddings.weight", "model.embed_tokens.weight"})
        if "embeddings.weight" in state:  # the paper's release, which has no config.json
            state = {"tau": torch.tensor(float(saved.get("tau", 0.1))), **renamed(state)}
            settings = shape_of(state) | {"router_context": "sequence", "gumbel": False}
            settings["router_hidden"] = state["blocks.0.ffn.router_in.weight"].size(0)
        elif "model.embed_tokens.weight" in state:
            state = renamed(state) | {"tau": torch.tensor(1.0)}
            settings = qwen3_settings(saved_settings(config_file), state)
        else:
            settings = saved_settings(config_file) if is_safe else saved["model_config"]
            isolates_documents = settings.pop("isolates_documents", True)  # save_pretrained() writes it
        config = read_config(settings, path)
        if config.tied_head:
            state.pop("head.weight", None)  # a copy of the embedding
        return config, state, path, isolates_documents
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as e:
        fault = f"it lacks {e.args[0]}" if isinstance(e, KeyError) else reason(e)
        raise UserError(f"{path} does not hold a model of this project: {fault}") from None


def load_safetensors(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of .safetensors files. Raises ValueError for a damaged one."""
    safetensors = import_safetensors()
    try:
        return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    except safetensors.SafetensorError as e:
        raise ValueError(str(e)) from None


def saved_settings(config_file: Path) -> dict:
    """The contents of a config.json. Raises ValueError, so that load_weights() names the model with the fault."""
    try:
        return read_json(config_file)
    except UserError as e:
        raise ValueError(str(e)) from None


def import_safetensors():
    """The package, which only model.safetensors needs."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("model.safetensors needs a package: pip install safetensors") from None
    return safetensors


def find_weights(source: str | Path, revision: str | None) -> Path:
    """A model on disk, or from the hub, downloaded into its cache: a file, or a folder of model*.safetensors."""
    path, owner = Path(source), str(source).partition("/")[0]
    is_local = os.path.exists(path)  # Path.exists() raises OSError for a name that is too long
    if is_local and revision:
        raise UserError(f"{source} is a local path, which has no revisions")
    if not is_local:
        try:
            # owner/name may be on the hub, unless it ends like a file or the owner is "out" or a folder here
            is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.pt)(?<!\.safetensors)", str(source))
            if not is_name or owner == "out" or Path(owner).is_dir():
                others = ", ".join(sorted(file.name for file in path.parent.glob("*.pt")))
                hint = f"{path.parent} has {others}" if others else "train one: python train.py config/tiny.py"
                raise FileNotFoundError(f"no such file or folder; {hint}")
            from huggingface_hub import snapshot_download

            patterns = ["*.safetensors", "config.json"]
            path = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
        except Exception as e:  # the package, model, revision or network is missing: each raises its own type
            raise UserError(f"no checkpoint at {source}: {reason(e)}") from None
    if (path / "ckpt.pt").is_file():
        return path / "ckpt.pt"
    if path.is_dir() and not any(path.glob("model*.safetensors")):
        raise UserError(f"no checkpoint at {path / 'ckpt.pt'}, and no model.safetensors beside it")
    return path


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of another layout under our names, without the rotary tables, which are recomputed."""
    pattern = "|".join(map(re.escape, NAMES))
    kept = [name for name in state if not name.startswith("rope.")]
    return {re.sub(pattern, lambda match: NAMES[match[0]], name): state[name] for name in kept}


def shape_of(state: dict[str, Tensor]) -> dict:
    """ModelConfig settings read from the tensors' shapes; the rest by default. Raises KeyError for a missing tensor."""
    embedding, head_dim = state["embedding.weight"], state["blocks.0.attn.norm_q.weight"].numel()
    return vars(ModelConfig()) | {
        "vocab_size": embedding.size(0),
        "n_embd": embedding.size(1),
        "n_layer": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "n_head": state["blocks.0.attn.w_q.weight"].size(0) // head_dim,
        "n_kv_head": state["blocks.0.attn.w_k.weight"].size(0) // head_dim,
        "head_dim": head_dim,
        "d_ff": state["blocks.0.ffn.w_gate.weight"].size(0),
        "tied_head": torch.equal(state.get("head.weight", embedding), embedding),
    }


def qwen3_settings(settings: dict, state: dict[str, Tensor]) -> dict:
    """Settings of ModelConfig for a Qwen3's config.json; raises ValueError for an unsupported setting."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    found = {"rope_type": rope.get("type", "default"), **settings, **rope}
    supported = {"model_type": "qwen3", "attention_bias": False, "use_sliding_window": False, "rope_type": "default"}
    for name, value in supported.items():
        if found.get(name, value) != value:
            raise ValueError(f"config.json asks for {name}={found[name]!r}, which this model does not have")
    return shape_of(state) | {
        "tied_head": found.get("tie_word_embeddings", "head.weight" not in state),
        "block_size": found.get("max_position_embeddings", 32_768),
        "rope_theta": float(found.get("rope_theta", 1_000_000.0)),
        "norm_eps": found.get("rms_norm_eps", 1e-6),
        "activations": (found.get("hidden_act", "silu"),),
    }


def newest_checkpoint(root: Path = Path("out"), fine_tuned: bool = False) -> Path:
    """The most recently written checkpoint under root; with fine_tuned, the most recent that sft.py wrote."""
    found = [path for path in root.glob("**/ckpt.pt") if path.is_file()]  # a symlink may lead nowhere
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if not fine_tuned or is_fine_tuned(path):
                return path
        except UserError as e:
            print(f"skipped: {e}", file=sys.stderr)
    found, command = f"no checkpoint under {root}", "train.py config/tiny.py"
    if fine_tuned:
        found, command = f"no fine-tuned model under {root}", "sft.py config/tiny_sft.py"
    raise UserError(f"{found}; train one: python {command}, or name one: --init_from=")


def is_fine_tuned(source: str | Path) -> bool | None:
    """Whether sft.py made this checkpoint or run; None: no run of ours, so nothing says what it was trained on."""
    path = Path(source) / "ckpt.pt" if Path(source).is_dir() else Path(source)
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    domains = load_checkpoint(path, verify=False).get("domains")
    return domains and any(isinstance(counts, dict) and "val_targets" in counts for counts in domains.values())


# ------------------------------------------------------------------------------------------------ a run's first weights


def inherit_shape(cfg, shape: dict, source: str | Path):
    """Copy the starting model's shape into cfg. Raises UserError for an override that contradicts its weights."""
    free = {"block_size", "gumbel", "router_context", "router_centred", "tokenizer"}  # no weight depends on these
    if len(shape["activations"]) == 1 and set(shape["activations"]) <= set(cfg.activations):
        free |= {"activations", "router_hidden"}  # upcycling
    for name, theirs in shape.items():
        ours = getattr(cfg, name)
        if name not in cfg.overridden:
            setattr(cfg, name, theirs)
        elif ours != theirs and name not in free:
            raise UserError(f"{source} has {name}={theirs!r}, not {ours!r}")


def starting_model(cfg) -> PolychromaticLM:
    """The model that cfg.init_from names, upcycled if cfg has more activations. Copies its shape into cfg."""
    config, state, path, _ = load_weights(cfg.init_from, cfg.revision)
    # The rows of a run are as long as asked for, by default at most 4,096: a Qwen3's own context is 32,768 tokens.
    inherit_shape(cfg, vars(config) | {"block_size": min(cfg.block_size, config.block_size)}, cfg.init_from)
    if cfg.block_size != config.block_size:
        print(f"block_size is {cfg.block_size:,}; {cfg.init_from} has {config.block_size:,}; --block_size= sets it")
    if cfg.activations != config.activations:
        print(f"upcycling {'/'.join(config.activations)} to {'/'.join(cfg.activations)}: nearly the same function")
        torch.manual_seed(cfg.seed)
        state = upcycle(state, cfg.model_config(), config.activations[0], cfg.tau_start)
    print(f"starting from the model of {cfg.init_from}")
    model = build_model(cfg.model_config(), state, path)
    tau = model.blocks[0].ffn.tau.item()
    if len(config.activations) > 1 and abs(tau - cfg.tau_start) > 1e-3 and not cfg.eval_only:
        print(f"tau starts at {cfg.tau_start:g}; {cfg.init_from} has {tau:g}; --tau_start= sets it")
    return model


def upcycle(state: dict[str, Tensor], config: ModelConfig, activation: str, tau: float) -> dict[str, Tensor]:
    """Weights with routing that at temperature tau give nearly the same function as the plain GLU of this activation.

    The activation gets e^10 times the weight of each other one, in every neuron; the router's output starts at zero.
    With noise, which a low tau does not reduce, alpha is at least 10, so that training starts from that function too.
    """
    R, K = config.router_hidden, len(config.activations)
    state = {name: tensor for name, tensor in state.items() if not name.endswith("tau")} | {"tau": torch.tensor(tau)}
    alpha = torch.zeros(config.d_ff, K)
    alpha[:, config.activations.index(activation)] = 10 * (max(tau, 1.0) if config.gumbel else tau)
    for i in range(config.n_layer):
        state[f"blocks.{i}.ffn.alpha"] = alpha
        if R:
            state[f"blocks.{i}.ffn.beta"] = torch.ones(K)
            state[f"blocks.{i}.ffn.router_in.weight"] = 0.02 * torch.randn(R, config.n_embd)
            state[f"blocks.{i}.ffn.router_in.bias"] = torch.zeros(R)
            state[f"blocks.{i}.ffn.router_out.weight"] = torch.zeros(K, R)
            state[f"blocks.{i}.ffn.router_out.bias"] = torch.zeros(K)
    return state


def freeze(model: PolychromaticLM, parts: tuple[str, ...]):
    """Freeze parameters whose names contain one of the parts. Raises UserError if a part matches none."""
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(part in name for name in names):
            kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.|\.weight$", "", name) for name in names)
            raise UserError(f"frozen: no parameter has {part!r} in its name; there are {', '.join(kinds)}")
    for name, p in model.named_parameters():
        if any(part in name for part in parts):
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"frozen: {','.join(parts)} leaves nothing to train")


def save_pretrained(model: PolychromaticLM, directory: str | Path):
    """Write config.json and model.safetensors for from_pretrained(). UserError if the folder holds another model."""
    safetensors, directory = import_safetensors(), Path(directory)
    if (directory / "ckpt.pt").exists() or any(directory.glob("model-*.safetensors")):
        raise UserError(f"{directory} has another model, which from_pretrained() would read; choose another folder")
    with name_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    config = {"isolates_documents": model.isolates_documents, **dataclasses.asdict(model.config)}
    write_json(directory / "config.json", config)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(directory / "model.safetensors", lambda file: file.write(safetensors.torch.save(tensors)))
