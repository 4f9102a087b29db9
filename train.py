"""
Train SmolLM2-135M, or a small sibling of it, from scratch. Every checkpoint is a Hugging Face model folder.

$ python train.py                                            # tiny on a CPU, 135m on a GPU; Ctrl-C it, run it again
$ python train.py --size=135m --batch_size=4 --max_iters=100 # any global of the config block can be overridden
$ torchrun --standalone --nproc_per_node=8 train.py          # eight GPUs: the same batches, the same losses
$ python train.py --init_from=HuggingFaceTB/SmolLM2-135M --learning_rate=1e-4 --out_dir=out-tuned  # fine-tune
"""
import contextlib, csv, functools, json, math, os, shutil, signal, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

import prepare
from prepare import check, configure, fail

# ----------------------------------------------------------------------------------------------------------- config
# a value left at 0, -1 or auto comes from the checkpoint that is resumed, else from the row of its size in SIZES
out_dir = "out"                  # checkpoints, log.csv and loss.png of one run
data_dir = "data"                # what prepare.py wrote; if there is none, input.txt is prepared
init_from = "auto"               # auto (resume if out_dir has a checkpoint), scratch, resume, or a model folder / hub id
eval_interval = 250              # iterations between evaluations, each with a checkpoint and a sample
log_interval = 10                # iterations between rows of log.csv
eval_only = False                # evaluate once and end
wandb_log = False                # log to Weights & Biases too
batch_size = 0                   # sequences in a micro-batch, at most
gradient_accumulation_steps = 0  # times batch_size: sequences in an iteration, over all processes
block_size = 0                   # tokens in a sequence: the context length
size = "auto"                    # auto (135m on a GPU, tiny on a CPU), tiny, 135m, 360m, 1.7b
n_layer = 0                      # layers
n_head = 0                       # query heads
n_kv_head = 0                    # key and value heads; divides n_head
n_embd = 0                       # channels
intermediate_size = 0            # channels inside the MLP
vocab_size = 0                   # rows of the embedding; of tiny, as many as the tokenizer has ids
rope_theta = 0.0                 # base of the rotary embedding
norm_eps = 0.0                   # added inside RMSNorm
dropout = 0.0                    # probability, on the embedding and on both branches of a layer
optimizer = "auto"               # adamw, or muon: Muon for the layers' matrices, AdamW for the rest
learning_rate = 0.0              # peak, of AdamW
muon_learning_rate = 0.0         # peak, of Muon; it follows the same schedule
max_iters = 0                    # iterations: optimizer updates
weight_decay = 0.1               # of matrices
beta1 = 0.9                      # of AdamW
beta2 = 0.95                     # of AdamW
grad_clip = 1.0                  # largest norm of the gradient; 0: no limit
schedule = "cosine"              # cosine, or wsd (constant, then linear over the last fifth)
warmup_iters = -1                # linear warm-up; -1: a twentieth of max_iters
lr_decay_iters = -1              # iteration from which on the rate is min_lr; -1: max_iters of the run's first start
min_lr = -1.0                    # -1: a tenth of learning_rate
gradient_checkpointing = False   # recompute layers in the backward pass: less memory, more time
seed = 1337                      # of weights, data order and dropout
device = "auto"                  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"                   # of matrix products: auto, float32, bfloat16, float16
compile = "auto"                 # auto, true, false
# ------------------------------------------------------------------------------------------------------ model sizes
config_keys = [k for k, v in globals().items() if not k.startswith("_") and isinstance(v, (bool, int, float, str))]
SIZES = {  # the last three have the shapes of SmolLM2 (arXiv:2502.02737)
    "tiny": dict(
        n_layer=3, n_head=3, n_kv_head=1, n_embd=192, intermediate_size=512, vocab_size=0, rope_theta=1e5, norm_eps=1e-5,
        block_size=128, batch_size=8, gradient_accumulation_steps=1, max_iters=2000,
        optimizer="muon", learning_rate=4e-3, muon_learning_rate=0.03),
    "135m": dict(
        n_layer=30, n_head=9, n_kv_head=3, n_embd=576, intermediate_size=1536, vocab_size=49152, rope_theta=1e5,
        norm_eps=1e-5, block_size=2048, batch_size=16, gradient_accumulation_steps=16, max_iters=10_000,
        optimizer="adamw", learning_rate=3e-3, muon_learning_rate=0.02)}
