"""
$ pytest                  # the tests: minutes on two CPU cores, no network
$ python test_train.py    # the benchmark: all parts that can run here, or those named: step sample prepare cold learn
"""
import csv, json, math, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import prepare, sample, train

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"  # Tiny Shakespeare and SmolLM2's tokenizer, where they are to be had
SHAPE = ("--device=cpu --dtype=float32 --compile=false --n_layer=2 --n_head=4 --n_kv_head=2 --n_embd=32 "
         "--intermediate_size=64 --block_size=32 --batch_size=4 --gradient_accumulation_steps=2 --max_iters=12 "
         "--eval_interval=4 --log_interval=2 --warmup_iters=2").split()


def run(*args, cwd, status=0, **kwargs):
    """Run a script of this folder, as in run("train.py", "--max_iters=3", cwd=tmp_path); check its exit status."""
    result = subprocess.run([sys.executable, ROOT / args[0], *map(str, args[1:])], cwd=cwd, text=True,
                            capture_output=True, timeout=240, **kwargs)
    assert result.returncode == status, result.stderr + result.stdout
    return result


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with data/ (60 kB of input.txt, a vocabulary of 512) and out/, a run of 12 iterations on it. Not to be
    written to."""
    path = tmp_path_factory.mktemp("work")
    (path / "input.txt").write_text((ROOT / "input.txt").read_text()[:60_000])
    run("prepare.py", "--vocab_size=512", cwd=path)
    run("train.py", *SHAPE, cwd=path)
    return path
# ------------------------------------------------------------------------------------------------------------ model
def hf_llama(seed=0, **changes):
    """A small random LlamaForCausalLM of transformers, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    shape = dict(vocab_size=301, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                 num_key_value_heads=2, max_position_embeddings=2048, rope_theta=100000.0, initializer_range=0.2,
                 tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()

def close(ours, theirs):
    """Equal within 1e-5 of the largest logit."""
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1}, {"head_dim": 16},
                                     {"tie_word_embeddings": False}, {"rms_norm_eps": 1e-3, "rope_theta": 500.0}], ids=str)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, changes):
    theirs = hf_llama(**changes)
    theirs.save_pretrained(tmp_path)
    ours = sample.load_model(tmp_path).eval()
    tokens = torch.randint(0, 301, (2, 2048))
    expected, logits = theirs(tokens).logits, ours(tokens)
    assert close(logits, expected)
    assert close(logits[:, 0], expected[:, 0]) and close(logits[:, 2047], expected[:, 2047])
    shape = (2, theirs.config.num_key_value_heads, 2048, ours.config.head_dim)
    cache = [[torch.zeros(shape), torch.zeros(shape)] for _ in range(3)]
    assert close(ours(tokens[:, :2040], cache=cache)[:, -1], expected[:, 2039])
    for position in range(2040, 2048):
        assert close(ours(tokens[:, position:position + 1], cache=cache, position=position)[:, -1], expected[:, position])

@torch.no_grad()
def test_checkpoint_is_a_hugging_face_folder(work):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = train.checkpoints(work / "out")[-1][2]
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    text = (work / "input.txt").read_text()[5000:5100]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == Tokenizer.from_file(str(work / "data/tokenizer.json")).encode(text).ids and tokenizer.decode(ids) == text
    tokens = torch.tensor([ids[:32]])
    assert close(sample.load_model(path).eval()(tokens), theirs(tokens).logits)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id == theirs.config.eos_token_id == 0

