"""
Train SmolLM2-135M, or a small sibling of it, from scratch. Every checkpoint is a Hugging Face model folder.

$ python train.py                                            # tiny on a CPU, 135m on a GPU; Ctrl-C it, run it again
$ python train.py --size=135m --batch_size=4 --max_iters=100 # any value of the config block can be given like this
$ torchrun --standalone --nproc_per_node=8 train.py          # eight GPUs: the same batches, the same losses
$ python train.py --init_from=HuggingFaceTB/SmolLM2-135M --learning_rate=1e-4 --out_dir=out-tuned  # fine-tune
"""
import contextlib, csv, functools, importlib.util, json, math, os, re, shutil, signal, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import prepare
from prepare import check, configure, fail

@contextlib.contextmanager
def explained(problem):
    """Turn what goes wrong inside, of whatever kind, into one line on stderr."""
    try:
        yield
    except Exception as error:
        fail(f"{problem} ({type(error).__name__}: {' '.join(str(error).split())[:300]})")

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
HF_NAMES = {  # the shape, and what config.json calls it
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size", "intermediate_size": "intermediate_size", "vocab_size": "vocab_size",
    "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps"}
ONLY = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # the Llamas known here
RECIPE = (*HF_NAMES, "block_size", "batch_size", "gradient_accumulation_steps", "max_iters", "optimizer", "learning_rate",
          "muon_learning_rate")
SIZES = {name: dict(zip(RECIPE, row)) for name, row in {  # shapes of SmolLM2 (arXiv:2502.02737), and a tiny one
    "tiny": (3, 3, 1, 192, 512, 0, 1e5, 1e-5, 128, 8, 1, 2000, "adamw", 4e-3, 0.03),
    "135m": (30, 9, 3, 576, 1536, 49152, 1e5, 1e-5, 2048, 16, 16, 10_000, "adamw", 3e-3, 0.02),
    "360m": (32, 15, 5, 960, 2560, 49152, 1e5, 1e-5, 2048, 8, 32, 10_000, "adamw", 3e-3, 0.02),
    "1.7b": (24, 32, 32, 2048, 8192, 49152, 1.3e5, 1e-5, 2048, 4, 64, 10_000, "adamw", 5e-4, 0.02)}.items()}
AUTOMATIC = {"warmup_iters": -1, "lr_decay_iters": -1, "min_lr": -1, **dict.fromkeys(RECIPE, 0), "optimizer": "auto", "size": "auto"}
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12,
              "3090": 71e12, "V100": 125e12, "T4": 65e12}  # a second: dense, 16 bits, by the makers' data sheets
