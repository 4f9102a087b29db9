"""
Sample from a checkpoint of train.py, or from a Llama of the Hugging Face hub.

$ python sample.py                                           # from the best checkpoint in out
$ python sample.py --prompt="Old Cenzo:" --num_samples=3     # or --prompt=FILE:play.txt
$ python sample.py --model=HuggingFaceTB/SmolLM2-135M --prompt="Gravity is" --temperature=0
$ python sample.py --web=true                                # a page, at http://127.0.0.1:7860
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tokenizers import decoders

import prepare
from prepare import explained, require
from train import choose_device, compiler_problem, find_model, has_bfloat16, load_model

# -------------------------------------------------------------------------------------- settings
model = "out"             # an out folder (its best checkpoint), a model folder or a hub id
prompt = ""               # text, or FILE:path; empty: begin as a document begins
num_samples = 1           # made together, as one batch
max_new_tokens = 300      # of each sample
temperature = 0.8         # 0: always the likeliest token
top_k = 0                 # choose among so many of the likeliest tokens; 0: among all
top_p = 1.0               # among the likeliest tokens that together have this probability
min_p = 0.0               # among tokens at least this share as likely as the likeliest
repetition_penalty = 1.0  # above 1: tokens that were there already become less likely
seed = 1337               # the same seed, the same text
device = "auto"           # auto, cpu, cuda, cuda:1 or mps
dtype = "auto"            # auto, float32, bfloat16 or float16
compile = False           # compile the step of one token: 10 to 60 s first, faster after that
web = False               # serve a page instead (pip install gradio)
port = 7860               # of the page, on 127.0.0.1


def check_settings(values):
    """Refuse values that cannot be meant: one rule a line."""
    def rule(name, good, text):
        require(good, f"--{name}={values[name]} must be {text}")

    for name in ("num_samples", "max_new_tokens"):
        rule(name, values[name] >= 1, "1 or more")
    rule("top_p", 0 < values["top_p"] <= 1, "above 0, at most 1")
    rule("min_p", values["min_p"] <= 1, "from 0 to 1")
    rule("repetition_penalty", values["repetition_penalty"] > 0, "above 0")
    rule("port", 1 <= values["port"] <= 65535, "from 1 to 65535")
    rule("dtype", values["dtype"] in ("auto", "float32", "bfloat16", "float16"),
         "auto, float32, bfloat16 or float16")


# ----------------------------------------------------------------------------- choosing the tokens
def chooser(values, device):
    """A choose(logits (B, V), tokens (B, T)) for Llama.generate, by the settings in `values`."""
    generator = torch.Generator(device).manual_seed(values["seed"])

    def choose(logits, tokens):
        if values["repetition_penalty"] != 1:
            logits = penalize(logits, tokens, values["repetition_penalty"])
        if values["temperature"] == 0:
            return logits.argmax(1, keepdim=True)
        logits = logits / values["temperature"]
        probs = likeliest(logits, values["top_k"], values["top_p"], values["min_p"])
        return torch.multinomial(probs, 1, generator=generator)

    return choose


def penalize(logits, tokens, penalty):
    """Make tokens that were there already less likely (CTRL, arXiv:1909.05858)."""
    used = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(used < 0, used * penalty, used / penalty))


def likeliest(logits, top_k, top_p, min_p):
    """Probabilities (B, V) of logits (B, V), 0 for what one of the three filters leaves out."""
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(1).sort(descending=True)
        before = ordered.cumsum(1) - ordered  # the probability of all likelier tokens
        left_out = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(left_out, -torch.inf)
    probs = logits.softmax(1)
    return probs.where(probs >= min_p * probs.amax(1, keepdim=True), 0)


def stop_ids(llama):
    """The token ids that end a text."""
    ids = llama.config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def prompt_ids(tokenizer, text, llama):
    """Token ids of a prompt, which begins as the documents in training do."""
    ids = prepare.prefix_ids(tokenizer) + tokenizer.encode(text, add_special_tokens=False).ids
    ids = ids or stop_ids(llama)[:1]
    limit, vocabulary = llama.config.max_position_embeddings, llama.config.vocab_size
    require(ids, "this model has no end of text to begin with: give a --prompt")
    require(max(ids) < vocabulary, f"the tokenizer has ids beyond the model's {vocabulary:,}")
    require(len(ids) <= limit, f"the prompt has {len(ids):,} tokens, more than the model's context "
                               f"of {limit:,}: shorten it")
    return ids


def stream(llama, tokenizer, ids, values):
    """
    Yield what is new in each of num_samples texts after the token ids, one place after the other: a
    list of strings of whole characters. A text that has come to its end adds no more.
    """
    count, device = values["num_samples"], llama.cos.device
    texts = [decoders.DecodeStream(ids, skip_special_tokens=True) for _ in range(count)]
    tokens = torch.tensor([ids] * count, device=device)
    for new in llama.generate(tokens, values["max_new_tokens"], chooser(values, device)):
        pieces = []
        for i, token in enumerate(new[:, 0].tolist()):
            if token in stop_ids(llama):
                texts[i] = None
            pieces.append((texts[i] and texts[i].step(tokenizer, token)) or "")
        yield pieces
        if not any(texts):
            return


# ------------------------------------------------------------------------------------------ page
SLIDERS = {  # (label, what it does, lowest, highest, step)
    "max_new_tokens": ("Length", "How many tokens to write at most.", 1, 2000, 1),
    "temperature": ("Temperature", "Higher is bolder; 0 is always the likeliest.", 0, 2, 0.05),
    "top_p": ("Top-p", "Only the likeliest tokens of this total probability.", 0.05, 1, 0.05),
    "top_k": ("Top-k", "Only so many of the likeliest tokens; 0 is all.", 0, 200, 1),
    "min_p": ("Min-p", "Only tokens this share as likely as the likeliest.", 0, 1, 0.01),
    "repetition_penalty": ("Repetition penalty", "Above 1, less of what was there.", 1, 2, 0.05),
}


def first_words(folder):
    """The first words of three documents of the text that a checkpoint was trained on."""
    try:
        data = prepare.Data(prepare.read_json(folder / "run.json")["settings"]["data_dir"])
    except SystemExit:  # there is no such folder, or no longer
        return []
    ids = data.windows("train", [0], min(2 ** 16, data.meta["train_tokens"]))[0][0]
    starts = (ids == data.eot).nonzero()[0] + 1
    texts = [data.tokenizer.decode(ids[at:at + 8].tolist()) for at in starts]
    return [" ".join(text.split()[:4]) for text in texts if text.strip()][:3]


def sampling_sliders(Slider):
    """The controls of SLIDERS, at the values of the settings."""
    return [Slider(low, high, globals()[name], step=step, label=label, info=info)
            for name, (label, info, low, high, step) in SLIDERS.items()]


def serve(llama, tokenizer, folder, facts):
    """Serve a page, to this machine alone, until Ctrl-C. Visitors may write at the same time."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import: the page needs no network
    with explained("--web=true needs gradio: pip install gradio", ImportError):
        import gradio

    def write(text, keep_seed, seed, *chosen):
        values = prepare.settings_of(globals()) | dict(zip(SLIDERS, chosen)) | {"num_samples": 1}
        values["seed"] = int(seed or 0) if keep_seed else random.randrange(10 ** 6)
        try:
            check_settings(values)
            ids = prompt_ids(tokenizer, text, llama)
        except SystemExit as error:
            raise gradio.Error(str(error).removeprefix("error: "), print_exception=False)
        began = time.perf_counter()
        for count, (new,) in enumerate(stream(llama, tokenizer, ids, values), 1):
            text += new
            speed = count / max(time.perf_counter() - began, 1e-9)
            yield text, f"{count} tokens, {speed:.1f} a second", values["seed"]

    with gradio.Blocks(title="sample.py") as page:
        gradio.Markdown(f"### Write with your model\n{facts}")
        with gradio.Tab("Write"):
            asked = gradio.Textbox(prompt, label="Prompt", lines=2, autofocus=True)
            with gradio.Row():
                start = gradio.Button("Generate", variant="primary")
                stop = gradio.Button("Stop")
            status = gradio.Markdown()
            text = gradio.Textbox(label="Text", lines=12, max_lines=30, buttons=["copy"])
            if beginnings := first_words(folder):
                gradio.Examples(beginnings, asked, label="Beginnings from the training text")
            with gradio.Accordion("Sampling", open=False):
                sliders = sampling_sliders(gradio.Slider)
                keep_seed = gradio.Checkbox(False, label="Use this seed again")
                number = gradio.Number(seed, label="Seed", precision=0)
        if (curve := folder.resolve().parent / "loss.png").exists():
            with gradio.Tab("Training curve"):
                gradio.Image(str(curve), show_label=False, buttons=[])
        running = gradio.on([start.click, asked.submit], write,
                            [asked, keep_seed, number, *sliders], [text, status, number],
                            concurrency_limit=4, show_progress="hidden")
        stop.click(None, cancels=[running])
    print(f"http://127.0.0.1:{port}, for this machine alone; Ctrl-C ends it", file=sys.stderr)
    with explained(f"cannot serve at --port={port}: choose another", OSError):
        page.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True,
                    ssr_mode=False, footer_links=[])