SIZES["360m"] = SIZES["135m"] | dict(n_layer=32, n_head=15, n_kv_head=5, n_embd=960, intermediate_size=2560)
SIZES["1.7b"] = SIZES["135m"] | dict(
    n_layer=24, n_head=32, n_kv_head=32, n_embd=2048, intermediate_size=8192, rope_theta=1.3e5, learning_rate=5e-4)
AUTOMATIC = dict.fromkeys(SIZES["tiny"], 0) | dict.fromkeys(("warmup_iters", "lr_decay_iters", "min_lr"), -1) | {
    "size": "auto", "optimizer": "auto"}  # the values that are to be filled in
ONLY = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # the Llamas known here
HF_NAMES = {  # how config.json calls the shape
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size", "intermediate_size": "intermediate_size", "vocab_size": "vocab_size",
    "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps"}
PEAK_FLOPS = {  # a second, dense, in the dtype chosen for it, by the makers' data sheets
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "L4": 121e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12, "V100": 125e12, "T4": 65e12}
LOG_COLUMNS = ("iter", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_second")

# ------------------------------------------------------------------------------------------------------------ model
def rotate(x, cos, sin):
    """Rotary position embedding (RoFormer, arXiv:2104.09864) of x (B, heads, T, head_dim), paired in halves."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, C, bias=False)

    def forward(self, x, rope, cache, position):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:  # two tensors (B, n_kv_head, places, head_dim), the first `position` places filled
            for kept, new in zip(cache, (k, v)):
                kept[:, :, position:position + T] = new
            k, v = (kept[:, :, :position + T] for kept in cache)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rope, cache=None, position=0):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, cache, position))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))

def slice_loss(x, weight, targets):
    """Summed cross-entropy, in nats, of the logits x @ weight.T (N, V) against targets (N,); those of -1 do not count."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1, reduction="sum")

class SlicedLoss(torch.autograd.Function):
    """slice_loss, a slice of tokens at a time: the (N, V) logits never exist as a whole, because their gradient is taken
    in the forward pass, while a slice's logits are at hand (Liger Kernel, arXiv:2410.10989)."""
    @staticmethod
    def forward(ctx, x, weight, targets, step):
        ctx.x_grad, ctx.weight_grad, total = torch.empty_like(x), torch.zeros_like(weight), 0.0
        for i in range(0, len(x), step):
            with torch.enable_grad():
                part, matrix = x[i:i + step].detach().requires_grad_(), weight.detach().requires_grad_()
                loss = slice_loss(part, matrix, targets[i:i + step])
            ctx.x_grad[i:i + step], matrix_grad = torch.autograd.grad(loss, (part, matrix))
            ctx.weight_grad += matrix_grad
            total = total + loss.detach()
        return total

    @staticmethod
    def backward(ctx, scale):
        return ctx.x_grad * scale, ctx.weight_grad.mul_(scale), None, None

class Llama(nn.Module):
    """Hugging Face's LlamaForCausalLM, tensor for tensor; `config` holds what its config.json does."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        frequency = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angle = torch.outer(torch.arange(config.max_position_embeddings).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):  # what they add up to keeps its size (GPT-2)
                nn.init.normal_(p, std=config.initializer_range / math.sqrt(2 * config.num_hidden_layers))
            else:
                nn.init.normal_(p, std=config.initializer_range)

    def forward(self, tokens, targets=None, cache=None, position=0):
        """Logits (B, T, V) of tokens (B, T); with targets (B, T), the summed loss instead; with a key/value cache, whose
        first `position` places are filled, the logits of the last token alone (B, 1, V)."""
        x = F.dropout(self.model.embed_tokens(tokens), dropout, self.training)
        rope = [table[position:position + tokens.shape[1]].to(x.dtype) for table in (self.cos, self.sin)]
        for i, layer in enumerate(self.model.layers):
            if gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope, cache and cache[i], position)
        x = self.model.norm(x if cache is None else x[:, -1:])
        weight = self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight
        if targets is None:
            return F.linear(x, weight)
        x, targets, step = x.flatten(0, 1), targets.flatten(), max(1, 2 ** 25 // len(weight))  # 128 MiB of logits
        if torch.is_grad_enabled():
            return SlicedLoss.apply(x, weight, targets, step)
        return sum(slice_loss(part, weight, t) for part, t in zip(x.split(step), targets.split(step)))

# ------------------------------------------------------------------------------------------------------------- data
@functools.lru_cache(1)
def epoch_order(seed, epoch, windows, block_size):
    """An epoch's (offset of the first window, order of the windows). Ten million windows take half a second, 80 MB."""
    rng = np.random.default_rng([seed, epoch])
    return rng.integers(block_size), rng.permutation(windows)

def window_starts(iteration, n_tokens):
    """First tokens of the sequences of an iteration, a function of it and the seed alone: each epoch goes once through
    all windows of block_size tokens, in an order and from an offset of its own."""
    sequences, windows = batch_size * gradient_accumulation_steps, n_tokens // block_size - 1
    starts = []
    for index in range(iteration * sequences, (iteration + 1) * sequences):
        offset, order = epoch_order(seed, index // windows, windows, block_size)
        starts.append(offset + order[index % windows] * block_size)
    return starts

def get_windows(split, starts, device):
    """The tokens from each of `starts` on, and their targets, both (len(starts), block_size); -1 past the end."""
    data = np.memmap(Path(data_dir, f"{split}.bin"), "<u2", "r")  # mapped anew, or all that was read stays in memory
    batch = np.full((len(starts), block_size + 1), -1)
    for row, start in zip(batch, starts):
        row[:len(data[start:start + block_size + 1])] = data[start:start + block_size + 1]
    if batch.max() >= vocab_size:
        fail(f"{data_dir}/{split}.bin holds id {batch.max()}, past the model's {vocab_size}: run prepare.py again")
    batch = torch.from_numpy(batch)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch[:, :-1].clamp(min=0), batch[:, 1:]

# ------------------------------------------------------------------------------------------- optimizer and schedule
def make_optimizers(model):
    """[AdamW for everything], or [AdamW for the embedding and the norms, Muon (Jordan, 2024) for the layers' matrices]."""
    params = list(model.parameters())
    vectors = [p for p in params if p.dim() == 1]
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    tables = [p for p in params if p.dim() == 2 and all(p is not h for h in hidden)]
    assert len(vectors) + len(hidden) + len(tables) == len(params)
    groups = [{"params": tables + hidden * (optimizer == "adamw")}, {"params": vectors, "weight_decay": 0.0}]
    fused = params[0].device.type in ("cpu", "cuda")
    result = [torch.optim.AdamW(groups, learning_rate, (beta1, beta2), weight_decay=weight_decay, fused=fused)]
    if optimizer == "muon":
        result.append(torch.optim.Muon(hidden, muon_learning_rate, weight_decay))
    for group in (group for one in result for group in one.param_groups):
        group["initial_lr"] = group["lr"]
    return result

def schedule_factor(iteration):
    """What the peak rates are multiplied by for the update that follows `iteration` others."""
    low = min_lr / learning_rate
    if iteration < warmup_iters:
        return (iteration + 1) / (warmup_iters + 1)
    if iteration >= lr_decay_iters:
        return low
    if schedule == "wsd":  # warm-up, stable, decay (MiniCPM, arXiv:2404.06395)
        high = min(1, (lr_decay_iters - iteration) / (lr_decay_iters / 5))
    else:
        high = 0.5 + 0.5 * math.cos(math.pi * (iteration - warmup_iters) / (lr_decay_iters - warmup_iters))
    return low + (1 - low) * high

# ------------------------------------------------------------------------------------------------------- checkpoint
def checkpoints(folder):
    """[(iteration, validation loss or inf, path)] of the checkpoints in an out folder, the newest last."""
    found = []
    for path in Path(folder).glob("step-*"):
        try:
            with safe_open(path / "model.safetensors", "pt") as file:
                found.append((int(path.name[5:]), float(file.metadata()["val_loss"]), path))
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            fail(f"{path} is damaged ({error}): move it away, and what is left will be used")
    return sorted(found)

def save_checkpoint(model, iteration, val_loss, trainer):
    """Write out_dir/step-<iteration>, which appears whole or not at all; then keep only the newest and the best."""
    path, tmp, c = Path(out_dir, f"step-{iteration:07d}"), Path(out_dir, "tmp"), model.config
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            fail(f"{name} is not finite at iteration {iteration}, not saved: run again with a lower --learning_rate")
    eot = Tokenizer.from_file(f"{data_dir}/tokenizer.json").id_to_token(c.eos_token_id)
    files = {"config.json": vars(c), "generation_config.json": {"eos_token_id": c.eos_token_id},
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eot, "bos_token": eot,
                                       "clean_up_tokenization_spaces": False}}
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        save_file(model.state_dict(), tmp / "model.safetensors", {"format": "pt", "val_loss": str(val_loss)})
        torch.save(trainer, tmp / "trainer.pt")
        shutil.copy(f"{data_dir}/tokenizer.json", tmp)
        for name, content in files.items():
            Path(tmp, name).write_text(json.dumps(content, indent=2))
        for file in (*tmp.iterdir(), tmp):
            flush(file)
        tmp.rename(path)
        flush(out_dir)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        fail(f"cannot save {path}: {error}; earlier checkpoints are whole, so make room and run again")
    saved = checkpoints(out_dir)
    best = min(saved, key=lambda entry: entry[1])
    for _, _, old in set(saved) - {saved[-1], best}:
        old.rename(tmp)  # first, so that no step- folder is ever half there
        shutil.rmtree(tmp)

def flush(path):
    """Bring a file, or a folder's list of files, to the disk itself."""
    if os.name == "posix":
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

# ------------------------------------------------------------------------------------------------------------ setup
def choose_device(name):
    """torch.device of a --device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        fail(f"--device={name}, but PyTorch finds no GPU: use --device=cpu, or install a CUDA build of torch")
    return torch.device(name)

def setup():
    """Join the other processes, if torchrun started any: (rank, world size, torch.device)."""
    torch.set_float32_matmul_precision("high")  # TF32 where float32 products remain
    target = choose_device(device)
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, target
    if target.type == "cuda":
        target = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(target)
    dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), target

def fill(values):
    """Set the globals that still have their automatic value."""
    globals().update({k: v for k, v in values.items() if k in AUTOMATIC and globals()[k] == AUTOMATIC[k]})

def check_settings(sequences, world):
    """Refuse, in one line, what cannot work."""
    at_least_1 = ("eval_interval log_interval batch_size gradient_accumulation_steps block_size n_layer n_head n_kv_head n_embd "
                  "intermediate_size vocab_size max_iters lr_decay_iters").split()
    check(globals(), dict.fromkeys(at_least_1, (1, 10 ** 12)) | {
        "rope_theta": (1, 1e9), "norm_eps": (0, 1), "dropout": (0, 0.99), "beta1": (0, 0.9999), "beta2": (0, 0.9999),
        "weight_decay": (0, 1e3), "grad_clip": (0, 1e9), "learning_rate": (1e-9, 1e3), "muon_learning_rate": (1e-9, 1e3),
        "min_lr": (0, learning_rate), "warmup_iters": (0, min(max_iters, lr_decay_iters)), "seed": (0, 2 ** 31),
        "optimizer": ["adamw", "muon"], "schedule": ["cosine", "wsd"], "compile": ["auto", "true", "false"],
        "dtype": ["auto", "float32", "bfloat16", "float16"]})
    for remainder, problem in (
            (n_embd % n_head, f"--n_embd={n_embd} must be a multiple of --n_head={n_head}"),
            (n_head % n_kv_head, f"--n_head={n_head} must be a multiple of --n_kv_head={n_kv_head}"),
            (n_embd // n_head % 2, f"--n_embd={n_embd} over --n_head={n_head} gives an odd head size, which cannot rotate"),
            (sequences % world, f"{sequences} sequences an iteration cannot be shared by {world} processes: change batch_size")):
        if remainder:
            fail(problem)

def choose_precision(device):
    """torch.dtype of the matrix products."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and n_embd >= 512 else torch.float32

# --------------------------------------------------------------------------------------------- evaluation, reporting
@torch.no_grad()
def evaluate(model, meta, micro, rank, world, device):
    """The whole validation split in fixed windows, shared by all processes: (nats per token, bits per byte)."""
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), meta["val_tokens"] - 1
    for i in range(rank, math.ceil(count / block_size / micro), world):
        total += model(*get_windows("val", (i * micro + np.arange(micro)) * block_size, device))
    if world > 1:
        dist.all_reduce(total)
    model.train()
    return total.item() / count, total.item() / math.log(2) / meta["val_bytes"]

