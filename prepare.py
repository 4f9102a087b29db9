"""
Turn text into tokens: train.bin and val.bin (little-endian uint16), tokenizer.json, meta.json.

$ python prepare.py                                    # input.txt, with a BPE trained on it
$ python prepare.py --input=my.txt --data_dir=data-mine
$ python prepare.py --input=stories/,more.jsonl.gz --tokenizer=HuggingFaceTB/SmolLM2-135M
$ zcat notes.gz | python prepare.py --input=- --data_dir=data-notes

Then `python train.py --data_dir=data-mine` trains on it. This file also reads the tokens back, and
holds what all three scripts share: settings from the command line, and one-line errors.
"""
import ast
import codecs
import contextlib
import difflib
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import signal
import socket
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

# -------------------------------------------------------------------------------------- settings
# text: anything in UTF-8, .jsonl, .json (a list), each also as .gz or .zst; .parquet
input = "input.txt"  # a file, a folder, a glob or a URL, several separated by commas, - for a pipe
text_field = "text"  # the text's field in JSON, or its column in parquet
val_fraction = 0.1   # share of the text, from its end, for validation: at most 10 MB

# tokens
tokenizer = "bpe"    # bpe (trained on the training text), a tokenizer.json, its folder, a hub id
vocab_size = 2048    # of that BPE: 257 to 65536
data_dir = "data"    # the folder to write

# ------------------------------------------------------------------------------------- constants
VAL_LIMIT = 10_000_000  # bytes: keeps evaluating all of the validation split cheap
BPE_TEXT = 2 ** 26      # bytes: a BPE is trained on about this much, sampled evenly
BLOCK = 2 ** 20         # bytes read at a time
PIECE = 2 ** 15         # characters that a core encodes at a time
BATCH = 32              # pieces that the cores share
WORD_REACH = 99         # characters in which the end of a word is looked for
AROUND = 256            # characters on each side of a cut that show whether it changes a token
CONTEXT = 129           # characters before a piece encoded with it; not AROUND / 2: see is_safe

MARK = "<|endoftext|>"  # ends a document in plain text, and is the token that ends it in the BPE
END = MARK + "\n"       # how each document ends in the spool
END_TOKENS = (MARK, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]", "[SEP]")
SPACES = b" \t\n\v\f\r"  # white space, which tokenizers may add or remove
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
WARNED = set()  # what `tolerated` has warned of


# --------------------------------------------------------------------------------- names → files
def find_files(names, text_field, data_dir, work):
    """The paths that --input means, in order. Downloads go to the folder `work`."""
    is_one_name = os.path.exists(os.path.expanduser(names))  # which may have commas in it
    files = []
    for name in [names] if is_one_name else map(str.strip, names.split(",")):
        name = os.path.expanduser(name)
        if "://" in name:
            files.append(download(name, work))
        elif name == "-" or (os.path.exists(name) and not os.path.isdir(name)):
            files.append(name)
        elif name:
            require(Path(name).resolve() not in (data_dir, *data_dir.parents),
                    f"--data_dir={data_dir} is inside --input={name}: choose another folder")
            files += files_of(name, text_field)
    require(files, "--input names no file: give one, as in --input=input.txt")
    return files


def files_of(name, text_field):
    """The text files that are in a folder and its subfolders, or that a glob names."""
    if os.path.isdir(name):
        found = walk(name)
    else:
        root = Path(name).anchor or "."
        is_hidden = re.compile(r"(^|/)\.[^./]").search
        with explained(f"cannot use --input={name}", ValueError):
            found = list(Path(root).glob(os.path.relpath(name, root)))
        if not is_hidden(name):  # only a glob that names hidden files or folders finds them
            found = [path for path in found if not is_hidden(path.as_posix())]

    # each file once: of a file and the links to it, the first
    found = sorted(filter(Path.is_file, found), reverse=True)
    found = sorted({os.path.realpath(path): str(path) for path in found}.values())
    require(found, f"--input={name} names no file")
    files = [path for path in found if has_text(path, text_field)]
    others = sorted(set(found) - set(files))
    print(f"{name}: {len(files):,} files, {len(others):,} skipped: not text", *others[:3])
    require(files, f"{name}: no text files found, see --text_field")
    return files


