"""
$ pytest                  # the tests: minutes on two CPU cores, no network
$ python test_train.py    # the benchmark: all its parts, or those named, as in `test_train.py step`
"""
import csv
import fcntl
import functools
import gzip
import http.server
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import prepare
import sample
import train

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"  # Tiny Shakespeare and SmolLM2's tokenizer, where they are to be had
SHAPE = ("--device=cpu --dtype=float32 --compile=false --n_layer=2 --n_head=4 --n_kv_head=2 --n_embd=32 "
         "--intermediate_size=64 --block_size=32").split()
TOY = SHAPE + ("--batch_size=4 --gradient_accumulation_steps=2 --optimizer=adamw --learning_rate=0.01 --beta2=0.95 "
               "--weight_decay=0.1 --max_iters=12 --eval_interval=4 --log_interval=1 --warmup_iters=2").split()

if __name__ != "__main__":  # a thread for each process: for a toy, more are slower
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"


# --------------------------------------------------------------------------------- running the scripts

def default_signals():
    """What a child process begins with: one in the background ignores Ctrl-C, under nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(script, *args, cwd, processes=0, **kwargs):
    """Start a script of this folder as a process of its own, or as several under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes else []), ROOT / script, *map(str, args)]
    usual = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"preexec_fn": default_signals}
    return subprocess.Popen(command, cwd=cwd, text=True, **usual | kwargs)