def open_log(rows):
    """log.csv, made anew from `rows`, as a csv writer. While it is open, no other run can have out_dir."""
    file = open(Path(out_dir, "log.csv"), "a", newline="", buffering=1)
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is using {out_dir}: wait for it to end, or choose another --out_dir")
    file.truncate(0)
    log = csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n")
    log.writeheader()
    log.writerows(rows)
    return log

def draw_curve(rows):
    """Draw the log as out_dir/loss.png."""
    from matplotlib.figure import Figure
    figure = Figure((8, 5), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for axes, key, style in (losses, "train_loss", "-"), (losses, "val_loss", "o-"), (rates, "lr", "-"):
        points = [(row["iter"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points), style, label=key, markersize=3, linewidth=1)
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    losses.plot(best["iter"], best["val_loss"], "r*", label=f"best: {best['val_loss']:.4f} at {best['iter']:,}")
    losses.set(ylabel="loss (nats per token)", yscale="log")
    losses.legend()
    rates.set(xlabel="iteration", ylabel="learning rate")
    figure.savefig(Path(out_dir, "loss.png"), dpi=120)

def open_data(source):
    """meta.json of data_dir, once that is seen to be whole and to fit the model folder `source`, if there is one."""
    try:
        meta = json.loads(Path(data_dir, "meta.json").read_text())
        sizes = [Path(data_dir, f"{split}.bin").stat().st_size for split in ("train", "val")]
        tokenizer = prepare.fingerprint(f"{data_dir}/tokenizer.json")
        if sizes != [2 * meta["train_tokens"], 2 * meta["val_tokens"]] or tokenizer != meta["tokenizer_sha256"]:
            raise ValueError("its files do not belong together")
        if source and prepare.fingerprint(f"{source}/tokenizer.json") != tokenizer:
            raise ValueError(f"it was made with another tokenizer than {source}, which --tokenizer={source} gives")
        if meta["train_tokens"] < 2 * block_size:
            raise ValueError(f"{meta['train_tokens']:,} tokens are less than two sequences of --block_size={block_size}")
    except Exception as error:  # the tokenizers library raises nothing more special
        fail(f"cannot train on {data_dir}: {error}; run python prepare.py --data_dir={data_dir} --input=YOUR_TEXT")
    return meta

def load_trainer(path):
    """What save_checkpoint was given as `trainer`. Only plain values and tensors are read: no pickle runs code here."""
    try:
        return torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        fail(f"{path}/trainer.pt is damaged ({type(error).__name__}): move {path} away to resume from an older checkpoint, "
             f"or start anew from its weights with --init_from={path} --out_dir=another")

def try_micro_batches(model, per_process, starts, device, autocast, say):
    """The largest micro-batch, of at most batch_size sequences, whose forward and backward pass fits into memory. If the
    compiler fails on the way, all goes on without it."""
    sizes = [n for n in range(batch_size, 0, -1) if per_process % n == 0]
    while True:
        try:
            moments = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]  # AdamW and DDP will need them
            with autocast:
                model(*get_windows("train", starts[:sizes[0]], device)).backward()
            return sizes[0]
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                sizes = [n for n in sizes if n <= sizes[0] // 2]
                if not sizes:
                    fail(f"out of memory with a single sequence: lower --block_size={block_size} or choose a smaller --size")
                say(f"out of memory: micro-batches of {sizes[0]} sequences from now on, as many tokens per iteration")
            elif isinstance(error, torch._dynamo.exc.TorchDynamoException):
                say(f"compiling failed ({type(error).__name__}), running without; --compile=false does so from the start")
                torch.compiler.set_stance("force_eager")
            else:
                raise
        finally:
            moments = None
            model.zero_grad()

# ------------------------------------------------------------------------------------------------------------- main
def main():
    global slice_loss
    import sample  # which imports this file
    configure(globals(), sys.argv[1:])
    rank, world, device = setup()
    say = (lambda line: tqdm.write(line)) if rank == 0 else (lambda line: None)
    if size not in ("auto", *SIZES):
        fail(f"--size={size}: choose one of auto, {', '.join(SIZES)}")

    # where to start: at the newest checkpoint of this run, at another model, or from scratch
    saved = checkpoints(out_dir)
    if init_from == "scratch" and saved:
        fail(f"{out_dir} holds a run: --init_from=resume continues it; a new one needs another --out_dir")
    if init_from == "resume" and not saved:
        fail(f"{out_dir} holds no checkpoint to resume: use --init_from=auto, or another --out_dir")
    source = saved[-1][2] if saved else sample.find_model(init_from) if init_from not in ("auto", "scratch") else None
    trainer = load_trainer(source) if saved else {"iteration": 0, "rows": [], "settings": {}}
    fill(SIZES.get(size, {}))
    shape_asked = {key: globals()[key] for key in HF_NAMES if globals()[key]}
    fill(trainer["settings"])
    fill({"size": "135m" if device.type == "cuda" else "tiny"})
    fill(SIZES[size])
    fill({"lr_decay_iters": max_iters, "min_lr": learning_rate / 10, "warmup_iters": min(max_iters // 20, 2000)})
    if rank == 0:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        log = open_log(trainer["rows"])
        if not Path(data_dir, "train.bin").exists():
            prepare.prepare(prepare.input, str(source or prepare.tokenizer), prepare.vocab_size, prepare.val_fraction, data_dir)
    if world > 1:
        dist.barrier()
    meta = open_data(source)
    torch.manual_seed(seed)
    if source:
        raw = sample.load_model(source)
        globals().update({key: getattr(raw.config, name) for key, name in HF_NAMES.items()})
        for key, value in shape_asked.items():
            if value != globals()[key]:
                fail(f"--{key}={value}, but {source} has {globals()[key]}: leave it out, or choose another --out_dir")
    fill({"vocab_size": meta["vocab_size"]})
    sequences = batch_size * gradient_accumulation_steps
    check_settings(sequences, world)
    if not source:
        raw = Llama(SimpleNamespace(
            **ONLY, **{name: globals()[key] for key, name in HF_NAMES.items()}, architectures=["LlamaForCausalLM"],
            tie_word_embeddings=True, head_dim=n_embd // n_head, max_position_embeddings=block_size,
            initializer_range=n_embd ** -0.5, bos_token_id=meta["eos_token_id"], eos_token_id=meta["eos_token_id"]))
    raw.to(device).train()
    precision = choose_precision(device)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    optimizers, scaler = make_optimizers(raw), torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    if saved:
        if trainer["settings"]["optimizer"] != optimizer:
            fail(f"--optimizer={optimizer}, but {source} was trained with {trainer['settings']['optimizer']}")
        for one, state in zip(optimizers, trainer["optimizers"]):  # their state alone: the settings are today's
            one.load_state_dict({"state": state, "param_groups": one.state_dict()["param_groups"]})
        scaler.load_state_dict(trainer["scaler"])
    compiled = compile.lower() == "true" or compile == "auto" and (
        device.type == "cuda" or device.type == "cpu" and n_embd >= 512)  # on a CPU small models run as fast without
    if compiled:
        for layer in raw.model.layers:  # one at a time: the first compiles, the others are as good as free
            layer.compile(dynamic=False)
        slice_loss = torch.compile(slice_loss, dynamic=False)
    per_process, iteration, rows = sequences // world, trainer["iteration"], trainer["rows"]
    micro = try_micro_batches(raw, per_process, window_starts(0, meta["train_tokens"]), device, autocast, say)
    model = nn.parallel.DistributedDataParallel(raw) if world > 1 else raw

    # what will happen
    settings = {key: globals()[key] for key in config_keys}
    changed = [f"{key} {old} -> {settings.get(key)}" for key, old in trainer["settings"].items() if settings.get(key) != old]
    kinds = {"norms": "norm", "attention": "self_attn", "MLP": "mlp", "embedding": ""}
    parts = dict.fromkeys(kinds, 0)
    for name, p in raw.named_parameters():
        parts[next(kind for kind, word in kinds.items() if word in name)] += p.numel()
    total, tokens = sum(parts.values()), sequences * block_size
    flops = 6 * total + 12 * n_layer * n_embd * block_size  # a token, forward and backward (PaLM, arXiv:2204.02311)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in chip), None)
    say(f"device: {world} x {chip}, {str(precision)[6:]}, {'compiled' if compiled else 'not compiled'}; size {size}")
    say(f"model: {total:,} parameters ({', '.join(f'{kind} {n:,}' for kind, n in parts.items())}), {flops:.3g} FLOPs per token")
    say(f"data: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate; "
        f"{max_iters * tokens / meta['train_tokens']:.1f} epochs in {max_iters:,} iterations")
    say(f"iteration: {tokens:,} tokens = {world} process(es) x {per_process // micro} micro-batch(es) x {micro} x {block_size}")
    if source:
        say(f"from: {source}" + (f", changed: {', '.join(changed)}" if changed else ""))

    signals = []
    def ask_to_stop(number, frame):
        if signals and (world == 1 or time.time() > signals[0] + 2):  # torchrun repeats the Ctrl-C it shares with us
            os._exit(128 + number)
        signals.append(time.time())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)

    # the loop: evaluate, save, stop, update, log
    tokenizer = Tokenizer.from_file(f"{data_dir}/tokenizer.json")
    options = {key: getattr(sample, key) for key in sample.OPTIONS} | {"max_new_tokens": 100, "seed": seed}
    def own_sequences(number):
        starts = window_starts(number, meta["train_tokens"])[rank * per_process:(rank + 1) * per_process]
        return get_windows("train", starts, device)
    bar = tqdm(total=max_iters, initial=iteration, disable=None if rank == 0 else True, dynamic_ncols=True)
    inputs, targets = own_sequences(iteration)
    row, skipped, stopping, first = {}, 0, False, iteration if saved else -1
    clock, clock_iteration = time.perf_counter(), iteration
    while True:
        due = iteration % eval_interval == 0 or iteration >= max_iters
        if (due and iteration > first) or eval_only:
            with autocast:
                val_loss, val_bpb = evaluate(raw, meta, micro, rank, world, device)
            row |= {"iter": iteration, "val_loss": val_loss, "val_bpb": val_bpb}
            say(f"iteration {iteration:,}: validation loss {val_loss:.4f}, perplexity {math.exp(val_loss):.2f}, "
                f"{val_bpb:.4f} bits per byte")
        if rank == 0 and row:
            rows.append(row)
            log.writerow(row)
        if rank == 0 and iteration > first and (due or stopping) and not eval_only:
            save_checkpoint(raw, iteration, row.get("val_loss", math.inf), {
                "iteration": iteration, "rows": rows, "settings": settings, "scaler": scaler.state_dict(),
                "optimizers": [one.state_dict()["state"] for one in optimizers]})
            draw_curve(rows)
            if not stopping:
                raw.eval()
                with torch.compiler.set_stance("force_eager"):
                    pieces = list(sample.stream(raw, tokenizer, [meta["eos_token_id"]], 1, **options))
                raw.train()
                say("".join(piece for piece, in pieces))
        if stopping or iteration >= max_iters or eval_only:
            break
        if due:
            clock, clock_iteration = time.perf_counter(), iteration

        torch.manual_seed(seed + iteration * world + rank)  # dropout, too, is a function of the iteration
        factor = schedule_factor(iteration)
        for group in (group for one in optimizers for group in one.param_groups):
            group["lr"] = group["initial_lr"] * factor
        loss = torch.zeros((), device=device)
        for n in range(0, per_process, micro):
            model.require_backward_grad_sync = n + micro == per_process  # DDP: once per iteration
            with autocast:
                part = model(inputs[n:n + micro], targets[n:n + micro]) / targets.numel()
            scaler.scale(part).backward()
            loss += part.detach()
        for one in optimizers:
            scaler.unscale_(one)
        norm = nn.utils.get_total_norm([p.grad for p in raw.parameters()])
        begin, (inputs, targets) = inputs[0, :30].tolist(), own_sequences(iteration + 1)  # while the device is at work
        stats = torch.stack((loss, norm, torch.tensor(float(len(signals)), device=device)))
        if world > 1:
            dist.all_reduce(stats)
        loss, norm, stopping = (stats / world).tolist()
        if math.isfinite(loss + norm):
            skipped = 0
            if norm > grad_clip > 0:
                nn.utils.clip_grads_with_norm_(raw.parameters(), grad_clip, torch.tensor(norm, device=device))
            for one in optimizers:
                scaler.step(one)
        else:
            skipped += 1
            say(f"iteration {iteration:,}: loss {loss}, gradient norm {norm}: no update")
            if skipped == 5:
                fail(f"five iterations without a finite gradient, up to {iteration:,}, learning rate "
                     f"{learning_rate * factor:.3g}, text beginning {tokenizer.decode(begin)!r}: lower --learning_rate")
        scaler.update()
        raw.zero_grad()
        iteration += 1
        row = {}
        bar.update()
        if iteration % log_interval == 0 or iteration % eval_interval == 0 or iteration == max_iters:
            speed = (iteration - clock_iteration) * tokens / (time.perf_counter() - clock)
            clock, clock_iteration = time.perf_counter(), iteration
            row = {"iter": iteration, "train_loss": loss, "lr": learning_rate * factor, "grad_norm": norm,
                   "tokens_per_second": round(speed)}
            facts = {"loss": f"{loss:.4f}", "lr": f"{learning_rate * factor:.2e}", "tokens/s": f"{speed:,.0f}"}
            if peak:
                facts["MFU"] = f"{speed * flops / peak / world:.1%}"
            bar.set_postfix(facts)
            if bar.disable:
                say(f"iteration {iteration:,}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    bar.close()
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