def walk(folder):
    """Yield the paths in a folder and its subfolders, linked ones too, but no hidden ones."""
    entered = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(where) in entered:
            folders.clear()  # a link has led here again
            continue
        entered.add(os.path.realpath(where))
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(where, name) for name in names if name[0] != ".")


def has_text(path, text_field):
    """Whether a file of a folder can be read, as far as its beginning shows."""
    with explained(f"cannot read {path}", Exception):
        try:
            next(read(path, text_field), None)
        except Refusal:
            return False
    return True


def download(url, work):
    """Save the file that a URL names under the folder `work`. Returns its path."""
    socket.setdefaulttimeout(30)  # seconds that it may stall
    with explained(f"cannot download {url}", Exception), progress(f"downloading {url}") as bar:
        name = os.path.basename(urllib.parse.urlsplit(url).path)
        path = os.path.join(tempfile.mkdtemp(dir=work), f"page-{name}")
        ascii_url = urllib.parse.quote(url, safe="!#$%&'()*+,/:;=?@[]~")
        # urlretrieve also checks the length that was announced
        urllib.request.urlretrieve(ascii_url, path, lambda _, size, total: bar.update(size))
    return path


# ----------------------------------------------------------------------------- files → documents
def spool(files, text_field, file):
    """Copy all text into one file, END after each document. Returns [(byte of its start, path)]."""
    starts = []
    with progress("reading") as bar:
        for path in files:
            starts.append((file.tell(), path))
            # gzip, zstandard and pyarrow have errors of their own
            with explained(f"cannot read {path}", Exception):
                for text in read(path, text_field):
                    bar.update(file.write(text.encode()))
    return starts


def read(path, text_field):
    """Yield the text of a file in parts, with END after each document."""
    # the suffix, before .gz or .zst, tells what is in it
    kind = Path(re.sub(r"\.(gz|zst)$", "", path.lower())).suffix
    is_table = kind in (".csv", ".tsv")
    require(not is_table, f"{path}: {kind} is not read: make it .jsonl, see --text_field")
    with open_file(path) as file:
        # the first character, after a byte order mark and white space
        first = file.peek(1).lstrip(codecs.BOM_UTF8 + SPACES)[:1]
        is_pipe = kind == "" and not os.path.isfile(path)  # no name says what is in it
        if kind == ".parquet":
            from pyarrow.parquet import ParquetFile
            batches = ParquetFile(file).iter_batches(256, columns=[text_field])
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from read_rows(path, rows, text_field)
        elif kind == ".json" and first == b"[":
            yield from read_rows(path, json.load(file), text_field)
        elif kind in (".jsonl", ".ndjson", ".json") or (is_pipe and first == b"{"):
            yield from read_rows(path, file, text_field)
        elif file.peek(1):
            yield from read_plain(path, file)
            yield END


def open_file(path):
    """The bytes of a file, or of standard input for -, unpacked."""
    if path == "-":
        return sys.stdin.buffer
    if path.lower().endswith(".gz"):
        return gzip.open(path)
    file = open(path, "rb")
    if path.lower().endswith(".zst"):
        import zstandard
        unpacker = zstandard.ZstdDecompressor()
        return io.BufferedReader(unpacker.stream_reader(file, read_across_frames=True))
    return file