def run(script, *args, cwd, status=0, stdin="", **kwargs):
    """Run a script to its end, as in run("train.py", "--max_iters=3", cwd=folder); check its exit status."""
    process = start(script, *args, cwd=cwd, **kwargs)
    out, err = process.communicate(stdin, timeout=240)
    assert process.returncode == status, err + out
    return SimpleNamespace(stdout=out, stderr=err)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """A function like run(), but quicker: in this process, though with settings of its own."""
    def call(script, *args, cwd=tmp_path):
        for name in ("train", "sample"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # this process lives on, and with it the lock
        prepare.WARNED.clear()
        monkeypatch.chdir(cwd)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.stdout, sys.stderr = sys.stdout.stream, sys.stderr.stream
        return capsys.readouterr()
    return call


def refusal(call, *args, **kwargs):
    """The one line with which a script ends; Python prints it on stderr and exits with status 1."""
    with pytest.raises(SystemExit) as end:
        call(*args, **kwargs)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with data/, of 60 kB of input.txt, and out/, a run of 12 iterations; not to be written to."""
    path = tmp_path_factory.mktemp("work")
    (path / "input.txt").write_text((ROOT / "input.txt").read_text("utf-8")[:60_000], "utf-8")
    run("prepare.py", "--vocab_size=512", cwd=path)
    run("train.py", *TOY, cwd=path)
    return path


@pytest.fixture
def toy(work):
    return ["train.py", *TOY, f"--data_dir={work}/data"]


def log_rows(out):
    return list(csv.DictReader(Path(out, "log.csv").read_text().splitlines()))


def newest(out):
    return train.checkpoints(out)[-1]


# ------------------------------------------------------------------------------------ preparation

STORIES = [f"Story {i}:\na tale of {i * i} geese — and 鵝.\n" for i in range(40)]
PROSE = ("An old man said:\r\nstill 1234 geese...\n\n"
         "Два слова, 三个字。\n\n  naïve 👩‍👩‍👧 \t<tab>\nend") * 30


def prepared(folder):
    """(meta, ids of both splits, Tokenizer) of a folder whose files agree with each other."""
    meta = json.loads((folder / "meta.json").read_text())
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [np.fromfile(folder / f"{split}.bin", "<u2").tolist() for split in ("train", "val")]
    assert sorted(os.listdir(folder)) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    assert set(meta) == {"vocab_size", "eos_token_id", "train_tokens", "val_tokens", "train_bytes",
                         "val_bytes", "tokenizer_sha256"}
    assert [meta["train_tokens"], meta["val_tokens"]] == list(map(len, ids))
    assert ids[0][0] == ids[1][0] == meta["eos_token_id"]
    assert meta["tokenizer_sha256"] == prepare.fingerprint(tok)
    return meta, ids, tok


def texts_of(folder):
    """The documents of a folder, in order, those of both splits; one cut by the split is whole."""
    meta, (train, val), tok = prepared(folder)
    documents = [[]]
    for number in train[1:] + val[1:]:
        if number == meta["eos_token_id"]:
            documents.append([])
        else:
            documents[-1].append(number)
    assert documents.pop() == []
    return [tok.decode(document) for document in documents]


def share(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return meta["val_bytes"] / (meta["val_bytes"] + meta["train_bytes"])


def make(folder, text, **settings):
    """Prepare a text, or files that are there already, with a small BPE; the folder of the tokens."""
    if text is not None:
        folder.mkdir(exist_ok=True)
        (folder / "text.txt").write_text(text, "utf-8", newline="")
        settings["input"] = str(folder / "text.txt")
    prepare.prepare(**{"vocab_size": 300, "data_dir": str(folder / "data")} | settings)
    return folder / "data"


@pytest.mark.skipif(not SHARED.exists(), reason=f"there is no {SHARED}")
@pytest.mark.parametrize("piece", [prepare.PIECE, 301])
def test_tiny_shakespeare_is_341094_tokens_however_it_is_cut(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(prepare, "PIECE", piece)
    path = SHARED / "tinyshakespeare.txt"
    data = make(tmp_path, None, input=str(path), tokenizer=str(SHARED / "smollm2"))
    meta, (train, val), tok = prepared(data)
    assert len(train[1:] + val[1:-1]) == 341_094 and val[-1] == meta["eos_token_id"]
    assert train[1:] + val[1:-1] == tok.encode(path.read_text()).ids


@pytest.fixture(scope="module")
def kinds():
    """A tokenizer of each kind, with rules that make cutting hard."""
    text = [PROSE, "".join(STORIES), "ab ba  aab\n\n\tabba e\u0301é " * 50, "ACGTTAGACA ACGATTAG" * 90]
    special = {"special_tokens": ["<|endoftext|>", "<unk>"], "show_progress": False}
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found = {
        "BPE": (models.BPE(), None, pre_tokenizers.ByteLevel(), trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **special)),
        "whole-text BPE": (models.BPE(unk_token="<unk>"), spaces, None,
                           trainers.BpeTrainer(vocab_size=600, max_token_length=9, **special)),
        "WordPiece": (models.WordPiece(unk_token="<unk>"), normalizers.BertNormalizer(),
                      pre_tokenizers.BertPreTokenizer(),
                      trainers.WordPieceTrainer(vocab_size=400, **special)),
        "WordLevel": (models.WordLevel(unk_token="<unk>"), normalizers.Sequence([
            normalizers.Strip(), normalizers.NFC()]), pre_tokenizers.Whitespace(),
            trainers.WordLevelTrainer(**special))}
    for name, (model, normalizer, words, trainer) in found.items():
        found[name] = tok = Tokenizer(model)
        if normalizer:
            tok.normalizer = normalizer
        if words:
            tok.pre_tokenizer = words
        tok.train_from_iterator(text, trainer)

    words = sorted(found["whole-text BPE"].get_vocab().items(), key=lambda item: item[1])
    scores = [(word, -2 - number / 97) for word, number in words]
    found["Unigram"] = Tokenizer(models.Unigram(scores, unk_id=1))
    found["Unigram"].normalizer = normalizers.NFKC()
    found["Unigram"].pre_tokenizer = pre_tokenizers.Metaspace()
    return found


@pytest.mark.parametrize("kind", ["BPE", "whole-text BPE", "Unigram", "WordPiece", "WordLevel"])
def test_pieces_have_the_tokens_of_the_whole(kinds, kind, monkeypatch):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    likely = st.sampled_from([PROSE[:90], "ACGTTAGACA" * 9, " ", "\n\n", "e\u0301", "字" * 40,
                              "a" * 333, "12 "])
    chunk = st.one_of(likely, st.text(max_size=20), st.text("ab \n", max_size=60))
    cuts = []

    @hypothesis.settings(max_examples=30, derandomize=True, deadline=None, database=None)
    @hypothesis.given(st.lists(st.tuples(chunk, st.integers(1, 12)), max_size=15),
                      st.sampled_from([5, 50, 400]), st.integers(1, 3000))
    def check(chunks, piece, part):
        monkeypatch.setattr(prepare, "PIECE", piece)
        text = "".join(chunk * count for chunk, count in chunks)
        parts = [(text[i:i + part], False) for i in range(0, len(text), part)] + [("", True)]
        ids, seen = [], ""
        for string, known, skip, ends in prepare.pieces(parts, kinds[kind]):
            ids += kinds[kind].encode(string, add_special_tokens=False).ids[skip:]
            seen += string[known:]
            cuts.append(not ends)
        assert seen == text and ids == kinds[kind].encode(text, add_special_tokens=False).ids

    check()
    assert sum(cuts) > 100  # otherwise nothing was tested


@pytest.mark.parametrize("unit", ["a line has no end ", "字", "ACGTTAGACATGCA", "  \t", "- item\n", "9"])
def test_the_tokens_of_a_long_text_of_any_form(tmp_path, unit, kinds):
    """Train and validation are each tokenized as a whole, here compared with the library."""
    text = (unit * 200_000)[:200_000] + "."
    kinds["BPE"].save(str(tmp_path / "t.json"))
    meta, (train, val), tok = prepared(make(tmp_path, text, tokenizer=str(tmp_path / "t.json")))
    head = text.encode()[:meta["train_bytes"]].decode()
    assert train[1:] == tok.encode(head).ids and val[1:-1] == tok.encode(text[len(head):]).ids
    assert abs(share(tmp_path / "data") - 0.1) < 0.01


SHORT_LINES = ["- item {} of the list\n", "def f_{}(x):\n    return x\n\n", "A paragraph, {}.\n\n",
               '"No," said {}.\n', "[{}] = 1\n", "    {}\n", "👩 {}\n", "\u200fשורה {}\n", "第{}行没有空格\n",
               "ประโยคที่ {} ไม่มีช่องว่าง\n", "{}\n"]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.02])
@pytest.mark.parametrize("line", SHORT_LINES)
def test_the_split_is_at_a_line_within_one_percent(tmp_path, line, fraction):
    text = "".join(line.format(i) for i in range(900))
    data = make(tmp_path, text, val_fraction=fraction)
    meta = prepared(data)[0]
    assert abs(share(data) - fraction) < 0.01 and texts_of(data) == [text]
    assert text.encode()[:meta["train_bytes"]].endswith(b"\n")


def test_the_split_prefers_documents_then_blank_lines_and_is_capped(tmp_path, monkeypatch):
    story = "One line\nof a story.\n\nAnother one.\n"
    for count, end, before in (400, "<|endoftext|>\n", "one.\n"), (400, "", "story.\n"):
        text = (story + end) * count
        meta, (train, val), tok = prepared(make(tmp_path, text))
        assert tok.decode(train[1:]).endswith(before)
    monkeypatch.setattr(prepare, "VAL_LIMIT", 1000)
    assert abs(prepared(make(tmp_path, text, val_fraction=0.5))[0]["val_bytes"] - 1000) < 100
    for text in "ab", "é字", "a" * 30, "a\n", "字<|endoftext|>字<|endoftext|>":
        meta, ids, tok = prepared(make(tmp_path, text, val_fraction=0.3))
        assert len(ids[0]) > 1 and len(ids[1]) > 1


def test_end_of_text_ends_a_document_and_the_bpe_sees_the_training_split_alone(tmp_path, monkeypatch):
    text = "<|endoftext|>\n".join(STORIES[:30]) + "<|endoftext|>" + STORIES[30] + "<|endoftext|>\n"
    for block in 7, 100, 2 ** 20:  # marks and characters that lie across the blocks' ends
        monkeypatch.setattr(prepare, "BLOCK", block)
        data = make(tmp_path, text)
        assert texts_of(data) == STORIES[:31]
        assert sum(prepared(data)[0][f"{split}_bytes"] for split in ("train", "val")) == len(
            "".join(STORIES[:31]).encode())
    data = make(tmp_path, "a word\n" * 900 + "qqqqqq\n" * 90)
    assert not any("qq" in token for token in prepared(data)[2].get_vocab())


def test_a_document_is_framed_as_its_tokenizer_does_it(tmp_path):
    tok = prepare.train_bpe([("".join(STORIES), True)], 300)
    tok.add_special_tokens(["<s>"])
    bos = tok.token_to_id("<s>")
    tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    tok.enable_truncation(5)
    tok.enable_padding()
    tok.save(str(tmp_path / "t.json"))
    data = make(tmp_path, "<|endoftext|>".join(STORIES), tokenizer=str(tmp_path / "t.json"))
    meta, (train, val), tok = prepared(data)
    want = [0]
    for story in STORIES:
        want += [bos, *tok.encode(story, add_special_tokens=False).ids, 0]
    assert train + val[1:] == want and tok.truncation is tok.padding is None


# ----------------------------------------------------------------------------- what is read

def write_parquet(path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"number": range(40), "text": STORIES, "url": ["no"] * 40})
    parquet.write_table(table, path, row_group_size=7)


def write_zst(path):
    data = "\n".join(json.dumps({"text": story}) for story in STORIES).encode()
    pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    path.write_bytes(pack(data[:1000]) + pack(data[1000:]))  # two frames


def lines(field="text", end="\n"):
    return end.join(json.dumps({"id": 1, field: story.replace("\n", "\r\n")}) for story in STORIES)


KINDS = {
    "a.txt": lambda path: path.write_text("<|endoftext|>\n".join(STORIES)),
    "b, with: comma": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + "<|endoftext|>".join(STORIES).replace("\n", "\r\n").encode()),
    "c.JSONL": lambda path: path.write_text(lines()),
    "d.ndjson": lambda path: path.write_text(lines(end="\r\n\n") + "\n \n"),
    "e.json": lambda path: path.write_text(json.dumps([{"text": story} for story in STORIES], indent=1)),
    "f.json": lambda path: path.write_text(lines()),
    "g.jsonl.GZ": lambda path: path.write_bytes(
        gzip.compress(lines()[:999].encode()) + gzip.compress(lines()[999:].encode())),
    "h.parquet": write_parquet,
    "i.jsonl.zst": write_zst,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(tmp_path, name):
    KINDS[name](tmp_path / name)
    assert texts_of(make(tmp_path, None, input=str(tmp_path / name))) == STORIES


def test_names_folders_globs_and_another_field(tmp_path, monkeypatch, capsys):
    for number, story in enumerate(STORIES[:6]):
        path = tmp_path / "home" / ("deep" if number > 2 else "") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(story)
    home = tmp_path / "home"
    (home / ".hidden.txt").write_text("no")
    (home / "picture.png").write_bytes(b"\x89PNG\0\0")
    (home / "more").symlink_to(home / "deep")
    (home / "deep" / "self").symlink_to(home)
    (home / "zero.txt").symlink_to(home / "0.txt")
    (home / "gone.txt").symlink_to(home / "nowhere")
    (tmp_path / "c.jsonl").write_text(lines("body"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for names in "~", f"{home}/0.txt, ~/1.txt ,{home}/2.txt,{home}/deep/?.txt":
        found = texts_of(make(tmp_path, None, input=names))
        assert found == STORIES[:6]
        output = capsys.readouterr().out
        assert ("6 files, 1 skipped: not text" in output) == (names == "~")
        assert "5.txt" in output  # which is validation
    (home / "deep" / "self2").symlink_to(home)
    assert len(texts_of(make(tmp_path, None, input="~"))) == 6
    assert texts_of(make(tmp_path, None, input=f"{tmp_path}/c.jsonl", text_field="body")) == STORIES


def test_pipes(tmp_path):
    for text in "<|endoftext|>".join(STORIES), lines():
        run("prepare.py", "--input=-", "--vocab_size=300", cwd=tmp_path, stdin=text)
        assert texts_of(tmp_path / "data") == STORIES
    (tmp_path / "a.txt").write_text(lines())
    command = f"exec {sys.executable} {ROOT}/prepare.py --vocab_size=300 --input=<(cat a.txt)"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert texts_of(tmp_path / "data") == STORIES


def test_downloads(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/short"):
                self.send_response(200)
                self.send_header("Content-Length", "5000")
                self.end_headers()
                self.wfile.write(b"only so much\n" * 9)
            else:
                super().do_GET()

    (tmp_path / "é.jsonl").write_text(lines())
    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        make(tmp_path, None, input=f"{url}/é.jsonl?download=true")
        before = contents(tmp_path)
        assert texts_of(tmp_path / "data") == STORIES
        for name, wrong in ("nothing.txt", "404"), ("short.txt", "117 out of 5000"):
            with pytest.raises(SystemExit, match=f"^error: .*{name}.*{wrong}.*$"):
                make(tmp_path, None, input=f"{url}/{name}")
        server.shutdown()
    assert contents(tmp_path) == before


def test_what_a_tokenizer_loses_is_reported(tmp_path, capsys):
    parts = json.loads(prepare.train_bpe([("abc abc", True)], 300).to_str())
    del parts["model"]["vocab"]["Ĕ"], parts["model"]["vocab"]["ñ"]  # how the bytes 14 and f1 are written
    (tmp_path / "t.json").write_text(json.dumps(parts))
    make(tmp_path, "abc \x14 abc \U00040000.\n" * 50, tokenizer=str(tmp_path / "t.json"))
    assert "100 bytes of the text are lost" in capsys.readouterr().out
    make(tmp_path, PROSE, tokenizer=str(tmp_path / "t.json"))
    assert "lost" not in capsys.readouterr().out


# ----------------------------------------------------------------------------- faults, bad input

TEXT = b"a line of text\n" * 50
BAD_TEXT = [  # what is in input.txt and a.jsonl, or the vocabulary of t.json; arguments; what is named
    (None, "--input=no.txt", "no.txt"), (None, "--input=input.txt,b.txt", "b.txt"),
    (None, "--input=", "--input"), (None, "--input=*.csv", "csv"),
    (TEXT, "--input=a.csv", "a.csv: .csv .* --text_field"),
    (b"", "", "0 bytes"), (b"x", "", "1 bytes"), (TEXT + b"\0", "", "input.txt is not text"),
    ("a\nb".encode("utf-16"), "", "input.txt"), (TEXT * 9999 + b"caf\xe9", "", "byte 7,499,253 is not UTF-8"),
    (b"\xef\xbb\xbf" + TEXT + b"\xe9", "", "byte 753 "), (TEXT + b"\xe5\xad", "", "byte 750 "),
    (b'{"text": "a"}\n\n{"text": "b"\n', "--input=a.jsonl", "a.jsonl, line 3"),
    (b'{"text": "a"}\n{"body": "b"}\n', "--input=a.jsonl", "a.jsonl, line 2.*--text_field"),
    (b'{"text": 3}\n', "--input=a.jsonl", "a.jsonl, line 1"), (b'["text"]\n', "--input=a.jsonl", "line 1"),
    (b'{"text": "\\ud800"}', "--input=a.jsonl", "line 1"), (b'{"text": "\xe9"}', "--input=a.jsonl", "line 1"),
    (TEXT, "--input=a.json", "a.json, line 1"), (TEXT, "--input=a.gz", "a.gz .*gzip"),
    (TEXT, "--input=a.zst", "a.zst"), (TEXT, "--input=a.parquet", "a.parquet"),
    (None, "--tokenizer=input.txt", "tokenizer input.txt"), (None, "--input=hf://x/y", "hf://x/y"),
    (None, "--input=http://[", "http://["), (None, "--input=http://127.0.0.1:9/a.txt", "127.0.0.1:9"),
    (None, "--data_dir=input.txt", "input.txt is not a folder"),
    (None, "--data_dir=input.txt/data", "input.txt/data"),
    (None, "--input=.", "--data_dir"), (None, "--data_dir=full", "full holds notes.md"),
    (None, "--input=empty", "empty: there is no text"),
    (None, "--tokenizer=full --vocab_size=999", "--vocab_size"),
    ({"a": 0}, "--tokenizer=t.json", "end-of-text"), ({"</s>": 70_000}, "--tokenizer=t.json", "70,001 ids"),
    (None, "--vocab_size=256", "--vocab_size"), (None, "--vocab_size=65537", "--vocab_size"),
    *((None, f"--val_fraction={value}", "--val_fraction") for value in ("0", "1", "nan", "-1", "x")),
    (None, "--data_dir=", "--data_dir"), (None, "--text_field=", "--text_field"),
    (None, "--inptu=a", "--input")]


@pytest.mark.parametrize("wrong, args, named", BAD_TEXT)
def test_bad_input_of_preparation_is_one_line_and_changes_nothing(tmp_path, monkeypatch, wrong, args, named):
    spec = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": wrong, "unk_token": "a"}}
    (tmp_path / "t.json").write_text(json.dumps(spec, default=str))
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes.md").write_text("mine")
    for name in "input.txt a.jsonl a.json a.csv a.gz a.zst a.parquet".split():
        (tmp_path / name).write_bytes(wrong if isinstance(wrong, bytes) else TEXT)
    before = contents(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare.py", *args.split()])
    for name in "stdout", "stderr":  # main() wraps them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "prepare.py"), run_name="__main__")
    assert re.fullmatch(f"error: .*{named.replace('[', '.')}.*", end.value.code)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("stage", ["reading", "making", "tokenizing"])
def test_a_preparation_that_is_stopped_changes_nothing(tmp_path, number, stage):
    make(tmp_path, PROSE)
    before = contents(tmp_path)
    (tmp_path / "input.txt").write_text(PROSE * 400)
    os.mkfifo(tmp_path / "pipe")
    name = "pipe" if stage == "reading" else "input.txt"  # nobody writes to it
    process = start("prepare.py", f"--input={name}", "--vocab_size=260", cwd=tmp_path)
    while not process.stdout.readline().startswith(stage):
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
        (tmp_path / "pipe").unlink()
        (tmp_path / "input.txt").write_text(PROSE)
        run("prepare.py", "--vocab_size=260", cwd=tmp_path)  # what was left is in nobody's way
        assert texts_of(tmp_path / "data") == [PROSE.replace("\r\n", "\n")]
    else:
        assert process.returncode == 1 and re.fullmatch("error: stopped, nothing was changed.*\n", err)
        after = contents(tmp_path)
        assert {path: after[path] for path in before} == before
        assert set(after) - set(before) == {Path("input.txt"), Path("pipe")}


def test_several_at_once_and_the_last_one_wins_whole(tmp_path):
    (tmp_path / "input.txt").write_text(PROSE * 3)
    sizes = [260, 270, 290, 310] * 2
    processes = [start("prepare.py", f"--vocab_size={size}", cwd=tmp_path) for size in sizes]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == ""
    assert prepared(tmp_path / "data")[0]["vocab_size"] in sizes
    assert texts_of(tmp_path / "data") == [(PROSE * 3).replace("\r\n", "\n")]
    assert {path.parts[0] for path in contents(tmp_path)} == {"input.txt", "data"}


def test_output_that_cannot_be_printed_loses_nothing(tmp_path):
    (tmp_path / "ñ.txt").write_text(PROSE)
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    with open("/dev/full", "w") as full:
        run("prepare.py", "--input=ñ.txt", cwd=tmp_path, env=env, stdout=full)
    assert texts_of(tmp_path / "data") == [PROSE.replace("\r\n", "\n")]
    out = run("prepare.py", "--input=ñ.txt", "--data_dir=data-mine", cwd=tmp_path, env=env).stdout
    assert out.endswith("next: python train.py --data_dir=data-mine\n")
# ---------------------------------------------------------------------------------------------- the model

def close(ours, theirs, share=1e-5):
    """Equal within a share of the largest value."""
    return (ours - theirs).abs().max() <= share * theirs.abs().max()


def new_model(dropout=0.0, seed=0, **changes):
    """A Llama of train.py with the toy's shape."""
    shape = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
                 intermediate_size=64, vocab_size=512, rope_theta=1e5, rms_norm_eps=1e-5, head_dim=8,
                 tie_word_embeddings=True, eos_token_id=0, max_position_embeddings=32,
                 initializer_range=32 ** -0.5) | changes
    torch.manual_seed(seed)
    return train.Llama(SimpleNamespace(**shape), dropout)