@torch.no_grad()
def test_validation_is_exact(work):
    """The last row of log.csv, against transformers' own loss over the same windows."""
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(train.checkpoints(work / "out")[-1][2])
    tokens = torch.from_numpy(np.fromfile(work / "data/val.bin", "<u2").astype(np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start:start + 33]
        total += torch.nn.functional.cross_entropy(theirs(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
    row, meta = log_rows(work / "out")[-1], json.loads((work / "data/meta.json").read_text())
    assert float(row["val_loss"]) == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert float(row["val_bpb"]) == pytest.approx(total / math.log(2) / meta["val_bytes"], rel=1e-5)

def new_model(monkeypatch, **settings):
    """A fresh train.Llama, with some of train's globals set."""
    for key, value in settings.items():
        monkeypatch.setattr(train, key, value)
    shape = {name: getattr(train, key) for key, name in train.HF_NAMES.items()} | {"tie_word_embeddings": True}
    return train.Llama(train.SimpleNamespace(**shape, head_dim=train.n_embd // train.n_head, eos_token_id=0,
                                             max_position_embeddings=train.block_size, initializer_range=train.n_embd ** -0.5))

@pytest.mark.parametrize("size,count", [("135m", 134_515_008), ("360m", 361_821_120), ("1.7b", 1_711_376_384)])
def test_published_shapes(monkeypatch, size, count):
    with torch.device("meta"):
        model = new_model(monkeypatch, **train.SIZES[size] | {"block_size": 8})
    assert sum(p.numel() for p in model.parameters()) == count
    if size == "135m" and SHARED.exists():
        published = json.loads((SHARED / "smollm2/config.json").read_text())
        assert all(published[name] == train.SIZES[size][key] for key, name in train.HF_NAMES.items())

TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, intermediate_size=64, vocab_size=512, rope_theta=1e5,
            norm_eps=1e-5, block_size=32)

def test_loss_at_the_start_is_ln_vocabulary(monkeypatch):
    model = new_model(monkeypatch, **train.SIZES["135m"] | {"n_layer": 4, "block_size": 64})
    tokens = torch.randint(0, 49152, (2, 65), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert 10.8 < model(tokens[:, :-1], tokens[:, 1:]).item() / 128 < 11.4

def test_no_token_sees_a_later_one(monkeypatch):
    model, tokens = new_model(monkeypatch, **TINY), torch.randint(0, 512, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 1) % 512
    difference = (model(tokens) - model(changed)).abs().amax(2)[0]
    assert difference[:20].max() == 0 and difference[20:].min() > 0

@pytest.mark.parametrize("rows", [1, 7, 64])
def test_sliced_loss_equals_cross_entropy(monkeypatch, rows):
    x, weight = torch.randn(64, 16, requires_grad=True), torch.randn(2 ** 25 // rows, 16, requires_grad=True)
    targets = torch.randint(0, 1000, (64,))
    targets[5:9] = -1
    if rows != 64:  # all in a few slices, or one
        weight = weight[:4096].detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weight.T, targets, ignore_index=-1, reduction="sum")
    expected = (loss, *torch.autograd.grad(loss * 3, (x, weight)))
    loss = train.sliced_loss(x, weight, targets)
    for ours, theirs in zip((loss, *torch.autograd.grad(loss * 3, (x, weight))), expected):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)

def test_a_repeated_batch_is_learned(monkeypatch):
    torch.manual_seed(0)
    for optimizer in ("adamw", "muon"):
        model = new_model(monkeypatch, **TINY, optimizer=optimizer, learning_rate=0.01, muon_learning_rate=0.03)
        optimizers, tokens = train.make_optimizers(model), torch.randint(0, 512, (4, 33))
        for _ in range(60):
            loss = model(tokens[:, :-1], tokens[:, 1:]) / 128
            loss.backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
        assert loss < 0.1

# --------------------------------------------------------------------------------------------- data order, schedule
def windows(work, monkeypatch, iterations, world=1, **settings):
    """[first tokens and targets] of every sequence of some iterations, over all processes, in order."""
    for key, value in (TINY | dict(data_dir=str(work / "data"), batch_size=4, gradient_accumulation_steps=2, seed=1) | settings).items():
        monkeypatch.setattr(train, key, value)
    train.epoch_order.cache_clear()
    meta = json.loads((work / "data/meta.json").read_text())
    parts = [train.training_batch(i, meta, rank, world, torch.device("cpu")) for i in iterations for rank in range(world)]
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts]), meta