def read_plain(path, file):
    """Yield the characters of a file in blocks, with every line end as a newline."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    done = 0
    block = True
    while block:
        block = file.read(BLOCK)
        require(b"\0" not in block, f"{path} is not text: it contains NUL bytes")
        done += len(block)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = done - len(error.object) + error.start
            fail(f"{path}: byte {place:,} is not UTF-8: convert it, for example with iconv")


def read_rows(path, rows, text_field):
    """Yield the documents in rows, which are objects or lines of JSON."""
    for number, row in enumerate(rows, 1):
        if isinstance(row, bytes) and not row.strip():
            continue  # a blank line
        problem = f"{path}, line {number:,}: no text named {text_field}, see --text_field"
        with explained(problem, ValueError, LookupError, TypeError, AttributeError):
            if isinstance(row, bytes):
                row = json.loads(row)
            text = row[text_field]
            if text is not None:
                text.encode()  # fails on half a surrogate pair
        if text:
            yield re.sub("\r\n?", "\n", text) + END


def progress(what, size=None):
    """A bar that counts bytes, on a terminal; otherwise one line that says what has started."""
    if not sys.stderr.isatty():
        print(f"{what} ...")
    return tqdm(desc=what, total=size, unit="B", unit_scale=True, disable=None)


# ---------------------------------------------------------------- the split, and its documents
def find_split(file, size, val_fraction):
    """The byte of the spool at which validation begins: the best boundary near the place wanted."""
    wanted = min(val_fraction * size, VAL_LIMIT)
    target = round(size - wanted)
    # at most a percent of the text away, or a tenth of validation if that is less; in a tiny text
    # at least some bytes, or there may be no boundary
    reach = max(2 * len(END), int(min(size, 10 * wanted) / 100))
    low = max(1, target - reach, size - VAL_LIMIT - len(END))
    high = max(0, min(size - len(END) - 1, target + reach))

    start = max(0, low - len(END))  # a mark that ends in the range may begin before it
    file.seek(start)
    window = file.read(high + 1 - start)
    # best first: after a document, before a blank line, after a line, before a space or a character
    for boundary in (rb"<\|endoftext\|>\n?", rb"\n(?=\n)", rb"\n", rb"(?= )", rb"(?=[^\x80-\xbf])"):
        places = [start + match.end() for match in re.finditer(boundary, window)]
        places = [place for place in places if low <= place <= high]
        if places:
            return min(places, key=lambda place: abs(place - target))
    fail(f"{max(0, size - len(END)):,} bytes are too little text for training and validation")


def documents(file, start, stop):
    """Yield the text between two bytes of the spool as (text, whether a document ends there)."""
    mark = re.escape(MARK.encode()) + rb"(?:\n|(?=[^\n]))"  # a line end after a mark is part of it
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = b""
    file.seek(start)
    while block := file.read(min(BLOCK, stop - file.tell())):
        # the last bytes wait for the next block: a mark may continue there
        *ended, rest = re.split(mark, rest + block)
        yield from ((decoder.decode(text), True) for text in ended)
        yield decoder.decode(rest[:-len(MARK)]), False
        rest = rest[-len(MARK):]
    yield decoder.decode(rest.removesuffix(MARK.encode())), rest == MARK.encode()


# --------------------------------------------------------------------------------- the tokenizer
def train_bpe(texts, vocab_size):
    """A BPE like SmolLM2's, but with all 256 bytes, so that no text is lost."""
    bpe = Tokenizer(models.BPE())
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(words)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=[MARK],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=sys.stderr.isatty())
    # cut at ends of words, and very long words anywhere: they would take minutes
    part = re.compile(r"(?s).{1,256}(?:.{0,99}?\w\b)?")
    parts = (match[0] for text, _ in texts for match in part.finditer(text))
    bpe.train_from_iterator(parts, trainer)
    return bpe


def vocabulary_of(tokenizer):
    """(the number of ids, the id that ends a document) of a tokenizer, if we can use it."""
    ids = tokenizer.get_vocab()
    size = 1 + max(ids.values(), default=0)
    ends = [ids[token] for token in END_TOKENS if token in ids]
    require(size <= 65536, f"the tokenizer has {size:,} ids, but uint16 holds 65,536")
    require(ends, f"the tokenizer has no end-of-text token: {' or '.join(END_TOKENS)}")
    return size, ends[0]


# ---------------------------------------------------------------------------- documents → tokens
def pieces(documents, tokenizer):
    """Cut documents, given as (text, whether one ends there), into (context, text, ends)."""
    # The tokens of context + text, less those of the context, are those of the whole document.
    context = text = ""
    place = PIECE
    for part, ends in documents:
        text += part
        while place < len(text) - AROUND - WORD_REACH:
            word = re.compile(r"\w\b").search(text, place, place + WORD_REACH)
            cut = word.end() if word else place
            before = (context + text[max(0, cut - AROUND):cut])[-AROUND:]
            place += PIECE
            if is_safe(before, text[cut:cut + AROUND], tokenizer):
                yield context, text[:cut], False
                context = before[-CONTEXT:]
                text = text[cut:]
                place = PIECE

        if ends and text:
            yield context, text, True
        if ends:
            context = text = ""
            place = PIECE
    if text:
        yield context, text, False


