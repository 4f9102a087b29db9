"""
Sample from a checkpoint of train.py, or from any Hugging Face Llama that this model is equal to.

$ python sample.py                                           # the best checkpoint in out, from an end of text on
$ python sample.py --prompt="ROMEO:" --num_samples=3         # or --prompt=FILE:play.txt
$ python sample.py --model=HuggingFaceTB/SmolLM2-135M --prompt="Gravity is" --temperature=0
$ python sample.py --web=True                                # a page to play with, at http://127.0.0.1:7860
"""
import json, sys, time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

import train
from prepare import check, configure, fail

# ----------------------------------------------------------------------------------------------------------- config
model = "out"             # an out folder (its best checkpoint), a checkpoint, a Hugging Face Llama folder or hub id
prompt = ""               # text, or FILE:path; empty: start from an end of text
num_samples = 1           # made together, as one batch
max_new_tokens = 300      # of each sample
temperature = 0.8         # 0: always the likeliest token
top_k = 0                 # choose among the k likeliest tokens; 0: among all
top_p = 1.0               # ... among the likeliest that together have this probability
min_p = 0.0               # ... among those at least this share as likely as the likeliest
repetition_penalty = 1.0  # divides the score of tokens that have been used; 1: off
seed = 1337               # the same seed, the same text
device = "auto"           # auto, cpu, cuda, mps
dtype = "auto"            # auto (bfloat16 on a GPU, else float32), float32, bfloat16, float16
web = False               # serve a page instead (needs gradio)
port = 7860               # of the page, on 127.0.0.1


# ------------------------------------------------------------------------------------------------------------- load
OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")

def find_model(name):
    """The model folder that a name means: an out folder's best checkpoint, a folder, or a hub id's cached download."""
    saved = train.checkpoints(name)
    if saved:
        return min(saved, key=lambda entry: entry[1])[2]
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "config.json", "tokenizer.json"]))
    except Exception as error:  # of many kinds: no such id, no network, no permission
        fail(f"no model in {name}: no folder here has that name, and the hub says: {str(error).splitlines()[0]}")

def load_model(folder):
    """The Llama of a Hugging Face folder, in float32 on the CPU. What it has and train.Llama lacks is refused by name."""
    try:
        config = {k: v for k, v in json.loads(Path(folder, "config.json").read_text("utf-8")).items() if v is not None}
        rope = config.get("rope_parameters") or {}  # since transformers 5
        for key, ours in (train.ONLY | {"rope_scaling": None, "rope_type": "default"}).items():
            theirs = (rope if key == "rope_type" else config).get(key, ours)
            if theirs != ours:
                fail(f"{folder}: config.json has {key} = {theirs}, and this model knows {ours} alone")
        heads = config["num_attention_heads"]
        defaults = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads, "rope_theta": 10000.0,
                    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "eos_token_id": None}
        llama = train.Llama(SimpleNamespace(**defaults | config | rope))
        weights = {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError) as error:
        fail(f"{folder} holds no whole Llama: {type(error).__name__} {error}")
    expected = llama.state_dict()
    for name in expected.keys() | weights.keys():
        shapes = [list(tensors[name].shape) if name in tensors else "no tensor" for tensors in (weights, expected)]
        if shapes[0] != shapes[1] and not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            fail(f"{folder}: {name} is {shapes[0]} in the weights and {shapes[1]} by config.json")
    llama.load_state_dict(weights, strict=False)
    return llama