# ------------------------------------------------------------------------------------------ main
def load():
    """The model that the settings ask for, its tokenizer, its folder, and a line of facts."""
    require(model != "out" or Path("out").exists(),
            "there is no model in out yet: run python train.py first")
    folder, target = find_model(model), choose_device(device)
    name = dtype
    if dtype == "auto":  # reading the weights is what takes the time of one sequence
        small = has_bfloat16(target) or target.type == "cpu" and num_samples == 1
        name = "bfloat16" if small else "float16" if target.type == "cuda" else "float32"
    llama = load_model(folder).eval().to(target, getattr(torch, name))
    problem = compiler_problem(target) if compile else None
    if problem:
        print(f"warning: not compiled, so slower: {problem}", file=sys.stderr)
    elif compile:
        mode = "reduce-overhead" if target.type == "cuda" else None
        llama.decode = torch.compile(llama.decode, mode=mode)
    parameters = sum(p.numel() for p in llama.parameters())
    facts = f"{folder}: {parameters:,} parameters, {target}, {name}"
    return llama, prepare.load_tokenizer(folder), folder, facts


def main():
    prepare.steady_output()
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C: no stack trace
    prepare.configure(globals(), sys.argv[1:])
    values = prepare.settings_of(globals())
    check_settings(values)
    llama, tokenizer, folder, facts = load()
    if web:
        return serve(llama, tokenizer, folder, facts)

    text = prompt
    if prompt.startswith("FILE:"):
        with explained(f"cannot read --prompt={prompt}", OSError, ValueError):
            text = Path(prompt[5:]).read_text("utf-8-sig")
    ids = prompt_ids(tokenizer, text, llama)
    print(f"{facts}; seed {seed}, {len(ids)} tokens of prompt", file=sys.stderr)
    if len(ids) + max_new_tokens > llama.config.max_position_embeddings:
        print("note: past the context, each text goes on from its last half", file=sys.stderr)

    # the first sample appears as it is made, the others when they are whole
    show = prepare.printable if sys.stdout.isatty() else str
    texts, clock, steps = [text] * num_samples, 0.0, 0
    print(show(text), end="", flush=True)
    try:
        for pieces in stream(llama, tokenizer, ids, values):
            print(show(pieces[0]), end="", flush=True)
            texts = [text + piece for text, piece in zip(texts, pieces)]
            clock, steps = clock or time.perf_counter(), steps + 1
            if sys.stdout.broken:  # nobody reads any more
                break
    finally:  # Ctrl-C comes here, too
        print("", *map(show, texts[1:]), sep=f"\n{'-' * 20}\n")
    speed = (steps - 1) * num_samples / max(time.perf_counter() - clock, 1e-9)
    print(f"{steps} tokens x {num_samples}, {speed:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