def is_safe(before, after, tokenizer):
    """Whether a cut between two texts changes no token of them."""
    for n in range(1, 9):  # the tokens of a word repeated on and on can depend on how often it is
        if before[:n] == before[n:2 * n] or after[-2 * n:-n] == after[-n:]:
            return False
    if isinstance(tokenizer.model, models.Unigram) and tokenizer.pre_tokenizer is None:
        return False  # which tokens are likeliest can depend on all of the text
    # The cut must be between two tokens, however much of the text comes before and after it. With
    # one length instead of two, a text that repeats itself would pass.
    for head in (before, before[-CONTEXT:]):
        left, *both = encode(tokenizer, [head, head + after, head + after[:CONTEXT]])
        if any(ids[:len(left)] != left for ids in both):
            return False
    return True


def encode(tokenizer, texts):
    """The token ids of each text, without its frame, by all cores."""
    return [code.ids for code in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encoded(documents, tokenizer):
    """Yield documents in pieces: (text, its ids, whether a document begins and whether it ends)."""
    all_pieces = pieces(documents, tokenizer)
    while batch := list(itertools.islice(all_pieces, BATCH)):
        contexts = encode(tokenizer, [context for context, _, _ in batch])
        wholes = encode(tokenizer, [context + text for context, text, _ in batch])
        for (context, text, ends), known, ids in zip(batch, contexts, wholes):
            yield text, ids[len(known):], context == "", ends


def byte_counter(tokenizer):
    """A function: how many bytes, white space aside, a list of ids stands for."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return lambda ids: len(tokenizer.decode(ids).encode().translate(None, SPACES))
    sizes = np.zeros(65536, int)
    for token, number in tokenizer.get_vocab().items():
        # here a token is written with one letter for each byte, and these letters are white space
        sizes[number] = len(re.sub("[ĠĉĊċČč]", "", token))
    return lambda ids: sizes[ids].sum()


# ------------------------------------------------------------------------------- tokens → folder
def prepare(input=input, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction,
            data_dir=data_dir, text_field=text_field):
    """Prepare a text into data_dir, all or nothing, and print what is in it."""
    # ended like this, the temporary folder goes, too
    on_signal(lambda *_: sys.exit("error: stopped: run the same command again"),
              "SIGINT", "SIGTERM", "SIGHUP")
    folder = Path(data_dir).resolve()
    with explained(f"cannot make {data_dir}", OSError):
        check_folder(folder)
        parent = next(path for path in folder.parents if path.exists())
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent) as work, \
                tempfile.TemporaryFile(dir=work) as file:
            if tokenizer != "bpe":
                coder = load_tokenizer(tokenizer)
                vocabulary_of(coder)  # fail now rather than after an hour
            starts = spool(find_files(input, text_field, folder, work), text_field, file)
            size = file.tell()
            split = find_split(file, size, val_fraction)
            place = [path for start, path in starts if start <= split][-1]
            if tokenizer == "bpe":
                print(f"making a BPE of {vocab_size:,} tokens ...")
                step = 1 + split // BPE_TEXT
                texts = itertools.islice(documents(file, 0, split), 0, None, step)
                coder = train_bpe(texts, vocab_size)

            new = Path(work, "new")
            write_folder(new, file, {"train": (0, split), "val": (split, size)}, coder)
            put_in_place(new, folder)
    print(f"validation is the end of the text, from within {place} on")
    print(f"{data_dir} is ready, next: python train.py --data_dir={data_dir}")


def write_folder(folder, file, ranges, tokenizer):
    """Write the four files of a data_dir, from ranges {split: (start, stop)} of the spool."""
    vocabulary, eot = vocabulary_of(tokenizer)
    meta = {"vocab_size": vocabulary, "eos_token_id": eot}
    prefix = prefix_ids(tokenizer)
    bytes_of = byte_counter(tokenizer)
    lost = 0
    folder.mkdir()
    for split, (start, stop) in ranges.items():
        size = 0
        with progress(f"tokenizing {split}", stop - start) as bar, \
                open(folder / f"{split}.bin", "wb") as out:
            out.write(np.array([eot], "<u2"))  # so that the first document follows one, too
            for text, ids, begins, ends in encoded(documents(file, start, stop), tokenizer):
                data = text.encode()
                size += len(data)
                lost += len(data.translate(None, SPACES)) - bytes_of(ids)
                bar.update(len(data))
                if begins:
                    ids = prefix + ids
                if ends:
                    ids = ids + [eot]
                out.write(np.array(ids, "<u2"))
            tokens = out.tell() // 2
        print(f"{split}: {size:,} bytes, {tokens:,} tokens")
        require(tokens > 1, f"the {split} split has no tokens")
        meta |= {f"{split}_tokens": tokens, f"{split}_bytes": size}
    if lost > 0:
        print(f"{lost:,} bytes of the text are lost: the tokenizer has no tokens for them")
    meta["tokenizer_sha256"] = fingerprint(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")


def check_folder(folder):
    """Refuse a data_dir with other files in it: the whole folder will be replaced."""
    require(not folder.is_file(), f"--data_dir={folder} is not a folder")
    require(not folder.is_mount(), f"--data_dir={folder} is mounted: choose a folder inside it")
    other = set()
    with contextlib.suppress(FileNotFoundError):
        other = set(os.listdir(folder)) - {"train.bin", "val.bin", "tokenizer.json", "meta.json"}
    names = ", ".join(sorted(other)[:3])
    require(not other, f"--data_dir={folder} holds {names} and would be replaced: choose another")


def put_in_place(new, folder):
    """Replace a folder with a finished one. Of several at once the last wins, whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in range(100):  # another preparation may put its own there between the two renames
        check_folder(folder)
        old = new.with_name(f"old-{number}")
        try:
            with contextlib.suppress(FileNotFoundError):
                folder.rename(old)
            return new.rename(folder)
        except OSError as error:
            reason = error
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
    fail(f"cannot replace {folder} ({reason})")


# ------------------------------------------------------------------- reading: folder → batches
class Data:
    """A folder of prepare.py, opened once: a run keeps these files, whatever happens to it."""

    def __init__(self, folder):
        again = f"run python prepare.py --data_dir={folder} on your text again"
        with explained(f"cannot read {folder}, {again}", OSError, ValueError):
            self.meta = json.loads(Path(folder, "meta.json").read_text("utf-8"))
            self.files = {split: open(Path(folder, f"{split}.bin"), "rb")
                          for split in ("train", "val")}
        self.tokenizer = load_tokenizer(folder)
        self.folder = folder
        self.eot = self.meta.get("eos_token_id")
        self.start = prefix_ids(self.tokenizer) or [self.eot]  # what an empty prompt stands for

        found = self.meta | {"tokenizer_sha256": fingerprint(self.tokenizer)}
        for split, file in self.files.items():
            found[f"{split}_tokens"] = os.fstat(file.fileno()).st_size // 2
        require(found == self.meta, f"{folder}/meta.json does not match the other files: {again}")

    def windows(self, split, starts, length):
        """The tokens from each start on and the next ones, int64, both (len(starts), length)."""
        # a map that stays open keeps every page that it has read in memory
        ids = np.memmap(self.files[split], "<u2", "r")
        places = np.add.outer(starts, np.arange(length + 1))
        tokens = np.where(places < len(ids), ids.take(places, mode="clip").astype(np.int64), -1)
        require(tokens.max() < self.meta["vocab_size"],
                f"{self.folder}/{split}.bin holds the id {tokens.max()}: prepare your text again")
        return tokens[:, :-1].clip(min=0), tokens[:, 1:]  # past the end targets are -1

    def training_batch(self, first, count, length, seed):
        """Sequences `first` to `first + count - 1` of a run, as windows() gives them."""
        # an epoch has each window once, in an order of its own, from an offset of its own
        per_epoch = self.meta["train_tokens"] // length - 1
        starts = []
        for number in range(first, first + count):
            epoch, place = divmod(number, per_epoch)
            offset, order = epoch_order(seed, epoch, per_epoch, length)
            starts.append(offset + order[place] * length)
        return self.windows("train", starts, length)


@functools.lru_cache(1)
def epoch_order(seed, epoch, windows, length):
    """Where an epoch's first window starts, and the order of its windows (10 million: 0.5 s)."""
    rng = np.random.default_rng((seed, epoch))
    return rng.integers(length), rng.permutation(windows)


# --------------------------------------------------- options and errors, for all three scripts
def configure(config, argv, presets=lambda flags: {}):
    """Set the settings in a script's globals() from argv. Returns what argv gave, {name: value}."""
    settings = settings_of(config)
    flags = {}
    words = list(argv)
    while words:  # --key=value, --key value, --switch, or a file of such settings
        word = words.pop(0)
        if word in ("--help", "-h"):
            source = Path(config["__file__"]).read_text("utf-8")
            block = re.search(r"(?ms)^# -+ settings\n(.*?)^(?:# -+ |def )", source)[1]
            print(ast.get_docstring(ast.parse(source)), block.strip(), sep="\n\n")
            sys.exit()
        if word.endswith(".py") and not word.startswith("--"):
            words = flags_in_file(word) + words
            continue

        require(word.startswith("--"), f"{word}: a flag looks like --key=value; --help lists them")
        name, equals, text = word[2:].partition("=")
        if name not in settings:
            near = difflib.get_close_matches(name, settings, n=1)
            hint = f": did you mean --{near[0]}?" if near else ", see --help"
            fail(f"unknown flag --{name}{hint}")
        default = settings[name]
        is_switch = isinstance(default, bool)
        if not equals and is_switch:
            has_value = words and words[0].lower() in BOOLEANS
            text = words.pop(0) if has_value else "true"
        elif not equals:
            require(words and not words[0].startswith("--"), f"{word} needs a value: {word}=VALUE")
            text = words.pop(0)
        if text.startswith("~/"):  # after a = the shell leaves it
            text = os.path.expanduser(text)

        with explained(f"--{name}={text} must be like --{name}={default}", KeyError, ValueError):
            text.encode()  # fails on bytes that are not UTF-8
            flags[name] = BOOLEANS[text.lower()] if is_switch else type(default)(text)
        if not isinstance(default, str):
            # -1, for a value to be worked out, is allowed only where it is the default
            least = min(0, default)
            require(least <= flags[name] < np.inf, f"--{name}={text} must be {least} or more")

    config.update(presets(flags) | flags)  # flags win over what --size, for example, stands for
    return flags


def settings_of(config):
    """The settings among a script's globals, those with a lowercase name and a plain value."""
    return {name: value for name, value in config.items()
            if name.islower() and name[0] != "_" and isinstance(value, (bool, int, float, str))}


def flags_in_file(path):
    """The lines `name = value` of a file like nanoGPT's configs, as flags. Runs nothing."""
    problem = f"cannot read {path}, which may only have lines of the form name = value"
    with explained(problem, OSError, SyntaxError, ValueError, AttributeError):
        tree = ast.parse(Path(path).read_text("utf-8"))
        lines = tree.body[1:] if ast.get_docstring(tree) else tree.body
        return [f"--{name.id}={ast.literal_eval(line.value)}"
                for line in lines for name in line.targets]


def from_hub(name, *patterns):
    """A folder with those files of a model on the Hugging Face hub."""
    from huggingface_hub import snapshot_download
    with explained(f"{name} is neither a folder here nor a model on the hub", Exception):
        return Path(snapshot_download(name, allow_patterns=patterns))


def load_tokenizer(name):
    """The tokenizers.Tokenizer of a tokenizer.json, of a folder that holds one, or of a hub id."""
    path = Path(name)
    if not path.exists() and path.suffix != ".json":
        path = from_hub(name, "tokenizer.json")
    if path.is_dir():
        path = path / "tokenizer.json"
    # the tokenizers library raises plain Exception, so nothing finer can be named
    with explained(f"cannot load the tokenizer {name}", Exception):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # either may be saved with it
    tokenizer.no_padding()
    return tokenizer


def fingerprint(tokenizer):
    """sha256 of a tokenizer, however its file is laid out."""
    return hashlib.sha256(json.dumps(json.loads(tokenizer.to_str())).encode()).hexdigest()


def prefix_ids(tokenizer):
    """The ids that the tokenizer's own rules put in front of a text: a BOS, or often nothing."""
    encoding = tokenizer.encode("a")
    marks = encoding.special_tokens_mask
    return encoding.ids[:marks.index(0)] if 0 in marks else []


def process_rank():
    """(rank, number of processes), as torchrun sets them. A stray variable alone is ignored."""
    values = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(value.isdigit() for value in values) or "MASTER_ADDR" not in os.environ:
        return 0, 1
    rank, world = map(int, values[:2])
    return (rank, world) if world > 1 else (0, 1)


class Refusal(SystemExit):
    """Ends the program, unless caught: one line on stderr that says what to do, exit status 1."""


def fail(message):
    """Refuse what the user has asked for."""
    rank, world = process_rank()
    where = f" on rank {rank}" if world > 1 else ""
    raise Refusal(f"error{where}: " + " ".join(str(message).split()))


def require(condition, message):
    """Fail with the message unless the condition holds."""
    if not condition:
        fail(message)


@contextlib.contextmanager
def explained(problem, *kinds):
    """Turn an exception of these kinds into one line on stderr; others keep their traceback."""
    try:
        yield
    except kinds as error:
        fail(f"{problem} ({type(error).__name__}: {str(error)[:300]})")


def read_json(path):
    """The values in a JSON file of ours, or a one-line error."""
    with explained(f"cannot read {path}", OSError, ValueError):
        return json.loads(Path(path).read_text("utf-8"))


def printable(text):
    """The text with control characters shown as escapes, since a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def say(line, file=None):
    """Print a line above any progress bar, on the first process only."""
    if process_rank()[0] == 0:
        tqdm.write(line, file=file)


@contextlib.contextmanager
def tolerated(what, *kinds):
    """Turn the failure of something that a run can do without into one warning."""
    try:
        yield
    except kinds as error:
        if what not in WARNED:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            say(f"warning: {what} failed, continuing without ({reason})", sys.stderr)
        WARNED.add(what)


def lock(folder):
    """Lock a folder for this run, where the file system can."""
    with explained(f"cannot write to {folder}: choose another --out_dir", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "log.csv").open("a").close()
    try:
        import fcntl
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder} is in use by another run: wait for its end, or choose another --out_dir")
    except (ImportError, OSError) as error:
        say(f"warning: {folder} cannot be locked ({error}): do not start a second run in it")


class SteadyStream:
    """A standard stream without errors: what cannot be shown is replaced or dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # there is none after 2>&-
        self.stream.reconfigure(errors="replace")
        self.broken = False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()  # a pipe gets it at once, as a terminal does
        except OSError:
            self.broken = True

    def flush(self):
        self.write("")


def steady_output():
    """Let neither a closed pipe nor an unprintable character end this program."""
    sys.stdout = SteadyStream(sys.stdout)
    sys.stderr = SteadyStream(sys.stderr)


def on_signal(handler, *names):
    """Call handler at these signals, except those ignored on purpose, as SIGHUP under nohup."""
    for name in names:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def main():
    steady_output()
    flags = configure(globals(), sys.argv[1:])
    require(257 <= vocab_size <= 65536, f"--vocab_size={vocab_size} must be from 257 to 65536")
    require(0 < val_fraction < 1, f"--val_fraction={val_fraction} must be between 0 and 1")
    require(text_field, "--text_field= is empty: name a field, as in --text_field=text")
    require(data_dir, "--data_dir= is empty: name a folder, as in --data_dir=data")
    require(tokenizer == "bpe" or "vocab_size" not in flags,
            f"--vocab_size is for --tokenizer=bpe: {tokenizer} has its own vocabulary")
    prepare(input, tokenizer, vocab_size, val_fraction, data_dir, text_field)


if __name__ == "__main__":
    main()