def random_tokens(*shape, seed=0, high=512):
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1, "head_dim": 16}, {
    "tie_word_embeddings": False, "rms_norm_eps": 1e-3, "rope_theta": 500.0, "eos_token_id": None}], ids=str)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, changes):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**dict(
        vocab_size=301, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=2048, rope_theta=100000.0, initializer_range=0.2,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0) | changes)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    ours = train.load_model(tmp_path).eval()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert ours.config.rope_theta == changes.get("rope_theta", 1e5)
    assert sample.stop_ids(ours) == ([] if "eos_token_id" in changes else [0])

    tokens = random_tokens(2, 2048, high=301)
    expected = theirs(tokens).logits
    logits = ours(tokens)
    assert close(logits, expected)
    assert close(logits[:, 0], expected[:, 0]) and close(logits[:, 2047], expected[:, 2047])
    taken = iter(tokens[:, 2040:].T[:, :, None])
    seen = []
    for _ in ours.generate(tokens[:, :2040], 8, lambda logits, _: seen.append(logits) or next(taken)):
        pass
    for place, cached in enumerate(seen, 2039):
        assert close(cached, expected[:, place])


@torch.no_grad()
def test_a_16_bit_folder_is_loaded_as_it_is(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))
    tokens = random_tokens(1, 20, high=64)
    for dtype in torch.bfloat16, torch.float16:
        theirs.to(dtype).save_pretrained(tmp_path)
        assert close(train.load_model(tmp_path)(tokens), theirs.float()(tokens).logits)


@pytest.mark.parametrize("size,count", [("135m", 134_515_008), ("360m", 361_821_120), ("1.7b", 1_711_376_384)])
def test_published_shapes(size, count):
    shape = {theirs: (train.SIZES[size] | {"norm_eps": 1e-5}).get(ours, 1e5) for ours, theirs in train.SHAPE.items()}
    with torch.device("meta"):
        model = new_model(**shape, max_position_embeddings=8,
                          head_dim=shape["hidden_size"] // shape["num_attention_heads"])
    assert sum(p.numel() for p in model.parameters()) == count
    if size == "135m" and SHARED.exists():
        published = json.loads((SHARED / "smollm2/config.json").read_text())
        assert {key: published[key] for key in shape} == shape


@torch.no_grad()
def test_a_new_model_knows_nothing_and_no_token_sees_a_later_one():
    model = new_model(num_hidden_layers=4, hidden_size=576, intermediate_size=1536, vocab_size=49152,
                      num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=64,
                      initializer_range=576 ** -0.5)
    tokens = random_tokens(2, 65, high=49152)
    assert 10.8 < model.loss(tokens[:, :-1], tokens[:, 1:]).item() / 128 < 11.4
    changed = torch.where(torch.arange(64) == 20, 7, tokens[:, :64])
    difference = (model(tokens[:, :64]) - model(changed)).abs().amax(2)
    assert difference[:, :20].max() == 0 and difference[:, 20:].min() > 0

    layer = model.model.layers[1]
    for module, std in ((layer.mlp.up_proj, 1 / 24), (layer.self_attn.q_proj, 1 / 24), (model.model.embed_tokens, 1 / 24),
                        (layer.mlp.down_proj, 1 / 24 / 8 ** 0.5), (layer.self_attn.o_proj, 1 / 24 / 8 ** 0.5)):
        assert module.weight.std().item() == pytest.approx(std, rel=0.02)
    assert (layer.input_layernorm.weight == 1).all()


@pytest.mark.parametrize("rows, logits", [(40, 2 ** 25), (700, 2 ** 18), (700, 1)])  # in 1, 3 and 6 slices
def test_sliced_loss_equals_cross_entropy_in_float64(rows, logits, monkeypatch):
    monkeypatch.setattr(train, "LOGITS_AT_ONCE", logits)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator).requires_grad_()
    weight = torch.randn(1000, 4, generator=generator).requires_grad_()
    targets = random_tokens(rows, high=1000)
    targets[5:9] = -1
    loss = train.SlicedLoss.apply(x, weight, targets, train.slice_loss)
    ours = (loss, *torch.autograd.grad(loss * 3, (x, weight)))

    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.cross_entropy(x64 @ weight64.T, targets, ignore_index=-1, reduction="sum")
    for one, other in zip(ours, (exact, *torch.autograd.grad(exact * 3, (x64, weight64)))):
        assert close(one.double(), other, 1e-5)
    with torch.no_grad():
        assert close(train.SlicedLoss.apply(x, weight, targets, train.slice_loss).double(), exact, 1e-5)


# ------------------------------------------------------------------------------------- optimizer, schedule

def test_muon_equals_float64_and_torch(monkeypatch):
    """Nesterov's momentum of two steps, five steps of Newton-Schulz, the size of AdamW's update."""
    generator = torch.Generator().manual_seed(0)
    for shape in (24, 40), (40, 24), (32, 32):
        start = [torch.randn(shape, generator=generator) for _ in range(3)]
        grads = [[torch.randn(shape, generator=generator) for _ in range(3)] for _ in range(2)]
        ours = [torch.nn.Parameter(p.clone()) for p in start]
        theirs = [torch.nn.Parameter(p.clone()) for p in start]
        exact = [p.double() for p in start]
        muon = train.Muon([{"params": ours}], {"lr": 0.02, "weight_decay": 0.1})
        torchs = torch.optim.Muon(theirs, 0.02, 0.1, momentum=train.MOMENTUM, adjust_lr_fn="match_rms_adamw")
        momenta = [torch.zeros(shape).double() for _ in start]
        for step_grads in grads:
            for i, grad in enumerate(step_grads):
                ours[i].grad, theirs[i].grad = grad.clone(), grad.clone()
                momenta[i] = train.MOMENTUM * momenta[i] + (1 - train.MOMENTUM) * grad.double()
                update = train.MOMENTUM * momenta[i] + (1 - train.MOMENTUM) * grad.double()
                update = update / update.norm()
                for _ in range(5):
                    gram = update @ update.T
                    update = 3.4445 * update - 4.775 * gram @ update + 2.0315 * gram @ gram @ update
                exact[i] = exact[i] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(shape) ** 0.5 * update
            muon.step()
            torchs.step()
        for one, other, true in zip(ours, theirs, exact):
            assert close(one.detach().double(), true, 1e-5)
            assert close(other.detach(), one.detach(), 0.02)  # torch's works in bfloat16


def test_every_parameter_has_an_optimizer(monkeypatch):
    for optimizer in "adamw", "muon":
        monkeypatch.setattr(train, "optimizer", optimizer)
        model = new_model(tie_word_embeddings=False)
        found = [p for one in train.make_optimizers(model) for group in one.param_groups for p in group["params"]]
        assert len(found) == len(list(model.parameters())) and {*map(id, found)} == {*map(id, model.parameters())}
        model.extra = torch.nn.Parameter(torch.zeros(2, 2, 2))
        with pytest.raises(Exception):
            train.make_optimizers(model)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_corners(monkeypatch, schedule):
    for key, value in dict(schedule=schedule, learning_rate=1, min_lr=.1, warmup_iters=10, lr_decay_iters=100).items():
        monkeypatch.setattr(train, key, value)
    factors = [train.learning_rate_at(i) for i in range(130)]
    cosine = schedule == "cosine"
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11) and factors[10] == 1
    assert factors[100:] == pytest.approx([0.1] * 30)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))
    assert factors[55] == pytest.approx(0.55 if cosine else 1)
    assert factors[90] == pytest.approx(0.55 + 0.45 * math.cos(math.pi * 80 / 90) if cosine else 0.55)
    monkeypatch.setattr(train, "warmup_iters", 95)  # longer than the plateau of wsd: no jump
    steps = np.diff([train.learning_rate_at(i) for i in range(130)])
    assert abs(steps).max() < 0.35