def test_an_epoch_has_every_window_once(work, monkeypatch):
    data = np.fromfile(work / "data/train.bin", "<u2")
    per_epoch, offsets, orders = len(data) // 32 - 1, set(), set()
    inputs, targets, _ = windows(work, monkeypatch, range(3 * per_epoch // 8 + 1))
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    for epoch in range(3):
        rows = inputs[epoch * per_epoch:(epoch + 1) * per_epoch].numpy()
        offset = next(o for o in range(32) if {r.tobytes() for r in rows} == {
            data[s:s + 32].astype(np.int64).tobytes() for s in range(o, o + 32 * per_epoch, 32)})
        offsets.add(offset)
        orders.add(rows.tobytes())
    assert len(offsets) > 1 and len(orders) == 3

def test_batches_depend_on_seed_and_iteration_alone(work, monkeypatch):
    one = windows(work, monkeypatch, range(5))[0]
    assert torch.equal(one, windows(work, monkeypatch, range(5), world=2)[0])
    assert torch.equal(one, windows(work, monkeypatch, range(5), batch_size=1, gradient_accumulation_steps=8)[0])
    assert torch.equal(one[24:32], windows(work, monkeypatch, [3])[0])
    assert not torch.equal(one, windows(work, monkeypatch, range(5), seed=2)[0])

@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_corners(monkeypatch, schedule):
    for key, value in dict(schedule=schedule, learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=100).items():
        monkeypatch.setattr(train, key, value)
    factors = [train.schedule_factor(i) for i in range(130)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11) and factors[10] == 1
    assert factors[100:] == pytest.approx([0.1] * 30)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))
    assert factors[55] == pytest.approx(0.55 if schedule == "cosine" else 1)
    assert factors[90] == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * 80 / 90)) if schedule == "cosine" else 0.55)

# ------------------------------------------------------------------------------------------------ runs and restarts
def log_rows(out):
    with open(Path(out, "log.csv")) as file:
        return list(csv.DictReader(file))

def result(out):
    """What a run has come to, to the last bit: the losses of log.csv, the weights and the optimizers' state."""
    path = train.checkpoints(out)[-1][2]
    rows = [[row[key] for key in ("iter", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm")] for row in log_rows(out)]
    trainer = torch.load(path / "trainer.pt", weights_only=True)
    state = [(i, name, value.numpy().tobytes()) for one in trainer["optimizers"] for i, values in one.items()
             for name, value in values.items()]
    return rows, (path / "model.safetensors").read_bytes(), state

def start(*args, cwd, **kwargs):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *args], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)

def wait_for(condition, process=None):
    for _ in range(2400):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError

def torchrun(processes, *args, cwd):
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                             ROOT / "train.py", *args], cwd=cwd, text=True, capture_output=True, timeout=240,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return result

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_is_exact(work, tmp_path, optimizer):
    """With dropout and accumulation: a run that is killed twice and stopped once ends as the one that never was."""
    args = (*SHAPE, f"--data_dir={work}/data", "--dropout=0.2", f"--optimizer={optimizer}", "--max_iters=40", "--log_interval=1")
    run("train.py", *args, "--out_dir=whole", cwd=tmp_path)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, None):
        process, before = start(*args, "--out_dir=broken", cwd=tmp_path), len(train.checkpoints(tmp_path / "broken"))
        newest = max([0, *(at for at, _, _ in train.checkpoints(tmp_path / "broken"))])
        if number is None:
            assert process.wait() == 0
        else:
            log = tmp_path / "broken/log.csv"
            wait_for(lambda: log.exists() and log.read_text().count("\n") > newest + 9, process)
            process.send_signal(number)
            assert process.wait() == (0 if number == signal.SIGTERM else -number)
        process.communicate()
    assert result(tmp_path / "broken") == result(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "broken").iterdir() if not path.name.startswith("step-")) == ["log.csv", "loss.png"]