# --------------------------------------------------------------------------------------------------------- generate
@torch.inference_mode()
def generate(llama, tokens, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed):
    """Yield the (B, 1) tokens that follow tokens (B, T), one position after the other, until all B sequences have ended.
    Random numbers are its own. When all positions of the model are used, its last half is kept as the context."""
    config, device, ended = llama.config, tokens.device, False
    limit, generator = config.max_position_embeddings, torch.Generator(device).manual_seed(seed)
    ends = torch.tensor(end_ids(llama), device=device)
    places = min(limit, tokens.shape[1] + max_new_tokens)
    shape = (len(tokens), config.num_key_value_heads, places, config.head_dim)
    cache = [[torch.zeros(shape, dtype=llama.model.norm.weight.dtype, device=device) for _ in "kv"]
             for _ in range(config.num_hidden_layers)]
    new, position = tokens, 0
    for _ in range(max_new_tokens):
        if position + new.shape[1] > limit:
            new, position = tokens[:, -(limit // 2):], 0
        logits = llama(new, cache=cache, position=position)[:, -1].float()
        position += new.shape[1]
        new = choose(logits, tokens, temperature, top_k, top_p, min_p, repetition_penalty, generator)
        tokens = torch.cat((tokens, new), dim=1)
        yield new
        ended = ended | torch.isin(new, ends)
        if ended.all():
            return

def end_ids(llama):
    """The list of token ids that end a text."""
    ids = llama.config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]

def choose(logits, tokens, temperature, top_k, top_p, min_p, repetition_penalty, generator):
    """The next tokens (B, 1), drawn by logits (B, V) after `tokens`. The filters act in the order of the arguments, as
    transformers' do; the penalty (CTRL, arXiv:1909.05858) comes first."""
    if repetition_penalty != 1:
        used = logits.gather(1, tokens)
        logits = logits.scatter(1, tokens, torch.where(used < 0, used * repetition_penalty, used / repetition_penalty))
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(1).sort(descending=True)
        unlikely = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, ordered.cumsum(1) - ordered >= top_p)
        logits = logits.masked_fill(unlikely, -torch.inf)
    probs = logits.softmax(1)
    probs = probs.masked_fill(probs < min_p * probs.amax(1, keepdim=True), 0)
    return torch.multinomial(probs, 1, generator=generator)

def stream(llama, tokenizer, ids, count, **options):
    """Yield what is new in the texts of `count` samples after the token ids, position by position: a list of strings of
    whole characters. A sample that has come to its end of text adds no more."""
    decoders = [DecodeStream(ids, skip_special_tokens=True) for _ in range(count)]
    for new in generate(llama, torch.tensor([ids] * count, device=llama.cos.device), **options):
        new = new[:, 0].tolist()
        decoders = [decoder if token not in end_ids(llama) else None for decoder, token in zip(decoders, new)]
        yield [(decoder and decoder.step(tokenizer, token)) or "" for decoder, token in zip(decoders, new)]

# ------------------------------------------------------------------------------------------------------------- main
def main():
    configure(globals(), sys.argv[1:])
    check(globals(), {
        "num_samples": (1, 10_000), "max_new_tokens": (1, 10 ** 9), "temperature": (0, 100), "top_k": (0, 10 ** 9),
        "top_p": (1e-9, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100), "seed": (0, 2 ** 31), "port": (0, 65535),
        "dtype": ["auto", "float32", "bfloat16", "float16"]})
    target, folder = train.choose_device(device), find_model(model)
    precision = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if target.type == "cuda" else torch.float32
    llama = load_model(folder).eval().to(target, precision)
    tokenizer = load_tokenizer(folder)
    if web:
        return serve(llama, tokenizer, folder)
    try:
        text = Path(prompt[5:]).read_text("utf-8") if prompt.startswith("FILE:") else prompt
    except (OSError, ValueError) as error:
        fail(f"cannot read --prompt={prompt}: {error}")
    ids = encode(tokenizer, text, llama)
    options = {key: globals()[key] for key in OPTIONS}
    print(f"{folder}, {target}, {str(precision)[6:]}, seed {seed}, {len(ids)} tokens of prompt", file=sys.stderr)
    texts, steps, clock = [text] * num_samples, 0, 0
    print(text, end="", flush=True)
    for pieces in stream(llama, tokenizer, ids, num_samples, **options):
        print(pieces[0], end="", flush=True)  # the first sample is shown as it is made, the others when it is whole
        texts = [text + piece for text, piece in zip(texts, pieces)]
        clock, steps = clock or time.perf_counter(), steps + 1
    print()
    for text in texts[1:]:
        print("-" * 20, text, sep="\n")
    if steps > 1:
        speed = (steps - 1) * num_samples / (time.perf_counter() - clock)
        print(f"{steps} tokens x {num_samples}, {speed:.1f} tokens/s", file=sys.stderr)

def load_tokenizer(folder):
    try:
        return Tokenizer.from_file(f"{folder}/tokenizer.json")
    except Exception as error:  # the library raises nothing more special
        fail(f"{folder}/tokenizer.json cannot be read: {error}")

def encode(tokenizer, text, llama):
    """Token ids of a prompt; of an empty one, an end of text."""
    ids, limit = tokenizer.encode(text, add_special_tokens=False).ids, llama.config.max_position_embeddings
    if len(ids) > limit:
        fail(f"the prompt has {len(ids)} tokens, the model's context only {limit}: shorten it")
    if len(ids) + max_new_tokens > limit:
        print(f"note: past {limit} tokens, each sample goes on from its last {limit // 2}", file=sys.stderr)
    return ids or end_ids(llama)[:1]

if __name__ == "__main__":
    main()