def reference_run(work, iterations, muon):
    """
    Losses, gradient norms and weights of a toy run: transformers' Llama in float64, AdamW and Muon by their
    formulas, and batches taken from train.bin by hand.
    """
    from transformers import AutoModelForCausalLM
    meta = json.loads((work / "data/meta.json").read_text())
    ids = np.fromfile(work / "data/train.bin", "<u2").astype(np.int64)
    first = new_model(seed=1337, vocab_size=meta["vocab_size"])  # as train.py draws it
    model = AutoModelForCausalLM.from_pretrained(newest(work / "out")).double()
    model.load_state_dict(first.double().state_dict() | {"lm_head.weight": first.model.embed_tokens.weight.double()})
    rng = np.random.default_rng((1337, 0))
    offset, order = rng.integers(32), rng.permutation(len(ids) // 32 - 1)
    state = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    losses, norms = [], []
    for i in range(iterations):
        rows = np.stack([ids[offset + 32 * w:][:33] for w in order[8 * i:8 * i + 8]])
        tokens = torch.from_numpy(rows)
        logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        losses.append(loss.item())
        norms.append(norm.item())
        rate = 0.01 * (i + 1) / 3 if i < 2 else 0.001 + 0.009 * (0.5 + 0.5 * math.cos(math.pi * (i - 2) / 10))
        for name, p in model.named_parameters():
            grad = p.grad * min(1, 0.5 / norm)
            one, two = state[name]
            if muon and p.dim() == 2 and ".layers." in name:
                one.mul_(train.MOMENTUM).add_(grad * (1 - train.MOMENTUM))
                x = train.MOMENTUM * one + (1 - train.MOMENTUM) * grad
                x = x / x.norm()
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
                step, decay = 0.6 * rate * 0.2 * max(p.shape) ** 0.5 * x, 0.6 * rate * 0.1
            else:
                one.mul_(0.9).add_(0.1 * grad)
                two.mul_(0.95).add_(0.05 * grad ** 2)
                step = rate * (one / (1 - 0.9 ** (i + 1))) / ((two / (1 - 0.95 ** (i + 1))).sqrt() + 1e-8)
                decay = rate * 0.1 if p.dim() == 2 else 0.0
            p.data.mul_(1 - decay).sub_(step)
    return losses, norms, model


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_equals_a_reference_in_float64(toy, call, work, tmp_path, optimizer):
    """Rates, clipping, betas, decay of matrices alone, Muon's share, the order of the data, accumulation."""
    call(*toy, f"--optimizer={optimizer}", "--grad_clip=0.5", "--eval_interval=6", "--max_iters=6", "--lr_decay_iters=12")
    losses, norms, model = reference_run(work, 6, optimizer == "muon")
    rows = log_rows(tmp_path / "out")[1:]
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [float(row["grad_norm"]) for row in rows] == pytest.approx(norms, rel=1e-4)
    saved = load_file(newest(tmp_path / "out") / "model.safetensors")
    for name, p in model.named_parameters():
        assert (saved[name] - p).abs().max() < 3e-5, name


# --------------------------------------------------------------------------------------------- data order

def sequences(work, first, count, seed=1):
    return prepare.Data(work / "data").training_batch(first, count, 32, seed)


def test_an_epoch_has_every_window_once(work):
    data = np.fromfile(work / "data/train.bin", "<u2").astype(np.int64)
    count = len(data) // 32 - 1
    inputs, targets = sequences(work, 0, 3 * count)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    offsets, orders = set(), set()
    for epoch in range(3):
        rows = inputs[epoch * count:(epoch + 1) * count]
        found = {row.tobytes() for row in rows}
        orders.add(rows.tobytes())
        offsets |= {o for o in range(32) if found == {data[s:s + 32].tobytes() for s in range(o, o + 32 * count, 32)}}
    assert len(offsets) > 1 and len(orders) == 3
    assert (sequences(work, 17, 5)[0] == inputs[17:22]).all()
    assert not (sequences(work, 0, 8, seed=2)[0] == inputs[:8]).all()


def test_a_changed_batch_size_repeats_and_skips_nothing(toy, call, tmp_path, monkeypatch):
    seen = []
    batch = prepare.Data.training_batch

    def spy(self, first, count, *rest):
        seen.extend(range(first, first + count))
        return batch(self, first, count, *rest)

    monkeypatch.setattr(prepare.Data, "training_batch", spy)
    call(*toy, "--max_iters=4")
    output = call(*toy, "--max_iters=8", "--batch_size=3", "--gradient_accumulation_steps=1").out
    assert seen == list(range(4 * 8 + 4 * 3))
    assert "batch_size = 3 (was 4)" in output


# --------------------------------------------------------------------------- checkpoints, runs, restarts

def test_checkpoint_is_a_hugging_face_folder_and_validation_exact(toy, call, work, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    call(*toy, "--dropout=0.5")  # which must not touch the validation
    path = newest(tmp_path / "out")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    text = (work / "input.txt").read_text("utf-8")[5000:5100]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == Tokenizer.from_file(f"{work}/data/tokenizer.json").encode(text).ids and tokenizer.decode(ids) == text
    assert close(train.load_model(path).eval()(torch.tensor([ids[:32]])), theirs(torch.tensor([ids[:32]])).logits)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id == theirs.config.eos_token_id == 0

    tokens = torch.from_numpy(np.fromfile(work / "data/val.bin", "<u2").astype(np.int64))
    total = 0.0
    for begin in range(0, len(tokens) - 1, 32):
        window = tokens[begin:begin + 33]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    row, meta = log_rows(tmp_path / "out")[-1], json.loads((work / "data/meta.json").read_text())
    assert float(row["val_loss"]) == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert float(row["val_bpb"]) == pytest.approx(total / math.log(2) / meta["val_bytes"], rel=1e-5)
    assert float(row["val_perplexity"]) == pytest.approx(math.exp(total / (len(tokens) - 1)), rel=1e-4)

    assert sorted(os.listdir(path)) == sorted("config.json generation_config.json model.safetensors run.json "
                                              "tokenizer.json tokenizer_config.json trainer.pt".split())
    record = json.loads((path / "run.json").read_text())
    assert record["iteration"] == 12 and record["val_loss"] == float(row["val_loss"])
    assert record["settings"]["n_embd"] == 32 and record["settings"]["min_lr"] == pytest.approx(0.001)
    modes = {file.name: file.stat().st_mode for file in path.iterdir()}
    assert len(set(modes.values())) == 1, modes
    from transformers import LlamaConfig
    known = {*LlamaConfig().to_dict(), "rope_theta", "head_dim"}
    assert json.loads((path / "config.json").read_text()).keys() <= known


def assert_same_losses(out, other, rel=1e-5):
    for one, two in zip(log_rows(out), log_rows(other), strict=True):
        for key in ("iter", "train_loss", "val_loss"):
            assert float(one[key] or 0) == pytest.approx(float(two[key] or 0), rel=rel), (other, one, two)


def result(out):
    """What a run has come to, to the last bit: the losses of log.csv, the weights and the optimizers' state."""
    keys = ("iter", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm")
    trainer = torch.load(newest(out) / "trainer.pt", weights_only=True)
    tensors, _ = torch.utils._pytree.tree_flatten(trainer["optimizers"])
    state = [t.numpy().tobytes() if torch.is_tensor(t) else t for t in tensors]
    rows = [[row[key] for key in keys] for row in log_rows(out)]
    return rows, (newest(out) / "model.safetensors").read_bytes(), state, trainer["scaler"]


def wait_for_rows(process, out, count):
    """Wait until a process that has just been started has brought log.csv to `count` rows."""
    log, began = out / "log.csv", time.time()
    while not (log.exists() and log.stat().st_mtime > began and log.read_text().count("\n") > count):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("flags", ["--optimizer=adamw --dropout=0.1", "--optimizer=muon", "--dtype=bfloat16",
                                   "--dtype=float16"])
def test_resume_is_bit_exact(toy, call, tmp_path, flags):
    args = (*toy, *flags.split(), "--eval_interval=5")
    call(*args, "--max_iters=12", "--out_dir=whole")
    call(*args, "--max_iters=5", "--lr_decay_iters=12", "--out_dir=parts")
    call(*args, "--max_iters=12", "--lr_decay_iters=12", "--out_dir=parts")
    assert result(tmp_path / "whole") == result(tmp_path / "parts")


def test_resume_after_a_kill_is_bit_exact(toy, call, tmp_path):
    args = (*toy, "--max_iters=60", "--eval_interval=5", "--dropout=0.1")
    call(*args, "--out_dir=whole")
    process = start(*args, "--out_dir=killed", cwd=tmp_path)
    wait_for_rows(process, tmp_path / "killed", 13)
    process.kill()
    process.communicate()
    assert 0 < int(newest(tmp_path / "killed").name[5:]) < 60
    call(*args, "--out_dir=killed")
    assert result(tmp_path / "whole") == result(tmp_path / "killed")


def test_a_stop_saves_without_evaluating_and_the_next_start_evaluates(toy, call, tmp_path, monkeypatch):
    """Also when it comes at an iteration that is due to be evaluated: log.csv and checkpoint end as they would."""
    call(*toy, "--out_dir=whole")
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def clip_and_stop(*args):
        calls.append(0)
        if len(calls) == 8:  # in iteration 8, before its evaluation
            frame = sys._getframe()
            while "stop_signals" not in frame.f_globals:
                frame = frame.f_back
            frame.f_globals["stop_signals"].append(0.0)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_stop)
    output = call(*toy).out
    assert "stopped at 8 of 12, saved" in output
    assert json.loads((newest(tmp_path / "out") / "run.json").read_text())["val_loss"] is None
    assert log_rows(tmp_path / "out")[-1]["val_loss"] == ""
    call(*toy)
    assert result(tmp_path / "whole") == result(tmp_path / "out")
    assert train.checkpoints(tmp_path / "whole") and len(train.checkpoints(tmp_path / "out")) == 1
    assert "nothing left to do" in call(*toy).out


def test_more_iterations_keep_the_decay(toy, call, tmp_path):
    call(*toy, "--max_iters=6")
    call(*toy, "--max_iters=9")
    rates = [float(row["lr"]) for row in log_rows(tmp_path / "out")[1:]]
    assert len(rates) == 9 and rates[6:] == pytest.approx([0.001] * 3) and rates[2] > 0.005
    output = call(*toy, "--max_iters=10", "--learning_rate=0.02").out
    assert "learning_rate = 0.02 (was 0.01)" in output and "min_lr = 0.002" in output
    assert float(log_rows(tmp_path / "out")[-1]["lr"]) == pytest.approx(0.002)


def test_newest_and_best_are_kept_and_the_best_is_sampled(call, work, tmp_path):
    (tmp_path / "input.txt").write_text((work / "input.txt").read_text("utf-8")[:9000], "utf-8")
    call("prepare.py", "--val_fraction=0.5", "--vocab_size=300")
    args = ["train.py", *TOY, "--max_iters=200", "--optimizer=muon", "--learning_rate=0.03", "--weight_decay=0",
            "--eval_interval=20", "--log_interval=50"]
    call(*args)
    losses = {int(row["iter"]): float(row["val_loss"]) for row in log_rows(tmp_path / "out") if row["val_loss"]}
    del losses[0]
    best = min(losses, key=losses.get)
    assert best < 200  # a small text is soon learned by heart
    assert [int(path.name[5:]) for path in train.checkpoints(tmp_path / "out")] == [best, 200]
    assert train.find_model(tmp_path / "out").name == f"step-{best:07d}"
    assert f"at iteration {best}" in call(*args).out


def test_a_save_reaches_the_disk_before_it_is_renamed(toy, call, tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def spy_fsync(number):
        events.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def spy_rename(self, target):
        events.append(f"{self.name} -> {Path(target).name}")
        return rename(self, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("the names of open files come from /proc")
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    call(*toy, "--max_iters=2", "--eval_interval=2")
    at = events.index("tmp -> step-0000002")
    assert sorted(events[:at]) == sorted([*os.listdir(tmp_path / "out/step-0000002"), "tmp"])
    assert events[at + 1] == "out"


def test_how_the_work_is_split_changes_nothing(toy, call, tmp_path):
    """Micro-batches, recomputed layers, 2 and 4 processes; then 10 more iterations in one process."""
    args = (*toy, "--max_iters=50", "--eval_interval=25", "--lr_decay_iters=60")
    call(*args, "--batch_size=8", "--gradient_accumulation_steps=1", "--out_dir=a")
    call(*args, "--batch_size=2", "--gradient_accumulation_steps=4", "--gradient_checkpointing=true", "--out_dir=b")
    run(*args, "--out_dir=c", cwd=tmp_path, processes=2)
    run(*args, "--out_dir=d", cwd=tmp_path, processes=4)
    for name in "abcd":
        split = ["--batch_size=8", "--gradient_accumulation_steps=1"] if name == "a" else []
        call(*args, *split, "--max_iters=60", f"--out_dir={name}")
        assert_same_losses(tmp_path / "a", tmp_path / name)
    assert len(log_rows(tmp_path / "d")) == 61


def test_layers_are_recomputed_when_asked(toy, call, monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint",
                        lambda *args, **kwargs: calls.append(0) or original(*args, **kwargs))
    call(*toy, "--max_iters=2", "--out_dir=a")
    assert not calls
    call(*toy, "--max_iters=2", "--gradient_checkpointing", "--out_dir=b")
    assert len(calls) == 2 * 2 * 2  # iterations, micro-batches, layers


def test_each_process_evaluates_its_share(work, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(train, "block_size", 32)
    data = prepare.Data(work / "data")
    autocast = torch.autocast("cpu", enabled=False)
    model = new_model(vocab_size=data.meta["vocab_size"])
    losses = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        machine = SimpleNamespace(rank=rank, world=world, micro_batch=3, device=torch.device("cpu"), autocast=autocast)
        losses.append(train.evaluate(model, data, machine)["val_loss"])
    assert losses[1] + losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert min(losses[1:]) > 0.4 * losses[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_training_is_near_float32(toy, call, work, tmp_path, dtype):
    call(*toy, f"--dtype={dtype}")
    pairs = list(zip(log_rows(work / "out")[1:], log_rows(tmp_path / "out")[1:], strict=True))
    for one, other in pairs:
        assert float(other["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=0.02)
        assert float(other["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=0.2)
    assert any(one["train_loss"] != other["train_loss"] for one, other in pairs)
    saved = load_file(newest(tmp_path / "out") / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_the_loss_scale_is_resumed(toy, call, tmp_path):
    call(*toy, "--dtype=float16", "--max_iters=4")
    file = newest(tmp_path / "out") / "trainer.pt"
    trainer = torch.load(file, weights_only=True)
    trainer["scaler"]["scale"] = 256.0
    torch.save(trainer, file)
    call(*toy, "--dtype=float16", "--max_iters=6")
    assert torch.load(newest(tmp_path / "out") / "trainer.pt", weights_only=True)["scaler"]["scale"] == 256.0


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ,
                    reason="torch.compile does not know a CPU that is pretended")
def test_a_compiled_run_equals_an_uncompiled_one(toy, work, tmp_path):
    output = run(*toy, "--compile=true", "--max_iters=4", "--lr_decay_iters=12", cwd=tmp_path)
    assert "compiling" in output.stdout
    if "not compiled" in output.stdout:
        pytest.skip("torch.compile finds no C++ compiler here")
    for one, other in zip(log_rows(work / "out")[:5], log_rows(tmp_path / "out"), strict=True):
        assert float(other["train_loss"] or 0) == pytest.approx(float(one["train_loss"] or 0), rel=1e-4)


def test_fine_tuning_a_bfloat16_folder(toy, call, work, tmp_path):
    """The folder that comes out is of float32 and says so: transformers loads just what was trained."""
    from transformers import AutoModelForCausalLM
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(newest(work / "out")).to(torch.bfloat16).save_pretrained(source)
    shutil.copy(work / "data/tokenizer.json", source)
    config = json.loads((source / "config.json").read_text())
    for eos in None, [0, 3], 5:  # whatever the source's, the data's end of text counts
        (source / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
        out = tmp_path / f"out-{eos}"
        output = call("train.py", "--device=cpu", f"--init_from={source}", f"--data_dir={work}/data", f"--out_dir={out}",
                      "--max_iters=3", "--block_size=32").out
        assert "adamw" in output and "0.0001" in output
    theirs, ours = AutoModelForCausalLM.from_pretrained(newest(out)).eval(), train.load_model(newest(out)).eval()
    tokens = random_tokens(1, 32)
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id == 0
    assert close(ours(tokens), theirs(tokens).logits)
    assert "n_layer" in refusal(call, "train.py", f"--init_from={source}", f"--data_dir={work}/data", "--out_dir=b",
                                "--n_layer=3")
    again = ("train.py", "--device=cpu", f"--data_dir={work}/data", f"--out_dir={out}", "--max_iters=4")
    assert f"add --init_from={source}" in refusal(call, *again)
    assert "iterations 3 to 4" in call(*again, f"--init_from={source}", "--block_size=32").out
    assert "add --init_from" in refusal(call, *again, "--init_from=" + str(work / "out"))


# ---------------------------------------------------------------------------------- options and the machine

def test_import_does_nothing(tmp_path):
    code = ("import sys, prepare; assert 'torch' not in sys.modules; import sample, train; "
            "assert not train.torch.cuda.is_initialized()")
    output = subprocess.run([sys.executable, "-c", code, "--inptu=no"], cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (output.returncode, output.stdout, output.stderr, contents(tmp_path)) == (0, "", "", {})


def test_overrides(toy, call, tmp_path, work):
    config = dict(vars(train))
    flags = "--learning_rate=1 --eval_only --wandb_log 0 --out_dir=a=b --max_iters 7 --deterministic TRUE"
    prepare.configure(config, flags.split(), train.presets)
    assert [config[key] for key in ("eval_only", "wandb_log", "out_dir", "max_iters", "deterministic")] == [
        True, False, "a=b", 7, True]
    assert config["learning_rate"] == 1 and type(config["learning_rate"]) is float
    (tmp_path / "small.py").write_text('"""a comment"""\nn_layer = 3  # few\nlearning_rate = 1e-3\ncompile = "false"\n')
    config = dict(vars(train))
    prepare.configure(config, [f"{tmp_path}/small.py", "--size=135m", "--n_head=3"], train.presets)
    assert [config[key] for key in ("n_layer", "n_head", "n_embd", "learning_rate")] == [3, 3, 576, 0.001]
    (tmp_path / "bad.py").write_text("import os\nn_layer = os.getpid()\n")
    assert "bad.py" in refusal(call, "train.py", "bad.py")

    assert "did you mean --learning_rate?" in refusal(call, "train.py", "--learning_rte=1")
    assert "did you mean" not in refusal(call, "train.py", "--zzz=1")
    output = call("train.py", "--help").out
    assert re.search(r"\nlog_interval = \d+ +# iterations", output) and "python train.py" in output
    assert "overriding: max_iters = 12" in call(*toy, "--out_dir=new").out

    shutil.copytree(work / "out", tmp_path / "a=b")
    before = contents(tmp_path)
    output = call(*toy, "--eval_only", "--out_dir=a=b").out
    assert "bits per byte" in output and "perplexity" in output and contents(tmp_path) == before
    assert "--eval_only" in refusal(call, *toy, "--eval_only=1", "--out_dir=c")


def test_a_resume_is_of_the_same_run(toy, call, work, tmp_path):
    call(*toy, "--max_iters=2")
    for flag, fix in (("--n_layer=3", "add --n_layer=2,"), ("--size=135m", "add --size=tiny,"),
                      ("--optimizer=muon", "add --optimizer=adamw,"), ("--init_from=scratch", "another --out_dir")):
        assert fix in refusal(call, *toy, flag)
    assert "holds no run" in refusal(call, *toy, "--init_from=resume", "--out_dir=none")


def test_a_resume_is_on_the_same_text_unless_another_is_named(toy, call, work, tmp_path):
    shutil.copytree(work / "data", tmp_path / "data")
    args = ["train.py", *TOY, "--data_dir=data"]
    call(*args, "--max_iters=2")
    (tmp_path / "other.txt").write_text((ROOT / "input.txt").read_text("utf-8")[60_000:120_000], "utf-8")
    for folder in "named", "data":
        call("prepare.py", "--input=other.txt", f"--tokenizer={work}/data", f"--data_dir={folder}")
    assert "data is not the text" in refusal(call, *args)
    assert "data_dir = named (was data)" in call(*args, "--data_dir=named", "--max_iters=3").out


@pytest.mark.parametrize("variables", ["RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2", "WORLD_SIZE=", "RANK=1 WORLD_SIZE=1",
                                       "RANK=1 WORLD_SIZE=2"])
def test_stray_launcher_variables_mean_nothing(toy, call, tmp_path, monkeypatch, variables):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    assert "saved" not in call(*toy, "--max_iters=2").err
    assert len(train.checkpoints(tmp_path / "out")) == 1
    assert refusal(call, *toy, "--max_iters=none").startswith("error: --max_iters=none")


def test_an_error_on_any_rank_is_one_line_with_its_rank(toy, tmp_path):
    output = run(*toy, "--batch_size=1", "--gradient_accumulation_steps=1", cwd=tmp_path, processes=2, status=1)
    lines = [line for line in output.stderr.splitlines() if line.startswith("error on rank")]
    assert {line[:16] for line in lines} <= {"error on rank 0:", "error on rank 1:"} and lines
    assert "2 processes cannot share" in lines[0]
    assert "run python prepare.py" in run("train.py", *TOY, "--data_dir=none", cwd=tmp_path, processes=2,
                                          status=1).stderr


def shim(folder, text):
    """The environment of a process in which a sitecustomize.py makes the platform misbehave."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(text)
    return os.environ | {"PYTHONPATH": str(folder)}


SHIMS = {
    "fsync": "import os\ndef fsync(number):\n    raise OSError(22, 'Invalid argument')\nos.fsync = fsync\n",
    "flock": "import fcntl\ndef flock(*_):\n    raise OSError(38, 'Function not implemented')\nfcntl.flock = flock\n",
    "clock": "import time\ntime.perf_counter = lambda: 1.0\n",
}


@pytest.mark.parametrize("what", SHIMS)
def test_what_the_platform_cannot_do_ends_no_run(toy, work, tmp_path, what):
    output = run(*toy, cwd=tmp_path, env=shim(tmp_path / "shim", SHIMS[what]))
    assert output.stdout.count("warning") == (what != "clock")
    assert_same_losses(work / "out", tmp_path / "out")


def test_a_curve_that_cannot_be_drawn_ends_no_run(toy, work, call, tmp_path, monkeypatch):
    import matplotlib.figure

    def broken(*_, **__):
        raise ValueError("no picture today")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", broken)
    assert call(*toy).out.count("no picture today") == 1
    assert_same_losses(work / "out", tmp_path / "out")


def test_output_that_cannot_be_shown_ends_no_run(toy, work, tmp_path):
    for name, env in (("a", {"PYTHONIOENCODING": "cp1252"}), ("b", {"LC_ALL": "C", "PYTHONUTF8": "0"})):
        run(*toy, f"--out_dir={name}", cwd=tmp_path, env=os.environ | env)
        assert_same_losses(work / "out", tmp_path / name)
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *toy[1:]])
    sampling = shlex.join([sys.executable, str(ROOT / "sample.py"), f"--model={work}/out", "--device=cpu"])
    for line in (f"{command} --out_dir=c 2>&1 | head -1", f"{command} --out_dir=d 2>&-",
                 f"{sampling} --max_new_tokens=100000000 | head -c 20", f"{sampling} --help | head -1"):
        done = subprocess.run(["bash", "-c", line + "; echo ${PIPESTATUS[0]}"], cwd=tmp_path, capture_output=True,
                              text=True, timeout=120)
        assert done.stdout.endswith("0\n") and "Traceback" not in done.stderr + done.stdout, (line, done)
    assert_same_losses(work / "out", tmp_path / "c")
    assert_same_losses(work / "out", tmp_path / "d")


def test_weights_and_biases_continues_one_run(toy, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refusal(call, *toy, "--wandb_log=1", "--out_dir=new")
    monkeypatch.delitem(sys.modules, "wandb")
    pytest.importorskip("wandb", reason="wandb is not installed")
    for count in "3", "5":
        run(*toy, "--wandb_log=1", f"--max_iters={count}", cwd=tmp_path, env=os.environ | {"WANDB_MODE": "offline"})
    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    logged = b"".join(file.read_bytes() for file in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert all(value.encode() in logged for row in log_rows(tmp_path / "out") for value in row.values())
    assert len({folder.name.split("-")[-1] for folder in folders}) == 1


# ------------------------------------------------------------------------------------------ faults, bad input

def test_out_of_memory_halves_the_micro_batch(toy, call, work, tmp_path, monkeypatch):
    forward, limit = torch.nn.Embedding.forward, 2

    def short_of_memory(self, tokens):
        if self.training and len(tokens) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens)

    monkeypatch.setattr(torch.nn.Embedding, "forward", short_of_memory)
    output = call(*toy).out
    assert output.count("out of memory: 2 sequences") == 1
    assert_same_losses(work / "out", tmp_path / "out")
    limit = 0
    assert "--block_size=32" in refusal(call, *toy, "--out_dir=new")


def test_what_is_not_finite_is_skipped_and_never_saved(toy, call, tmp_path, monkeypatch):
    clip, calls, bad = torch.nn.utils.clip_grad_norm_, [], (3, 4)

    def spoiled(parameters, largest):
        parameters = list(parameters)
        calls.append(0)
        if len(calls) in bad:
            parameters[0].grad.fill_(math.nan)
        return clip(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    assert call(*toy).out.count("skipped") == 2 and newest(tmp_path / "out").name == "step-0000012"
    calls, bad = [], range(6, 99)
    assert "lower --learning_rate" in refusal(call, *toy, "--out_dir=new")
    assert newest(tmp_path / "new").name == "step-0000008"
    assert all(p.isfinite().all() for p in train.load_model(newest(tmp_path / "new")).parameters())
    bad = ()

    def explode(self):
        self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", explode)
    assert "not finite" in refusal(call, *toy, "--out_dir=inf")
    assert not train.checkpoints(tmp_path / "inf")


def test_a_validation_loss_of_nan_is_never_the_best(work, tmp_path):
    shutil.copytree(work / "out", tmp_path / "out")
    record = json.loads((newest(work / "out") / "run.json").read_text())
    for iteration, loss in ((13, None), (14, 99.0)):
        path = tmp_path / f"out/step-{iteration:07d}"
        shutil.copytree(newest(work / "out"), path)
        (path / "run.json").write_text(json.dumps(record | {"val_loss": loss}))
    assert train.find_model(tmp_path / "out").name == "step-0000012"
    shutil.rmtree(tmp_path / "out/step-0000012")
    assert train.find_model(tmp_path / "out").name == "step-0000014"
    shutil.rmtree(tmp_path / "out/step-0000014")
    assert train.find_model(tmp_path / "out").name == "step-0000013"


def test_no_compiler_is_no_error(toy, tmp_path):
    broken = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    output = run(*toy, "--compile=true", "--max_iters=2", cwd=tmp_path, env=broken).stdout
    assert output.count("warning: not compiled") == 1 and log_rows(tmp_path / "out")[-1]["iter"] == "2"


def test_a_full_disk_keeps_the_checkpoint_before(toy, call, tmp_path):
    resource = pytest.importorskip("resource", reason="file-size limits are POSIX's")
    call(*toy, "--max_iters=4", "--lr_decay_iters=12")
    before = contents(tmp_path / "out/step-0000004")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    error = run(*toy, cwd=tmp_path, status=1, preexec_fn=limit).stderr
    assert "cannot save out/step-0000008" in error and "File too large" in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert contents(tmp_path / "out/step-0000004") == before and len(train.checkpoints(tmp_path / "out")) == 1
    call(*toy)
    assert log_rows(tmp_path / "out")[-1]["iter"] == "12" and not (tmp_path / "out/tmp").exists()


def test_a_programming_error_keeps_its_traceback(toy, work, tmp_path):
    script = (ROOT / "train.py").read_text()
    for name in ("prepare.py", "sample.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "train.py").write_text(script.replace("return self.down_proj(", "return self.down_porj("))
    done = subprocess.run([sys.executable, "train.py", *toy[1:], f"--init_from={work}/out"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "down_porj" in done.stderr


@pytest.mark.parametrize("processes,number", [(0, "SIGINT"), (0, "SIGHUP"), (2, "SIGTERM")])
def test_a_signal_saves_and_ends(toy, call, tmp_path, processes, number):
    process = start(*toy, "--max_iters=100000", "--eval_interval=10", cwd=tmp_path, processes=processes)
    out = tmp_path / "out"
    wait_for_rows(process, out, 12)
    told = process.pid
    if processes:  # one of torchrun's two workers is told, and the other one has to agree
        told = int(subprocess.getoutput(f"pgrep -P {process.pid} -f train.py").split()[0])
    os.kill(told, getattr(signal, number))
    output, errors = process.communicate(timeout=60)
    iteration = int(newest(out).name[5:])
    assert process.returncode == 0 and iteration >= 11, (output, errors)
    assert "Ctrl-C again quits at once" in output + errors
    assert f"stopped at {iteration} of 100,000, saved; the same command goes on" in output
    assert [int(row["iter"]) for row in log_rows(out)] == list(range(iteration + 1))
    assert f"iterations {iteration:,} to {iteration + 1:,}" in call(*toy, f"--max_iters={iteration + 1}").out


def test_a_second_signal_ends_at_once_and_a_second_run_is_refused(toy, tmp_path):
    process = start(*toy, "--max_iters=100000", cwd=tmp_path)
    wait_for_rows(process, tmp_path / "out", 2)
    assert "another run uses out" in run(*toy, cwd=tmp_path, status=1).stderr
    process.send_signal(signal.SIGSTOP)  # so that both signals arrive before it can end by itself
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_preparing_anew_leaves_a_running_training_alone(work, call, tmp_path):
    shutil.copytree(work / "data", tmp_path / "data")
    call("train.py", *TOY, "--max_iters=300", "--eval_interval=300", "--out_dir=alone")
    process = start("train.py", *TOY, "--max_iters=300", "--eval_interval=300", cwd=tmp_path)
    wait_for_rows(process, tmp_path / "out", 3)
    (tmp_path / "input.txt").write_text("another text\n" * 500)
    call("prepare.py", "--vocab_size=260")
    assert process.communicate(timeout=120) and process.returncode == 0
    assert_same_losses(tmp_path / "alone", tmp_path / "out")
    assert (newest(tmp_path / "out") / "tokenizer.json").read_bytes() == (
        newest(tmp_path / "alone") / "tokenizer.json").read_bytes()
    assert "another tokenizer" in refusal(call, "train.py", *TOY, "--max_iters=301")


NEWEST = "out/step-0000012"


def nothing(work):
    pass


def cut(name):
    return lambda work: (work / name).write_bytes((work / name).read_bytes()[:-99])


def remove(name):
    return lambda work: (work / name).unlink()


def config(name=f"{NEWEST}/config.json", **changes):
    return lambda work: (work / name).write_text(json.dumps(json.loads((work / name).read_text()) | changes))


def tensors(changes, name=f"{NEWEST}/model.safetensors"):
    def change(work):
        kept = load_file(work / name) | changes
        save_file({key: value for key, value in kept.items() if value is not None}, work / name)
    return change


def beyond_the_vocabulary(work):
    (work / "data/val.bin").write_bytes(b"\3" * os.path.getsize(work / "data/val.bin"))


BAD_TRAINING = [  # what train.py is told, what the line must name, what is done to a folder with data/ and out/ before
    ("--n_embd=36 --out_dir=new", "--n_embd=36", nothing), ("--size=7b", "135m", nothing),
    ("--optimizer=sgd --out_dir=new", "adamw or muon", nothing), ("--init_from=no/model --out_dir=new", "no/model", nothing),
    ("--data_dir=typo --out_dir=new", "prepare.py --input=TEXT --data_dir=typo", nothing),
    ("--block_size=64 --init_from=out --out_dir=new", "--block_size=64", nothing),
    ("--out_dir=input.txt", "input.txt", nothing), ("--vocab_size=100 --out_dir=new", "--vocab_size=100", nothing),
    ("", "meta.json", remove("data/meta.json")), ("", "meta.json", cut("data/train.bin")),
    ("", "meta.json", config("data/meta.json", tokenizer_sha256="0")),
    ("", NEWEST, cut(f"{NEWEST}/trainer.pt")), ("--out_dir=new", "771", beyond_the_vocabulary),
    ("", "trainer.pt", remove(f"{NEWEST}/trainer.pt")), ("", "run.json", cut(f"{NEWEST}/run.json")),
    ("", "older train.py", remove(f"{NEWEST}/run.json")),
    ("", "trainer.pt", lambda w: (w / NEWEST / "trainer.pt").write_bytes(b"cos\nmkdir\n(S'pwned'\ntR.")),
    ("", "config.json", remove(f"{NEWEST}/config.json")), ("", NEWEST, cut(f"{NEWEST}/config.json")),
    ("", "attention_bias", config(attention_bias=True)), ("", "mlp_bias", config(mlp_bias=True)),
    ("", "gelu", config(hidden_act="gelu")), ("", "rope_type", config(rope_parameters={"rope_type": "yarn"})),
    ("", "rope_scaling", config(rope_scaling={"factor": 2.0})), ("", "lm_head", config(tie_word_embeddings=False)),
    ("", "num_hidden_layers", config(num_hidden_layers=None)), ("", "hidden_size", config(hidden_size="abc")),
    ("", "num_attention_heads", config(num_attention_heads=0)), ("", "hidden_size", config(hidden_size=-4)),
    ("", "rope_theta", config(rope_theta=[])), ("", NEWEST, cut(f"{NEWEST}/model.safetensors")),
    ("", "model.norm", tensors({"model.norm.weight": None})), ("", "bias", tensors({"bias": torch.ones(3)})),
    ("", "model.norm", tensors({"model.norm.weight": torch.ones(31)}))]


@pytest.mark.parametrize("args,named,damage", BAD_TRAINING)
def test_bad_input_of_training_is_explained(work, tmp_path, damage, args, named, call):
    shutil.copytree(work, tmp_path / "w")
    damage(tmp_path / "w")
    before = contents(tmp_path)
    assert named in refusal(call, "train.py", *TOY, *args.split(), cwd=tmp_path / "w")
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys()} <= {"new", "log.csv"}


BAD_FLAGS = {
    "train.py": "size max_iters=1.5 max_iters=many max_iters=-5 dropout=x eval_only=maybe batch_size=-1 batch_size=0 "
                "n_head=-2 n_head=3 n_kv_head=3 dropout=1 dropout=nan seed=-1 min_lr=9 warmup_iters=13 compile=maybe "
                "dtype=int8 device=cuda:99 device=abacus block_size=20000 learning_rte=1 beta2=1.5 max_iters",
    "prepare.py": "inptu=a vocab_size=256 vocab_size=65537 val_fraction=0 val_fraction=nan val_fraction=",
    "sample.py": "temperature=-1 temperature=nan top_p=0 top_p=1.5 min_p=2 top_k=-1 num_samples=0 max_new_tokens=0 "
                 "port=70000 dtype=int8 model=none prompt=FILE:no tempatur=1 seed=-1"}


@pytest.mark.parametrize("script,flag", [(script, flag) for script in BAD_FLAGS for flag in BAD_FLAGS[script].split()])
def test_bad_flags_are_named(toy, work, call, script, flag, tmp_path, capsys):
    args = {"train.py": toy, "prepare.py": [script], "sample.py": [script, "--device=cpu", f"--model={work}/out"]}
    assert flag.split("=")[0] in refusal(call, *args[script], "--" + flag)
    assert {path.name for path in contents(tmp_path)} <= {"out", "log.csv"}


def test_the_commands_of_the_readme_work(toy, call, work, tmp_path):
    """Every python command of the README that needs no network and no GPU, with the shape of a toy."""
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    (tmp_path / "my.txt").write_text((work / "input.txt").read_text("utf-8"), "utf-8")
    (tmp_path / "prompt.txt").write_text("The")
    commands = re.findall(r"(?m)^python (\w+\.py [^#\n|&]*)", (ROOT / "README.md").read_text("utf-8"))
    elsewhere = "http|Hugging|web|135m|360m|1.7b|cuda|gguf|test_|parquet|jsonl"
    commands = [line for line in commands if not re.search(elsewhere, line)]
    assert len(commands) >= 5
    for number, (script, *flags) in enumerate(map(shlex.split, commands)):
        shape = [*TOY, f"--out_dir={number}", "--max_iters=2"] if script == "train.py" else []
        call(script, *flags, *shape)


# -------------------------------------------------------------------------------------------------- sampling

VALUES = {"num_samples": 1, "max_new_tokens": 20, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
          "repetition_penalty": 1.0, "seed": 1337}


def picked(llama, tokens, **changes):
    """The ids (B, max_new_tokens) that Llama.generate adds to tokens (B, T)."""
    values = VALUES | changes
    new = llama.generate(tokens, values["max_new_tokens"], sample.chooser(values, "cpu"))
    return torch.cat(list(new), 1)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_equals_transformers(work, penalty):
    from transformers import AutoModelForCausalLM
    folder, tokens = train.find_model(work / "out"), random_tokens(3, 10)
    theirs = AutoModelForCausalLM.from_pretrained(folder).generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, eos_token_id=None,
        repetition_penalty=penalty)
    llama = train.load_model(folder).eval()
    assert torch.equal(picked(llama, tokens, repetition_penalty=penalty), theirs[:, 10:])


def test_past_the_context_its_last_half_is_kept():
    llama = new_model(initializer_range=0.5).eval()  # large weights: each next token depends on all before
    tokens = random_tokens(2, 10)
    ids = torch.cat((tokens, picked(llama, tokens, max_new_tokens=60)), 1)
    start = 0
    for end in range(10, 70):  # the context is 32 positions
        if end - start > 32:
            start = end - 16
        assert torch.equal(llama(ids[:, start:end])[:, -1].argmax(1), ids[:, end])
    before = torch.get_rng_state()
    one, two = (picked(llama, tokens[[0, 0]], temperature=1.0, max_new_tokens=50) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert torch.equal(before, torch.get_rng_state())  # the random numbers are its own


def test_filters_equal_transformers(monkeypatch):
    import transformers.generation as g
    monkeypatch.setattr(torch, "multinomial", lambda probs, *_, **__: probs)
    logits = 3 * torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    tokens = random_tokens(8, 6, high=50)
    filters = {"repetition_penalty": (g.RepetitionPenaltyLogitsProcessor, 1.7),
               "temperature": (g.TemperatureLogitsWarper, 0.7), "top_k": (g.TopKLogitsWarper, 20),
               "top_p": (g.TopPLogitsWarper, 0.8), "min_p": (g.MinPLogitsWarper, 0.05)}
    off = VALUES | {"temperature": 1.0}
    for name, (kind, value) in filters.items():  # each alone
        ours = sample.chooser(off | {name: value}, "cpu")(logits, tokens)
        expected = kind(value)(tokens, logits).softmax(1)
        torch.testing.assert_close(ours / ours.sum(1, keepdim=True), expected)
    ours = sample.chooser(off | {name: value for name, (_, value) in filters.items()}, "cpu")(logits, tokens)
    for kind, value in filters.values():  # and all together
        logits = kind(value)(tokens, logits)
    torch.testing.assert_close(ours / ours.sum(1, keepdim=True), logits.softmax(1))


def test_stream_gives_whole_characters_and_ends_each_sample(work, monkeypatch):
    tokenizer = Tokenizer.from_file(f"{work}/data/tokenizer.json")
    llama = train.load_model(newest(work / "out"))
    text, end = "Zoë 日本 👍🏽!", llama.config.eos_token_id
    ids = tokenizer.encode(text).ids
    rows = torch.tensor([ids[:4] + [end] + ids[5:], ids])
    monkeypatch.setattr(llama, "generate", lambda *_, **__: iter(rows.T[:, :, None]))
    pieces = list(sample.stream(llama, tokenizer, [end], VALUES | {"num_samples": 2}))
    assert "".join(second for _, second in pieces) == text and not any("\ufffd" in piece for _, piece in pieces)
    assert not any(first for first, _ in pieces[4:]) and pieces[0][0]


def test_prompts_are_framed_as_documents_are(work, tmp_path):
    llama = train.load_model(newest(work / "out"))
    tokenizer = Tokenizer.from_file(f"{work}/data/tokenizer.json")
    assert sample.prompt_ids(tokenizer, "", llama) == [0]
    plain = sample.prompt_ids(tokenizer, "The", llama)
    tokenizer.add_special_tokens(["<s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = prepare.load_tokenizer(tmp_path)
    llama.config.vocab_size += 1
    assert sample.prompt_ids(tokenizer, "", llama) == [bos]
    assert sample.prompt_ids(tokenizer, "The", llama) == [bos, *plain]
    assert len(sample.prompt_ids(tokenizer, "The old man and the bell", llama)) > 4


def test_command_line(work, call, tmp_path):
    (tmp_path / "prompt.txt").write_text("The")
    args = ["sample.py", "--device=cpu", "--max_new_tokens=50", f"--prompt=FILE:{tmp_path}/prompt.txt"]
    first = run(*args, "--num_samples=3", cwd=work)
    assert first.stdout == call(*args, "--num_samples=3", cwd=work).out
    assert first.stdout != call(*args, "--num_samples=3", "--seed=7", cwd=work).out
    samples = first.stdout.split("\n" + "-" * 20 + "\n")
    assert len(samples) == 3 and all(text.startswith("The") for text in samples)
    assert "goes on from its last half" in first.stderr and "tokens/s" in first.stderr
    assert call(*args[:3], cwd=work).out.strip()  # without a prompt
    assert "context" in refusal(call, *args[:3], "--prompt=" + "word " * 99, cwd=work)
    assert "python train.py first" in refusal(call, "sample.py", cwd=tmp_path)
    process = start("sample.py", "--prompt=Hello", "--max_new_tokens=1000000000", "--device=cpu", cwd=work)
    assert process.stdout.read(6)
    process.send_signal(signal.SIGINT)  # the text so far is left
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and rest.endswith("\n") and "Traceback" not in errors


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ,
                    reason="torch.compile does not know a CPU that is pretended")
def test_a_compiled_sampling_step_gives_the_same_text(work, tmp_path):
    args = ["sample.py", "--device=cpu", "--dtype=float32", "--temperature=0", "--prompt=The", "--max_new_tokens=20"]
    assert run(*args, "--compile", cwd=work).stdout == run(*args, cwd=work).stdout


def test_an_old_checkpoint_is_still_sampled(work, call, tmp_path):
    shutil.copytree(work / "out", tmp_path / "out")
    (newest(tmp_path / "out") / "run.json").unlink()
    config(f"{NEWEST}/config.json", val_loss=1.0)(tmp_path)
    assert call("sample.py", "--device=cpu", "--max_new_tokens=5").out.strip()


# ------------------------------------------------------------------------------------------------------ page

@pytest.fixture(scope="session")
def page(work, tmp_path_factory):
    """The address of a page whose model never ends a text by itself."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    import socket
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(work / "out", folder / "out")
    config(eos_token_id=None)(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as printed:
        server = start("sample.py", "--web=true", f"--port={port}", "--max_new_tokens=2000", cwd=folder,
                       stdout=printed, stderr=printed)
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        assert server.poll() is None  # no request has ended it
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
        printed.seek(0)
        assert "Traceback" not in printed.read()


def test_page_serves_two_at_once_and_survives_bad_input(page):
    from gradio_client import Client
    one, two = Client(page, verbose=False), Client(page, verbose=False)
    rest = (50, 0.8, 1, 0, 0, 1)
    jobs = [client.submit(text, True, 1, *rest, api_name="/write")
            for client, text in ((one, "First"), (two, "Second"), (one, "First"))]
    (first, *_), (second, *_), (third, *_) = (job.result(timeout=120) for job in jobs)
    assert first == third and first.startswith("First") and second.startswith("Second") and "First" not in second
    fourth, status, seed = one.predict("First", False, 1, *rest, api_name="/write")
    assert fourth != first and seed != 1 and re.search(r"tokens, [\d.]+ a second", status)
    with pytest.raises(Exception, match="shorten it"):
        one.predict("word " * 99, True, 1, *rest, api_name="/write")


def test_page_in_a_browser(page, tmp_path):
    """Type, generate, see it grow, stop, meet an error and recover; no sideways scrolling on a phone."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.support import ui as support
    options, driver = webdriver.ChromeOptions(), shutil.which("chromedriver")
    options.binary_location = shutil.which("chromium") or ""
    if not driver or not options.binary_location:
        pytest.skip("Chromium and its driver are not installed")
    for flag in ("headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
                 f"disable-sync disable-component-update user-data-dir={tmp_path}").split():
        options.add_argument("--" + flag)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        browser.implicitly_wait(60)
        wait = support.WebDriverWait(browser, 60, poll_frequency=0.1)

        def click(name):
            browser.find_element("xpath", f"//button[normalize-space()='{name}']").click()

        def text():
            return browser.execute_script("return document.querySelectorAll('textarea')[1].value")

        def type_prompt(prompt):
            box = browser.find_element("tag name", "textarea")
            box.send_keys("\ue009a\ue000" + prompt)  # over all that is there

        for width, height in (1280, 900), (390, 844):
            browser.set_window_size(width, height)
            browser.get(page)
            browser.find_element("xpath", "//button[normalize-space()='Generate']")  # with it, the rest is there
            type_prompt("Hello")
            click("Generate")
            seen = {"Hello"}
            wait.until(lambda _: seen.add(text()) or len(seen) > 3)  # it grows
            click("Stop")
            time.sleep(1)
            stopped = text()
            time.sleep(1)
            assert stopped.startswith("Hello") and text() == stopped
            type_prompt("word " * 99)
            click("Generate")
            browser.find_element("xpath", "//*[contains(text(), 'shorten it')]")
            assert text() == stopped
            type_prompt("Again")
            click("Generate")
            wait.until(lambda _: text().startswith("Again"))
            click("Stop")
            assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


# ------------------------------------------------------------------------------------------------- benchmark

ROUNDS = int(os.environ.get("BENCH_ROUNDS", 5))  # timed turns of each side; the tables show their medians
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PRECISION = torch.bfloat16 if train.has_bfloat16(DEVICE) else torch.float32  # as train.py chooses for 135m
BIG = {"rope_theta": 1e5, "norm_eps": 1e-5} | train.SIZES["135m"]
PARAMETERS = 134_515_008
NEW = 128  # tokens to sample
SHAKESPEARE = SHARED / "tinyshakespeare.txt"
PREPARE = """
import json, sys, time
who, root, text, tokenizer, out = sys.argv[1:]
sys.path.insert(0, root)
import prepare  # and not torch, which would count as memory
answers, sys.stdout = sys.stdout, sys.stderr
tok = prepare.load_tokenizer(tokenizer)
file = open(text, encoding="utf-8")
pieces = list(iter(lambda: file.read(65536), "")) if who == "theirs" else []
for _ in sys.stdin:
    start = time.perf_counter()
    if who == "ours":
        prepare.prepare(text, tokenizer, 4096, 0.1, out)
    for i in range(0, len(pieces), 256):  # 16 MB at a time: what comes back takes many times the memory of the text
        tok.encode_batch(pieces[i:i + 256], add_special_tokens=False)
    print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)
"""


def build(who, dtype, positions):
    """SmolLM2-135M, of train.py or of transformers, with the same random weights in both."""
    config = {theirs: BIG[ours] for ours, theirs in train.SHAPE.items()} | train.ONLY | {
        "tie_word_embeddings": True, "head_dim": 64, "max_position_embeddings": positions,
        "initializer_range": 1 / 24, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": BIG["rope_theta"]}}  # for transformers 5
    if who == "ours":
        model = train.Llama(SimpleNamespace(**config)).to(dtype)
    else:
        from transformers import AutoModelForCausalLM, LlamaConfig
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=dtype, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):  # both have the same names
            if p.dim() == 1:
                p.fill_(1)
            else:
                p.normal_(std=1 / 24)
    return model.to(DEVICE)


def step_worker(who, mode, batch, length):
    """A function that trains 135m for an iteration and returns the loss."""
    train.keep_freed_memory()  # for both sides
    model = build(who, torch.float32, length).train()
    x, y = torch.randint(49152, (2, batch, length)).to(DEVICE)  # the same for all: build has set the seed
    if mode == "compiled":
        for part in model.model.layers if who == "ours" else [model]:
            part.compile(dynamic=False)
        if who == "ours":
            model.slice_loss = torch.compile(train.slice_loss, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True)

    def step():
        with torch.autocast(DEVICE.type, PRECISION, enabled=PRECISION != torch.float32):
            if who == "ours":
                loss = model.loss(x, y) / y.numel()
            else:
                loss = model(x, labels=y, shift_labels=y, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for a GPU

    return step


def products_worker(batch, length):
    """A function that computes the matrix products of that iteration alone, each forward and twice backward."""
    C, M, KV = 576, 1536, 192
    shapes = [(C, C), (KV, C), (KV, C), (C, C), (M, C), (M, C), (C, M)] * 30 + [(49152, C)]
    weights = [torch.randn(shape, dtype=PRECISION, device=DEVICE) for shape in shapes]
    values = {n: torch.randn(batch * length, n, dtype=PRECISION, device=DEVICE) for n in (C, M, KV, 49152)}

    def products():
        for weight in weights:
            y, x = (values[n] for n in weight.shape)
            torch.mm(x, weight.t())
            torch.mm(y, weight)
            last = torch.mm(y.t(), x)
        return last[0, 0].item()

    return products


def sample_worker(who, dtype, batch):
    """A function that returns NEW tokens after each of `batch` prompts of 128, greedily."""
    model = build(who.removesuffix(" compiled"), getattr(torch, dtype), 2048).eval()
    prompts = torch.randint(49152, (batch, 128)).to(DEVICE)
    if who == "theirs":
        options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": NEW, "do_sample": False}
        return lambda: model.generate(prompts, **options)[:, 128:].tolist()
    if who == "ours compiled":
        model.decode = torch.compile(model.decode, mode="reduce-overhead" if GPU else None)
    choose = sample.chooser(VALUES, DEVICE)
    return lambda: torch.cat(list(model.generate(prompts, NEW, choose)), 1).tolist()


def serve(kind, *args):
    """A process of the benchmark: for each line of stdin, time what a worker returned; answer with a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_float32_matmul_precision("high")  # as train.py has it
    function = globals()[kind](*(int(a) if a.isdigit() else a for a in args))
    for _ in sys.stdin:
        results = []
        times = timeit.repeat(lambda: results.append(function()), number=1, repeat=11 if GPU else 1)
        answer = {"seconds": float(np.median(times[1:] or times)), "result": results[0]}
        if GPU:
            answer["MB"] = torch.cuda.max_memory_allocated() / 1e6
            torch.cuda.empty_cache()  # room for the others
        print(json.dumps(answer), file=answers, flush=True)


def alternate(commands, rounds=ROUNDS, warm_up=1):
    """
    Let a process for each {name: command} take turns. Returns {name: {seconds: median, MB: peak memory,
    result: of the first turn}}; those of a process that fails are nan and None.
    """
    pipes, answers = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}, {name: [] for name in commands}
    processes = {name: subprocess.Popen([sys.executable, *map(str, command)], text=True, **pipes)
                 for name, command in commands.items()}
    for turn in range(rounds + warm_up):
        for name, process in processes.items():
            answer = {"seconds": math.nan, "MB": math.nan, "result": None}
            if process.poll() is None:
                print(file=process.stdin, flush=True)
                answer |= json.loads(process.stdout.readline() or "{}")
            peak = re.search(r"VmHWM:\s*(\d+)", subprocess.getoutput(f"cat /proc/{process.pid}/status"))
            if peak and not GPU:
                answer["MB"] = int(peak[1]) * 1024 / 1e6
            answers[name].append(answer)
            print(f"turn {turn + 1} of {rounds + warm_up}: {name} {answer['seconds']:.3f} s", file=sys.stderr)
    for process in processes.values():
        process.communicate()  # which ends its stdin, and so the process
    return {name: given[-1] | {"seconds": np.median([answer["seconds"] for answer in given[warm_up:]]),
                               "result": given[0]["result"]} for name, given in answers.items()}


def table(title, rows):
    cells = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}\n")
    for row in (cells[0], ["-" * width for width in widths], *cells[1:]):
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths)), "|", flush=True)


def bench_step(folder):
    sides = "ours compiled", "theirs compiled", "ours eager", "theirs eager"
    for size in ((16, 1024), (16, 2048)) if GPU else ((4, 256),):
        found = alternate({side: (__file__, "worker", "step_worker", *side.split(), *size) for side in sides} | {
            "products alone": (__file__, "worker", "products_worker", *size)})
        compiled, eager, products = (found[name]["seconds"] for name in (sides[1], sides[3], "products alone"))
        table(f"Training step, 135m, {size[0]} x {size[1]} tokens, {PRECISION}; theirs: transformers with SDPA", [{
            "": name, "s": f"{a['seconds']:.3f}", "tokens/s": f"{math.prod(size) / a['seconds']:,.0f}",
            "x theirs eager": f"{eager / a['seconds']:.2f}", "x theirs compiled": f"{compiled / a['seconds']:.2f}",
            "of the products' rate": f"{products / a['seconds']:.0%}", "peak MB": f"{a['MB']:,.0f}",
            "loss": "" if "products" in name else a["result"]} for name, a in found.items()])


def bench_sample(folder):
    rows, single = [], {}
    for dtype, batch in [("bfloat16", 1), ("bfloat16", 8), ("float32", 1), ("float32", 8)][:2 if GPU else 4]:
        sides = ("ours", "ours compiled", "theirs") if batch == 1 else ("ours", "theirs")
        found = alternate({who: (__file__, "worker", "sample_worker", who, dtype, batch) for who in sides})
        theirs = found["theirs"]
        one = single.setdefault(dtype, theirs["seconds"])
        for who, a in found.items():
            # past its first difference a text does not count
            pairs = zip(a["result"] or [], theirs["result"] or [])
            same = sum(next((i for i in range(NEW) if x[i] != y[i]), NEW) for x, y in pairs)
            rows.append({"": f"{who}, {dtype} x {batch}", "tokens/s": f"{batch * NEW / a['seconds']:.1f}",
                         "x theirs": f"{theirs['seconds'] / a['seconds']:.2f}",
                         "x theirs single": f"{batch * one / a['seconds']:.2f}", "peak MB": f"{a['MB']:,.0f}",
                         "same tokens": f"{same} of {batch * NEW}"})
    table(f"Sampling, 135m, prompt of 128, {NEW} new tokens, greedy; theirs: generate of transformers", rows)


def bench_prepare(folder, size=10 ** 8, rounds=ROUNDS):
    text, source = folder / "text.txt", SHAKESPEARE if SHAKESPEARE.exists() else ROOT / "input.txt"
    size = text.write_bytes(source.read_bytes() * round(size / source.stat().st_size))
    tokenizer = SHARED / "smollm2" / "tokenizer.json"
    if not tokenizer.exists():
        run("prepare.py", f"--input={source}", cwd=folder)
        tokenizer = shutil.copy(folder / "data" / "tokenizer.json", folder)
    found = alternate({who: ("-c", PREPARE, who, ROOT, text, tokenizer, folder / "data")
                       for who in ("ours", "theirs")}, rounds, warm_up=int(rounds > 1))
    table(f"Preparing {size / 1e6:,.0f} MB, {tokenizer.name}; theirs: encode_batch on 64 kB pieces in memory", [{
        "": who, "s": f"{a['seconds']:.1f}", "MB/s": f"{size / 1e6 / a['seconds']:.2f}",
        "x theirs": f"{found['theirs']['seconds'] / a['seconds']:.2f}", "peak MB": f"{a['MB']:,.0f}"}
        for who, a in found.items()])


def bench_learn(folder):
    text = SHAKESPEARE if SHAKESPEARE.exists() else ROOT / "input.txt"
    clock = [time.perf_counter()]
    for args in ("prepare.py", f"--input={text}"), ("train.py",):
        subprocess.run([sys.executable, ROOT / args[0], *args[1:]], cwd=folder, check=True, capture_output=True)
        clock.append(time.perf_counter())
    last = log_rows(folder / "out")[-1]
    table(f"Learning: the default run on {text.name}, seconds of whole processes", [{
        "iterations": last["iter"], "bits per byte": f"{float(last['val_bpb']):.4f}",
        "prepare.py": f"{clock[1] - clock[0]:.1f}", "train.py": f"{clock[2] - clock[1]:.1f}"}])
    if "NANOGPT" not in os.environ:
        return print("\nnanoGPT: skipped, NANOGPT= names its folder")
    recipe = ("--device=cpu --compile=False --eval_iters=20 --log_interval=50 --block_size=64 --batch_size=12 "
              "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()
    data = Path(os.environ["NANOGPT"]) / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")
    clock = time.perf_counter()
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "train.py", "config/train_shakespeare_char.py", *recipe],
                          cwd=os.environ["NANOGPT"], check=True, capture_output=True, text=True)
    loss = float(re.findall("val loss ([0-9.]+)", done.stdout)[-1])
    table("nanoGPT's recipe for a CPU, a letter a token", [{
        "bits per byte": f"{loss / math.log(2):.4f}", "seconds": f"{time.perf_counter() - clock:.1f}"}])


def bench_llama(folder):
    """llama.cpp on the checkpoint that its converter made of ours: LLAMA_BENCH names its program, GGUF the file."""
    if not {"LLAMA_BENCH", "GGUF"} <= os.environ.keys():
        return print("\nllama.cpp: skipped, LLAMA_BENCH= and GGUF= name its program and the model")
    print(subprocess.getoutput(f"{os.environ['LLAMA_BENCH']} -m {os.environ['GGUF']} -p 0 -n {NEW} -t 2"))


def benchmark(names):
    """The parts that are named; all but prepare1gb if none is."""
    import importlib.metadata
    if names[:1] == ["worker"]:
        return serve(*names[1:])
    parts = {"step": bench_step, "sample": bench_sample, "prepare": bench_prepare, "learn": bench_learn,
             "llama": bench_llama, "prepare1gb": lambda folder: bench_prepare(folder, 10 ** 9, 1)}
    cpu = re.findall("model name\t*: (.*)", subprocess.getoutput("cat /proc/cpuinfo"))[:1]
    print(torch.cuda.get_device_name() if GPU else "no GPU", *cpu, f"{os.cpu_count()} cores",
          f"python {sys.version.split()[0]}", f"torch {torch.__version__}",
          f"transformers {importlib.metadata.version('transformers')}; medians of {ROUNDS} turns", sep=", ")
    for name in names or list(parts)[:-1]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"  # the usual one may hold what a kill left
            parts[name](Path(folder))


if __name__ == "__main__":
    benchmark(sys.argv[1:])