def test_longer_run_keeps_the_decay(work, tmp_path):
    args = (*SHAPE, f"--data_dir={work}/data", "--log_interval=1")
    run("train.py", *args, cwd=tmp_path)
    output = run("train.py", *args, "--max_iters=16", cwd=tmp_path).stdout
    rates = [float(row["lr"]) for row in log_rows(tmp_path / "out")[1:]]
    assert "iteration 12;" in output and "max_iters=16 (was 12)" in output
    assert len(rates) == 16 and rates[12:] == pytest.approx([rates[2] / 10] * 4) and rates[11] > rates[12]
    assert [int(row["iter"]) for row in log_rows(tmp_path / "out")] == list(range(17))

def test_the_same_losses_however_it_is_split(work, tmp_path):
    args = (*SHAPE, f"--data_dir={work}/data", "--log_interval=1")
    run("train.py", *args, "--batch_size=8", "--gradient_accumulation_steps=1", "--out_dir=a", cwd=tmp_path)
    run("train.py", *args, "--batch_size=2", "--gradient_accumulation_steps=4", "--out_dir=b", cwd=tmp_path)
    torchrun(2, *args, "--out_dir=c", "--max_iters=8", cwd=tmp_path)
    run("train.py", *args, "--out_dir=c", "--lr_decay_iters=12", cwd=tmp_path)  # stopped on two processes, resumed on one
    torchrun(4, *args, "--out_dir=d", cwd=tmp_path)
    expected = log_rows(tmp_path / "a")
    for name in "bcd":
        for row, other in zip(expected, log_rows(tmp_path / name), strict=True):
            for key in ("iter", "train_loss", "val_loss"):
                assert float(row[key] or 0) == pytest.approx(float(other[key] or 0), rel=1e-5), (name, row)

# ------------------------------------------------------------------------------------------------ faults, bad input
def inject(code, *args, cwd, status=0):
    """Run train.main after `code`, which has broken something in it."""
    code = f"import os, sys, torch, train\n{code}\nsys.argv = ['train.py', *{list(args)!r}]\ntrain.main()"
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, text=True, capture_output=True, timeout=240,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == status, result.stderr
    return result

def test_out_of_memory_halves_the_micro_batch(work, tmp_path):
    args = (*SHAPE, f"--data_dir={work}/data", "--log_interval=1")
    run("train.py", *args, "--out_dir=a", cwd=tmp_path)
    result = inject("""forward = train.Llama.forward
def short_of_memory(self, tokens, *args, **kwargs):
    if len(tokens) > 2: raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(self, tokens, *args, **kwargs)
train.Llama.forward = short_of_memory""", *args, "--out_dir=b", cwd=tmp_path)
    assert "out of memory" in result.stdout and "4 micro-batches x 2 sequences" in result.stdout
    for row, other in zip(log_rows(tmp_path / "a"), log_rows(tmp_path / "b"), strict=True):
        assert float(row["train_loss"] or 0) == pytest.approx(float(other["train_loss"] or 0), rel=1e-5)
    result = inject("train.Llama.forward = lambda *args: torch.empty(2 ** 60)", *args, "--out_dir=c", cwd=tmp_path, status=1)
    assert "--block_size=32" in result.stderr and "Traceback" not in result.stderr

def test_non_finite_updates_are_skipped(work, tmp_path):
    broken = """step, train.count = torch.nn.utils.get_total_norm, 0
def sometimes_nan(grads):
    train.count += 1
    return step(grads) * (float("nan") if train.count in BAD else 1)
torch.nn.utils.get_total_norm = sometimes_nan"""
    args = (*SHAPE, f"--data_dir={work}/data")
    result = inject(broken.replace("BAD", "(3, 4)"), *args, "--out_dir=a", cwd=tmp_path)
    assert result.stdout.count("skipped") == 2 and train.checkpoints(tmp_path / "a")[-1][0] == 12
    result = inject(broken.replace("BAD", "range(6, 99)"), *args, "--out_dir=b", cwd=tmp_path, status=1)
    assert result.stderr.count("\n") == 1 and re.search(r"iterations up to 9, learning rate .* text like '.+'", result.stderr)
    for path in (tmp_path / "b").glob("step-*"):
        assert all(p.isfinite().all() for p in sample.load_model(path).parameters())