LOG_COLUMNS = ("iter", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_second", "val_perplexity", "mfu")

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

def sliced_loss(x, weight, targets):
    """slice_loss, a slice of the tokens at a time: the logits never exist as a whole, since their gradient is taken right
    here, while a slice's logits are at hand (Liger Kernel, arXiv:2410.10989)."""
    step, total, training = max(1, 2 ** 25 // len(weight)), 0.0, torch.is_grad_enabled()  # 128 MiB of logits
    leaves = [tensor.detach().requires_grad_(training) for tensor in (x, weight)]
    for part, some_targets in zip(leaves[0].split(step), targets.split(step)):
        loss = slice_loss(part, leaves[1], some_targets)
        if training:
            loss.backward()
        total = total + loss.detach()
    if training:  # a product that has this gradient, and whose value is taken away again
        product = sum(torch.dot(tensor.flatten(), leaf.grad.flatten()) for tensor, leaf in zip((x, weight), leaves))
        total = total + (product - product.detach())
    return total

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
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope, cache and cache[i], position)
        x = self.model.norm(x if cache is None else x[:, -1:])
        weight = self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight
        return F.linear(x, weight) if targets is None else sliced_loss(x.flatten(0, 1), weight, targets.flatten())

# ------------------------------------------------------------------------------------------------------------- data
@functools.lru_cache(1)
def epoch_order(epoch, windows):
    """Offset of an epoch's first window, and the order of its windows; ten million take half a second and 80 MB."""
    rng = np.random.default_rng((seed, epoch))
    return rng.integers(block_size), rng.permutation(windows)

def training_batch(iteration, meta, rank, world, device):
    """This process's share of an iteration's inputs and targets. Which tokens they are depends on the iteration and the
    seed alone: an epoch goes once through all windows of block_size tokens, in an order and from an offset of its own."""
    share, windows, starts = batch_size * gradient_accumulation_steps // world, meta["train_tokens"] // block_size - 1, []
    for index in range((iteration * world + rank) * share, (iteration * world + rank + 1) * share):
        offset, order = epoch_order(index // windows, windows)
        starts.append(offset + order[index % windows] * block_size)
    return get_windows("train", starts, device)

def get_windows(split, starts, device):
    """The tokens from each of `starts` on, and those after them, both (len(starts), block_size); -1 past the end."""
    data = np.memmap(Path(data_dir, f"{split}.bin"), "<u2", "r")  # mapped anew, or all that was read stays in memory
    batch = np.full((len(starts), block_size + 1), -1)
    for row, start in zip(batch, starts):
        window = data[start:start + block_size + 1]
        row[:len(window)] = window
    if batch.max() >= vocab_size:
        fail(f"{data_dir}/{split}.bin has the id {batch.max()}, the model only {vocab_size}: run prepare.py again")
    batch = torch.from_numpy(batch)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch[:, :-1].clamp(min=0), batch[:, 1:]

# ------------------------------------------------------------------------------------------- optimizer and schedule
def make_optimizers(model):
    """[AdamW for everything], or [AdamW for embedding and norms, Muon (Jordan, 2024) for the layers' matrices]."""
    params, hidden = list(model.parameters()), [p for p in model.model.layers.parameters() if p.dim() == 2]
    vectors = [p for p in params if p.dim() == 1]
    tables = [p for name, p in model.named_parameters() if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(hidden) + len(vectors) + len(tables) == len(params)
    groups = [{"params": tables + hidden * (optimizer == "adamw")}, {"params": vectors, "weight_decay": 0.0}]
    fused = vectors[0].device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(groups, learning_rate, (beta1, beta2), weight_decay=weight_decay, fused=fused)
    return [adamw] if optimizer == "adamw" else [adamw, torch.optim.Muon(hidden, muon_learning_rate, weight_decay)]

def schedule_factor(iteration):
    """What the peak rates are multiplied by in the update that follows `iteration` others."""
    low, left = min_lr / learning_rate, max(0, lr_decay_iters - iteration)
    if iteration < warmup_iters:
        return (iteration + 1) / (warmup_iters + 1)
    if schedule == "wsd":  # warm-up, stable, decay (MiniCPM, arXiv:2404.06395)
        return low + (1 - low) * min(1, left / (lr_decay_iters / 5))
    return low + (1 - low) * (0.5 - 0.5 * math.cos(math.pi * left / (lr_decay_iters - warmup_iters)))

# ------------------------------------------------------------------------------------------------------- checkpoint
def checkpoints(folder):
    """[(iteration, validation loss or inf, path)] of the checkpoints in an out folder, the newest last."""
    found = []
    for path in Path(folder).glob("step-*"):
        with explained(f"{path} is damaged: move it away, and the others will be used"):
            loss = json.loads(Path(path, "config.json").read_text())["val_loss"]
            found.append((int(path.name[5:]), math.inf if loss is None else loss, path))
    return sorted(found)

def save_checkpoint(model, iteration, val_loss, trainer):
    """Write out_dir/step-<iteration>, which appears whole or not at all; then keep only the newest and the best."""
    path, tmp, eos = Path(out_dir, f"step-{iteration:07d}"), Path(out_dir, "tmp"), model.config.eos_token_id
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(f"the weights are not finite at iteration {iteration:,}, and not saved: resume with a lower --learning_rate")
    with explained(f"cannot save {path}: make room and run again; the checkpoints before it are whole"):
        try:
            shutil.rmtree(tmp, ignore_errors=True)  # a killed run's
            tmp.mkdir()
            save_file(model.state_dict(), tmp / "model.safetensors", {"format": "pt"})
            torch.save(trainer, tmp / "trainer.pt")
            shutil.copy(f"{data_dir}/tokenizer.json", tmp)
            word = Tokenizer.from_file(f"{data_dir}/tokenizer.json").id_to_token(eos)
            special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": word, "eos_token": word}
            for name, content in (("config", vars(model.config) | {"val_loss": val_loss}),
                                  ("generation_config", {"eos_token_id": eos}), ("tokenizer_config", special)):
                Path(tmp, f"{name}.json").write_text(json.dumps(content, indent=2))
            flush(*tmp.iterdir(), tmp)
            tmp.rename(path)
            flush(out_dir)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        saved = checkpoints(out_dir)
        for _, _, old in set(saved) - {saved[-1], min(saved, key=lambda entry: entry[1])}:
            old.rename(tmp)  # first, so that no step- folder is ever half there
            shutil.rmtree(tmp)

def flush(*paths):
    """Bring files, or folders' lists of files, to the disk itself."""
    for path in paths if os.name == "posix" else ():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

# ------------------------------------------------------------------------------------------------------------ setup
def choose_device(name):
    """The torch.device that --device names, once it has been seen to work."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with explained(f"--device={name} cannot be used here, --device={best} can"):
        return torch.zeros(1, device=best if name == "auto" else name).device

def fill(*sources):
    """Give the globals that still have their automatic value the one of the first source that has any."""
    for key, value in (item for values in sources for item in values.items()):
        if key in AUTOMATIC and globals()[key] == AUTOMATIC[key]:
            globals()[key] = value

def check_settings(world):
    """Refuse, in one line, what cannot work."""
    counts = (*HF_NAMES, "eval_interval", "log_interval", "batch_size", "gradient_accumulation_steps", "block_size", "max_iters")
    check(globals(), dict.fromkeys(counts, (1, 10 ** 12)) | dict.fromkeys(("dropout", "beta1", "beta2"), (0, 0.9999)) | {
        "norm_eps": (0, 1), "weight_decay": (0, 1000), "grad_clip": (0, 1e9), "min_lr": (0, learning_rate), "seed": (0, 2 ** 31),
        "learning_rate": (1e-9, 1000), "muon_learning_rate": (1e-9, 1000), "lr_decay_iters": (1, 10 ** 12),
        "warmup_iters": (0, min(max_iters, lr_decay_iters)), "optimizer": ["adamw", "muon"], "schedule": ["cosine", "wsd"],
        "compile": ["auto", "true", "false"], "dtype": ["auto", "float32", "bfloat16", "float16"]})
    for number, divisor, what in ((n_embd, n_head, "--n_embd / --n_head"), (n_head, n_kv_head, "--n_head / --n_kv_head"),
                                  (n_embd // n_head, 2, "half of --n_embd / --n_head, which the rotary embedding needs,"),
                                  (batch_size * gradient_accumulation_steps, world, "sequences / processes")):
        if number % divisor:
            fail(f"{what} is {number} / {divisor}, no whole number: change one of them")

def open_data(source):
    """meta.json of data_dir, seen to be whole and to fit the model folder `source`, if there is one."""
    with explained(f"cannot train on {data_dir}: run python prepare.py --data_dir={data_dir} on your text again"):
        meta = json.loads(Path(data_dir, "meta.json").read_text())
        sizes = [os.path.getsize(f"{data_dir}/{split}.bin") for split in ("train", "val")]
        tokenizers = [prepare.fingerprint(f"{folder}/tokenizer.json") for folder in (data_dir, source or data_dir)]
        for wrong, problem in (
                (sizes != [2 * meta["train_tokens"], 2 * meta["val_tokens"]], "the .bin files are not those of meta.json"),
                (tokenizers[0] != meta["tokenizer_sha256"], "tokenizer.json is not that of meta.json"),
                (tokenizers[0] != tokenizers[1], f"{source} has another tokenizer, which --tokenizer={source} would use"),
                (sizes[0] < 4 * block_size, f"{meta['train_tokens']:,} tokens are too few for --block_size={block_size}")):
            if wrong:
                raise ValueError(problem)
    return meta

def fit_micro_batch(model, inputs, targets, autocast, say):
    """The most sequences, up to batch_size, that a forward and backward pass has memory for. It is tried, which compiles
    the model as well; where that fails, the run goes on without."""
    sizes = [n for n in range(batch_size, 0, -1) if len(inputs) % n == 0]
    while sizes:
        try:
            reserve = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]  # for AdamW and DDP, later
            with autocast:
                model(inputs[:sizes[0]], targets[:sizes[0]]).backward()
            return sizes[0]
        except torch._dynamo.exc.TorchDynamoException as error:
            say(f"warning: not compiled, so slower: {str(error).splitlines()[0]}")
            torch.compiler.set_stance("force_eager")
        except torch.OutOfMemoryError:
            sizes = [n for n in sizes if n <= sizes[0] // 2]
            say(f"out of memory: micro-batches of {max(sizes, default=0)} sequences, the same tokens per iteration")
        finally:
            reserve = None
            model.zero_grad()
    fail(f"no memory for one sequence: lower --block_size={block_size}, or try --gradient_checkpointing=true")

# ------------------------------------------------------------------------------------------- evaluation and records
@torch.no_grad()
def evaluate(model, meta, micro, rank, world, device):
    """Loss over the whole validation split, in fixed windows that the processes share, as columns of log.csv."""
    total, count = torch.zeros((), dtype=torch.float64, device=device), meta["val_tokens"] - 1
    model.eval()
    for i in range(rank, math.ceil(count / block_size / micro), world):
        total += model(*get_windows("val", (i * micro + np.arange(micro)) * block_size, device))
    model.train()
    if world > 1:
        dist.all_reduce(total)
    loss, bits = total.item() / count, total.item() / math.log(2)
    return {"val_loss": loss, "val_bpb": bits / meta["val_bytes"], "val_perplexity": math.exp(min(loss, 700))}

def open_log(rows):
    """out_dir/log.csv as a csv writer, with `rows` in it. While it is open, no other run can have out_dir."""
    with explained(f"cannot use --out_dir={out_dir}: choose another, or wait for the run that uses it"):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        file = open(Path(out_dir, "log.csv"), "a", newline="", buffering=1)
        if os.name == "posix":
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.truncate(0)
    log = csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n")
    log.writeheader()
    log.writerows(rows)
    return log

def draw_curve(rows):
    """Draw the rows of log.csv as out_dir/loss.png."""
    from matplotlib.figure import Figure
    figure = Figure((8, 5), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for axes, key, style in (losses, "train_loss", "-"), (losses, "val_loss", "o-"), (rates, "lr", "-"):
        axes.plot(*zip(*((row["iter"], row[key]) for row in rows if key in row)), style, label=key, markersize=3)
    loss, at = min((row["val_loss"], row["iter"]) for row in rows if "val_loss" in row)
    losses.plot(at, loss, "r*", markersize=12, label=f"best val_loss: {loss:.4f} at {at:,}")
    losses.set(ylabel="nats per token", yscale="log")
    losses.legend()
    rates.set(ylabel="learning rate", xlabel="iteration")
    figure.savefig(Path(out_dir, "loss.png"), dpi=120)

# ------------------------------------------------------------------------------------------------------------- main
def main():
    global slice_loss
    import sample  # here, as it imports this file
    configure(globals(), sys.argv[1:])
    check(globals(), {"size": ["auto", *SIZES]})
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = choose_device(globals()["device"])
    if world > 1:
        dist.init_process_group()  # nccl between GPUs, gloo between CPUs
    say = tqdm.write if rank == 0 else lambda line: None

    # where to start: the newest checkpoint of this run, another model, or scratch
    saved, trainer, shape = checkpoints(out_dir), {"iteration": 0, "rows": [], "settings": {}}, {}
    if saved and init_from == "scratch" or not saved and init_from == "resume":
        fail(f"--init_from={init_from}, but {out_dir} holds {'a' if saved else 'no'} run: choose another --out_dir, or auto")
    source = saved[-1][2] if saved else None if init_from in ("auto", "scratch") else sample.find_model(init_from)
    if saved:
        with explained(f"{source}/trainer.pt is damaged: move {source} away to resume from an older checkpoint"):
            trainer = torch.load(source / "trainer.pt", map_location="cpu", weights_only=True)  # which runs no code
    if source:
        raw = sample.load_model(source)
        shape = {key: getattr(raw.config, name) for key, name in HF_NAMES.items()}
    before = trainer["settings"] | shape
    fill(SIZES.get(size, {}), before, {"size": "135m" if device.type == "cuda" else "tiny"})
    fill(SIZES[size])
    fill({"lr_decay_iters": max_iters, "min_lr": learning_rate / 10, "warmup_iters": min(max_iters // 20, 2000)})
    changed = {key: f"--{key}={globals()[key]} (was {old})" for key, old in before.items() if globals()[key] != old}
    for key in changed.keys() & {*HF_NAMES, "optimizer"}:
        fail(f"{source} cannot go on with {changed[key]}: leave it out, or choose another --out_dir")
    log = open_log(trainer["rows"]) if rank == 0 else None
    if rank == 0 and not Path(data_dir, "train.bin").exists():
        prepare.prepare(prepare.input, str(source or prepare.tokenizer), prepare.vocab_size, prepare.val_fraction, data_dir)
    if world > 1:
        dist.barrier()
    meta = open_data(source)
    fill({"vocab_size": meta["vocab_size"]})
    check_settings(world)
    torch.manual_seed(seed)
    if not source:
        raw = Llama(SimpleNamespace(
            **ONLY, **{name: globals()[key] for key, name in HF_NAMES.items()}, architectures=["LlamaForCausalLM"],
            head_dim=n_embd // n_head, max_position_embeddings=block_size, tie_word_embeddings=True,
            initializer_range=n_embd ** -0.5, eos_token_id=meta["eos_token_id"]))
    raw.to(device).train()

    # how to compute: precision, optimizers, compiler, micro-batches, processes
    if device.type == "cuda":
        precision = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    else:  # CPUs that have bfloat16 gain from it once the model is wide
        precision = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() and n_embd >= 512 else torch.float32
    precision = precision if dtype == "auto" else getattr(torch, dtype)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    optimizers, scaler = make_optimizers(raw), torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    if saved:  # the state alone: rates and the like are today's
        for one, state in zip(optimizers, trainer["optimizers"]):
            one.load_state_dict({"state": state, "param_groups": one.state_dict()["param_groups"]})
        scaler.load_state_dict(trainer["scaler"])
    peaks = [(group, group["lr"]) for one in optimizers for group in one.param_groups]
    compiled = compile.lower() == "true" or compile.lower() == "auto" and (device.type == "cuda" or n_embd >= 512)
    if compiled:
        for layer in raw.model.layers:  # one by one: the first is compiled, the others share its code
            layer.compile(dynamic=False)
        slice_loss = torch.compile(slice_loss, dynamic=False)
    iteration, rows = trainer["iteration"], trainer["rows"]
    inputs, targets = training_batch(iteration, meta, rank, world, device)
    micro = fit_micro_batch(raw, inputs, targets, autocast, say)
    model = nn.parallel.DistributedDataParallel(raw) if world > 1 else raw

    # what is going to happen
    parts = {"embedding": "embed|lm_head", "attention": "attn", "MLP": "mlp", "norms": "norm"}
    counts = {part: sum(p.numel() for name, p in raw.named_parameters() if re.search(word, name)) for part, word in parts.items()}
    tokens, n_params = targets.numel() * world, sum(counts.values())
    flops = 6 * n_params + 12 * n_layer * n_embd * block_size  # a token, forward and backward (PaLM, arXiv:2204.02311)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((peak * world for name, peak in PEAK_FLOPS.items() if name in chip), None)
    say(f"device     {world} x {chip}, {str(precision)[6:]}, {'compiled' if compiled else 'not compiled'}\n"
        f"model      {size}, {n_params:,} parameters: {', '.join(f'{part} {n:,}' for part, n in counts.items())}\n"
        f"data       {meta['train_tokens']:,} tokens, {max_iters * tokens / meta['train_tokens']:.1f} epochs in {max_iters:,} "
        f"iterations; {meta['val_tokens']:,} tokens for validation\n"
        f"iteration  {tokens:,} tokens of {flops:.3g} FLOPs = {world} processes x {len(inputs) // micro} micro-batches x {micro} "
        f"sequences x {block_size}\n"
        f"start      {source or 'scratch'}, iteration {iteration:,}; {', '.join(changed.values()) or 'no setting changed'}")
    signals = []
    def ask_to_stop(number, frame):  # a second signal ends at once; but torchrun repeats the Ctrl-C that it shares
        if signals and (world == 1 or time.time() > signals[0] + 2):
            os._exit(128 + number)
        signals.append(time.time())
    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    tokenizer = Tokenizer.from_file(f"{data_dir}/tokenizer.json")
    options = {key: getattr(sample, key) for key in sample.OPTIONS} | {"max_new_tokens": 100, "seed": seed}
    drawing = importlib.util.find_spec("matplotlib") is not None
    if not drawing:
        say("no loss.png: pip install matplotlib")
    if wandb_log and rank == 0:
        with explained("--wandb_log=true does not work: pip install wandb, and wandb login"):
            import wandb
            wandb.init(project="smollm2", name=out_dir, config={key: globals()[key] for key in config_keys})
    bar = tqdm(total=max_iters, initial=iteration, disable=None if rank == 0 else True, dynamic_ncols=True)

    row, skipped, stopping, first = {}, 0, False, iteration if saved else -1
    while True:  # evaluate, log, save, stop, update
        due = iteration % eval_interval == 0 or iteration >= max_iters
        if eval_only or due and iteration > first:
            with autocast:
                row |= {"iter": iteration} | evaluate(raw, meta, micro, rank, world, device)
        if row:
            facts = ", ".join(f"{key} {value:,.5g}" for key, value in row.items())
            say(facts) if bar.disable or "val_loss" in row else bar.set_postfix_str(facts)
        if eval_only:
            break
        if rank == 0 and row:
            rows.append(row)
            log.writerow(row)
            if wandb_log:
                wandb.log(row, step=iteration)
        if rank == 0 and (due or stopping) and iteration > first:
            save_checkpoint(raw, iteration, row.get("val_loss"), {
                "iteration": iteration, "rows": rows, "settings": {key: globals()[key] for key in config_keys},
                "scaler": scaler.state_dict(), "optimizers": [one.state_dict()["state"] for one in optimizers]})
            if drawing:
                draw_curve(rows)
            with torch.compiler.set_stance("force_eager"):
                say("".join(new for new, in sample.stream(raw.eval(), tokenizer, [meta["eos_token_id"]], 1, **options)))
            raw.train()
        if stopping or iteration >= max_iters:
            break

        began, factor, loss = time.perf_counter(), schedule_factor(iteration), torch.zeros((), device=device)
        torch.manual_seed(seed + iteration * world + rank)  # so that dropout, too, depends on the iteration alone
        for start in range(0, len(inputs), micro):
            model.require_backward_grad_sync = start + micro == len(inputs)  # of DDP: once an iteration
            with autocast:
                part = model(inputs[start:start + micro], targets[start:start + micro]) / targets.numel()
            scaler.scale(part).backward()
            loss += part.detach()
        for one in optimizers:
            scaler.unscale_(one)
        norm = nn.utils.get_total_norm([p.grad for p in raw.parameters()])
        stats = torch.stack((loss, norm, torch.tensor(float(len(signals)), device=device)))
        text, (inputs, targets) = inputs[0, :20], training_batch(iteration + 1, meta, rank, world, device)
        if world > 1:
            dist.all_reduce(stats)
        loss, mean_norm, stopping = (stats / world).tolist()  # here the device is waited for
        rate, skipped = learning_rate * factor, 0 if math.isfinite(loss + mean_norm) else skipped + 1
        if skipped:
            say(f"iteration {iteration:,}: loss {loss}, gradient norm {mean_norm}: update skipped")
        else:
            if mean_norm > grad_clip > 0:
                nn.utils.clip_grads_with_norm_(raw.parameters(), grad_clip, norm)
            for group, peak_rate in peaks:
                group["lr"] = peak_rate * factor
            for one in optimizers:
                scaler.step(one)
        if skipped == 5:
            fail(f"no finite gradient in five iterations up to {iteration:,}, learning rate {rate:.3g}, on text like "
                 f"{tokenizer.decode(text.tolist())!r}: run again with a lower --learning_rate")
        scaler.update()
        raw.zero_grad()
        iteration, row = iteration + 1, {}
        bar.update()
        if iteration % log_interval == 0 or iteration % eval_interval == 0 or iteration == max_iters:
            speed = tokens / (time.perf_counter() - began)
            row = {"iter": iteration, "train_loss": loss, "lr": rate, "grad_norm": mean_norm,
                   "tokens_per_second": round(speed)} | ({"mfu": speed * flops / peak} if peak else {})
    bar.close()
    if not eval_only:
        loss, _, best = min((entry[1], -entry[0], entry[2]) for entry in checkpoints(out_dir))
        say(f"best validation loss {loss:.4f}, in {best}\nsample it:   python sample.py --model={out_dir}\n"
            f"on a page:   python sample.py --model={out_dir} --web=true")
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # what sample.py imports is this file, with its settings
    main()