def test_weights_that_are_not_finite_are_not_saved(work, tmp_path):
    result = inject("""forward = train.Llama.forward
def poison(self, *args, **kwargs):
    with torch.no_grad(): self.model.norm.weight[0] = float("inf")
    return torch.zeros((), requires_grad=True) * sum(p.sum() * 0 for p in self.model.layers.parameters())
train.evaluate = lambda model, *args: poison(model) and {} or {"val_loss": 1.0}""",
                    *SHAPE, f"--data_dir={work}/data", cwd=tmp_path, status=1)
    assert "not finite" in result.stderr and not train.checkpoints(tmp_path / "out")

def test_no_compiler_is_no_error(work, tmp_path):
    result = inject("os.environ.update(CXX='no-such-compiler', TORCHINDUCTOR_CACHE_DIR=os.getcwd())", *SHAPE, f"--data_dir={work}/data", "--compile=true", "--max_iters=2", cwd=tmp_path)
    assert "not compiled" in result.stdout and log_rows(tmp_path / "out")[-1]["iter"] == "2"

@pytest.mark.skipif(os.name != "posix", reason="file-size limits are POSIX's")
def test_full_disk(work, tmp_path):
    import resource
    args = (*SHAPE, f"--data_dir={work}/data")
    run("train.py", *args, "--max_iters=4", cwd=tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out/step-0000004").iterdir()}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    error = run("train.py", *args, cwd=tmp_path, status=1, preexec_fn=limit).stderr
    assert "cannot save out/step-0000008" in error and error.count("\n") == 1 and "Traceback" not in error
    assert before == {path: path.read_bytes() for path in (tmp_path / "out/step-0000004").iterdir()}
    assert not (tmp_path / "out/tmp").exists()
    run("train.py", *args, cwd=tmp_path)

@pytest.mark.parametrize("processes,number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_ends(work, tmp_path, processes, number):
    args, log = (*SHAPE, f"--data_dir={work}/data", "--max_iters=100000", "--log_interval=1"), tmp_path / "out/log.csv"
    if processes == 1:
        process = start(*args, cwd=tmp_path)
    else:
        process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                    ROOT / "train.py", *args], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 9, process)
    if processes == 2:  # one worker is told; the other one has to agree
        worker = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True).stdout.split()[0]
        os.kill(int(worker), number)
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) == 0
    process.communicate()
    iteration = train.checkpoints(tmp_path / "out")[-1][0]
    assert [int(row["iter"]) for row in log_rows(tmp_path / "out")] == list(range(iteration + 1)) and iteration >= 8
    assert f"iteration {iteration:,};" in run("train.py", *args, f"--max_iters={iteration + 1}", cwd=tmp_path).stdout

def test_a_second_signal_ends_at_once_and_a_second_run_is_refused(work, tmp_path):
    args, log = (*SHAPE, f"--data_dir={work}/data", "--max_iters=100000"), tmp_path / "out/log.csv"
    process = start(*args, cwd=tmp_path)
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2, process)
    assert "wait for the run" in run("train.py", *args, cwd=tmp_path, status=1).stderr
    process.send_signal(signal.SIGSTOP)  # so that both signals arrive before it can end by itself
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    assert process.wait(timeout=60) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    process.communicate()

def folder_bytes(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}

def cut(path):
    path.write_bytes(path.read_bytes()[:-100])

def rewrite(path, change):
    """Change the JSON in a file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))

class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)

NEWEST, OPEN = "out/step-0000012", lambda path: None
BAD_INPUT = [  # what is done to a folder with data/ and out/, what train.py is told, what the one line must name
    (OPEN, "--learning_rte=1", "--learning_rate"), (OPEN, "--size", "--size="), (OPEN, "max_iters=3", "max_iters=3"),
    (OPEN, "--max_iters 3", "--max_iters"), (OPEN, "--max_iters=many", "a whole number"), (OPEN, "--max_iters=1.5", "a whole number"),
    (OPEN, "--dropout=x", "a number"), (OPEN, "--eval_only=maybe", "true or false"), (OPEN, "--size=7b", "135m"),
    (OPEN, "--batch_size=-1", "--batch_size=-1"), (OPEN, "--n_head=-2 --out_dir=new", "--n_head=-2"),
    (OPEN, "--n_head=3 --out_dir=new", "--n_embd / --n_head"), (OPEN, "--n_kv_head=3 --out_dir=new", "--n_head / --n_kv_head"),
    (OPEN, "--n_embd=36 --out_dir=new", "rotary"), (OPEN, "--dropout=1", "--dropout=1.0"), (OPEN, "--dropout=nan", "--dropout=nan"),
    (OPEN, "--min_lr=9", "--min_lr=9.0"), (OPEN, "--warmup_iters=13", "--warmup_iters=13"), (OPEN, "--seed=-1", "--seed=-1"),
    (OPEN, "--optimizer=sgd", "adamw, muon"), (OPEN, "--dtype=float64", "bfloat16"), (OPEN, "--compile=maybe", "true"),
    (OPEN, "--device=cuda:99", "--device=cuda:99"), (OPEN, "--device=abacus", "abacus"),
    (OPEN, "--init_from=scratch", "holds a run"), (OPEN, "--init_from=resume --out_dir=new", "holds no run"),
    (OPEN, "--init_from=no/such-model --out_dir=new", "no/such-model"), (OPEN, "--n_layer=3", "--n_layer=3 (was 2)"),
    (OPEN, "--optimizer=adamw", "--optimizer=adamw (was muon)"), (OPEN, "--block_size=20000", "--block_size=20000"),
    (lambda w: (w / "data/meta.json").unlink(), "", "meta.json"), (lambda w: cut(w / "data/train.bin"), "", "do not belong"),
    (lambda w: (w / "data/train.bin").write_bytes(b"\1" * 20001), "", "do not belong"),
    (lambda w: rewrite(w / "data/meta.json", lambda meta: meta.update(tokenizer_sha256="0")), "", "do not belong"),
    (lambda w: np.full((w / "data/val.bin").stat().st_size // 2, 600, "<u2").tofile(w / "data/val.bin"), "--out_dir=new", "600"),
    (lambda w: run("prepare.py", "--vocab_size=400", cwd=w), "", "another tokenizer"),
    (lambda w: cut(w / NEWEST / "trainer.pt"), "", NEWEST), (lambda w: (w / NEWEST / "trainer.pt").unlink(), "", "trainer.pt"),
    (lambda w: torch.save(Malicious(), w / NEWEST / "trainer.pt"), "", "trainer.pt"),
    (lambda w: cut(w / NEWEST / "model.safetensors"), "", NEWEST), (lambda w: (w / NEWEST / "config.json").unlink(), "", "config.json"),
    (lambda w: (w / NEWEST / "config.json").write_text("{"), "", NEWEST),
    (lambda w: rewrite(w / NEWEST / "config.json", lambda config: config.update(attention_bias=True)), "", "attention_bias"),
]

@pytest.mark.parametrize("damage,args,named", BAD_INPUT, ids=[f"{row[1]} {row[2]}" for row in BAD_INPUT])
def test_bad_input_is_explained(work, tmp_path, damage, args, named):
    shutil.copytree(work, tmp_path / "w")
    damage(tmp_path / "w")
    before = folder_bytes(tmp_path)
    quick = [flag for flag in SHAPE if args or "max_iters" not in flag]
    error = run("train.py", *quick, "--optimizer=muon", *args.split(), cwd=tmp_path / "w", status=1).stderr
    assert named in error and error.startswith("error: ") and error.count("\n") == 1
    after = folder_bytes(tmp_path)
    assert {path: after[path] for path in before} == before, "something that was there has changed"
    assert {path.name for path in after.keys() - before.keys()} <= {"log.csv"}
