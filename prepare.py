"""
Turn text into tokens: train.bin and val.bin (little-endian uint16), tokenizer.json, meta.json.

$ python prepare.py                                    # input.txt, with a BPE made for it
$ python prepare.py --input=my.txt --data_dir=data-mine
$ python prepare.py --input=stories/,more.jsonl.gz --tokenizer=HuggingFaceTB/SmolLM2-135M
$ zcat notes.gz | python prepare.py --input=- --data_dir=data-notes

Then `python train.py --data_dir=data-mine` trains on it. This file also reads the tokens back, and
holds what all three scripts share: settings from the command line, and errors of one line.
"""
import ast
import bisect
import codecs
import contextlib
import difflib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import signal
import socket
import string
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, pre_tokenizers
from tqdm import tqdm

# ------------------------------------------------------------------------------------- settings

# text: anything in UTF-8, .jsonl, .json (a list), .parquet, and each of them as .gz or .zst
input = "input.txt"  # a file, a folder, a glob, a URL, several with commas between, - for a pipe
text_field = "text"  # what the text is called in JSON and parquet
val_fraction = 0.1   # of the bytes, the last ones, for validation: at most 10 MB

# tokens
tokenizer = "bpe"    # bpe: made from the training text; or a tokenizer.json, its folder, a hub id
vocab_size = 2048    # of that BPE: 257 to 65536
data_dir = "data"    # where the four files go

# ------------------------------------------------------------------------------------ constants

SPLITS = ("train", "val")
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
VAL_LIMIT = 10_000_000  # bytes: evaluating all of the validation split stays cheap on any text
BPE_TEXT = 2 ** 26      # bytes: a BPE is made from about so much, spread over the training text
BLOCK = 2 ** 20         # bytes read at a time
PIECE = 2 ** 15         # characters that a core encodes at a time
BATCH = 32              # pieces that the cores share; their tokens take 100 times the memory
REACH = 99              # characters beyond a place in which the end of a word is looked for
AROUND = 256            # characters on either side of a cut that tell whether it changes a token
TIMEOUT = 30            # seconds that a download may stall

MARK = "<|endoftext|>"  # ends a document in plain text, and is the token that ends it in the BPE
END_TOKENS = (MARK, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]",
              "[SEP]")

# where validation may begin, best first: after a document, before a blank line, after a line,
# before a space, before any character
BOUNDARIES = (rb"<\|endoftext\|>\n?", rb"\n(?=\n)", rb"\n", rb"(?= )", rb"(?=[^\x80-\xbf])")


def check_settings():
    """Refuse the values that a setting must not have."""
    require(257 <= vocab_size <= 65536, f"--vocab_size={vocab_size}: 257 to 65536 are possible")
    require(0 < val_fraction < 1, f"--val_fraction={val_fraction}: it lies between 0 and 1")
    require(text_field, "--text_field= is empty: name a field, as in --text_field=text")
    require(data_dir, "--data_dir= is empty: name a folder, as in --data_dir=data")


# ------------------------------------------------------------------------------- names → files

def find_files(names, data_dir, work):
    """The paths that --input means, in order. Downloads go to the folder `work`."""
    whole = os.path.exists(os.path.expanduser(names))  # a name may have commas in it
    files = []
    for name in [names] if whole else names.split(","):
        name = os.path.expanduser(name.strip())
        if "://" in name:
            files.append(download(name, work))
        elif name == "-" or os.path.exists(name) and not os.path.isdir(name):
            files.append(name)
        elif os.path.isdir(name):
            require(Path(name).resolve() not in (data_dir, *data_dir.parents),
                    f"--data_dir={data_dir} lies in --input={name}: choose another place")
            files += files_under(name)
        elif name:
            found = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
            require(found, f"there is no file {name}")
            real = {}
            for path in found:
                real.setdefault(os.path.realpath(path), path)  # ** may follow a link in circles
            files += real.values()
    require(files, "--input names no file: give one, as in --input=input.txt")
    return files


def files_under(folder):
    """The text files under a folder, each once whatever links there are, without hidden ones."""
    found = {}
    entered = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(where) in entered:
            folders.clear()  # a link has led here again
            continue
        entered.add(os.path.realpath(where))
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            path = os.path.join(where, name)
            if os.path.isfile(path) and name[0] != ".":
                found[os.path.realpath(path)] = path

    files = sorted(path for path in found.values() if is_text(path))
    skipped = len(found) - len(files)
    require(files, f"{folder}: there is no text in this folder, {skipped:,} files skipped")
    print(f"{folder}: {len(files):,} files, {skipped:,} skipped: not text")
    return files


def is_text(path):
    """Whether a file is parquet, or begins without a zero byte, as text does."""
    with explained(f"cannot read {path}", Exception), open_file(path) as file:
        start = file.read(BLOCK)
    return start[:4] == b"PAR1" or b"\0" not in start


def download(url, work):
    """Save the file that a URL names under the folder `work`. Returns its path."""
    socket.setdefaulttimeout(TIMEOUT)
    with explained(f"cannot download {url}", Exception), progress(f"downloading {url}") as bar:
        name = os.path.basename(urllib.parse.urlsplit(url).path) or "page"
        path = os.path.join(tempfile.mkdtemp(dir=work), name)
        ascii_url = urllib.parse.quote(url, safe=string.punctuation)
        # this also compares the length with the one that was announced
        urllib.request.urlretrieve(ascii_url, path, lambda _, size, total: bar.update(size))
    return path


# --------------------------------------------------------------------------- files → documents

def spool(files, text_field, file):
    """
    Copy all text into one file, with MARK after each document, so that every source is read once
    and what follows sees one form. Returns [(the byte where a source begins, its path)].
    """
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
    """Yield the text of a file in parts, with MARK after each document."""
    kind = Path(re.sub(r"\.(gz|zst)$", "", path.lower())).suffix
    require(kind not in (".csv", ".tsv"), f"{path}: {kind} is not read, make a .jsonl or .parquet "
            "of it and name the column with --text_field")
    with open_file(path) as file:
        first = file.peek(1)[:1]
        if kind == "" and first == b"{" and not os.path.isfile(path):
            kind = ".jsonl"  # a pipe has no name that would say so
        if kind in (".jsonl", ".ndjson", ".json", ".parquet"):
            yield from read_records(path, file, kind, text_field)
        else:
            yield from read_plain(path, file)
            yield MARK


def open_file(path):
    """The bytes of a file, or of standard input for -, unpacked."""
    if path == "-":
        return sys.stdin.buffer
    file = open(path, "rb")
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if path.lower().endswith(".zst"):
        import zstandard
        unpacker = zstandard.ZstdDecompressor()
        return io.BufferedReader(unpacker.stream_reader(file, read_across_frames=True))
    return file


def read_plain(path, file):
    """Yield the characters of a file in blocks, with every line end as a newline."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    done = 0
    block = True
    while block:
        block = file.read(BLOCK)
        require(b"\0" not in block, f"{path} is not text: it holds zero bytes")
        done += len(block)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = done - len(error.object) + error.start
            fail(f"{path}: byte {place:,} is not UTF-8: convert it, as iconv -t UTF-8 does")


def read_records(path, file, kind, text_field):
    """Yield the documents in JSON lines, in a JSON list, or in a column of parquet."""
    if kind == ".parquet":
        from pyarrow.parquet import ParquetFile
        batches = ParquetFile(file).iter_batches(256)
        rows = (row for batch in batches for row in batch.to_pylist())
    elif kind == ".json" and file.peek(1)[:1] == b"[":
        rows = json.load(file)
    else:
        rows = file

    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, bytes):
                row = json.loads(row.strip() or "null")
            text = "" if row is None else row[text_field]
            text.encode()  # half a character cannot be
        except (ValueError, LookupError, TypeError, AttributeError):
            fail(f"{path}, line {number:,}: this is no object with a text named {text_field}; "
                 "--text_field=NAME gives another name")
        if text:
            yield re.sub("\r\n?", "\n", text) + MARK


def progress(what, size=None):
    """A bar that counts bytes on a terminal; elsewhere a line that says what begins."""
    if not sys.stderr.isatty():
        print(f"{what} ...", flush=True)
    return tqdm(desc=what, total=size, unit="B", unit_scale=True, disable=None)


# ------------------------------------------------------------------- the split, and its documents

def find_split(file, size, val_fraction):
    """The byte of the spool at which validation begins: the best boundary near the one asked."""
    wanted = min(val_fraction * size, VAL_LIMIT)
    target = round(size - wanted)
    reach = int(min(size, 10 * wanted) / 100)  # so that the share asked for holds within 1 %
    reach = max(reach, len(MARK) + 1)          # in a tiny text, a mark or character is not cut
    low = max(1, target - reach)
    high = min(size - len(MARK) - 1, target + reach)

    start = max(0, low - len(MARK) - 1)
    file.seek(start)
    window = file.read(high + 1 - start)
    for boundary in BOUNDARIES:
        places = [start + match.end() for match in re.finditer(boundary, window)]
        places = [place for place in places if low <= place <= high]
        if places:
            return min(places, key=lambda place: abs(place - target))
    fail(f"{size - len(MARK):,} bytes of text are too little for training and validation")


def documents(file, start, stop):
    """Yield the text between two bytes of the spool as (text, whether a document ends there)."""
    mark = re.escape(MARK.encode()) + rb"(?:\n|(?=[^\n]))"  # a line end after a mark is part of it
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = b""
    file.seek(start)
    while block := file.read(min(BLOCK, stop - file.tell())):
        # the last bytes wait for the next block, since a mark may lie across its beginning
        *ended, rest = re.split(mark, rest + block)
        yield from ((decoder.decode(text), True) for text in ended)
        yield decoder.decode(rest[:-len(MARK)]), False
        rest = rest[-len(MARK):]
    yield decoder.decode(rest.removesuffix(MARK.encode())), rest == MARK.encode()


# -------------------------------------------------------------------------------- the tokenizer

def train_bpe(texts, vocab_size):
    """A BPE like SmolLM2's, but with all 256 bytes, so that no text is lost."""
    bpe = ByteLevelBPETokenizer()
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(words)
    shown = sys.stderr.isatty()
    bpe.train_from_iterator(short(texts), vocab_size, show_progress=shown, special_tokens=[MARK])
    return Tokenizer.from_str(bpe.to_str())


def short(texts):
    """Cut (text, ...) at ends of words. Cut very long words, too: they would take minutes."""
    for text, _ in texts:
        start = 0
        for cut in word_ends(text, range(256, len(text), 256)):
            yield text[start:cut]
            start = cut
        yield text[start:]


def word_ends(text, places):
    """For each place, the end of the first word that ends soon after it, else the place."""
    for place in places:
        word = re.compile(r"\w\b").search(text, place, place + REACH)
        yield word.end() if word else place


def ids_of(tokenizer):
    """(the number of ids, the id that ends a document) of a tokenizer, if we can use it."""
    ids = tokenizer.get_vocab()
    size = 1 + max(ids.values(), default=0)
    ends = [ids[token] for token in END_TOKENS if token in ids]
    require(size <= 65536, f"the tokenizer has {size:,} ids, but uint16 holds 65,536")
    require(ends, f"the tokenizer has no end-of-text token: {' or '.join(END_TOKENS)}")
    return size, ends[0]


# -------------------------------------------------------------------------- documents → tokens

def pieces(documents, tokenizer):
    """
    Cut documents, given as (text, whether one ends there), into (text, known, skip, ends). Each
    text begins with `known` characters of context, which have `skip` tokens. The other tokens are,
    in a row, those of the whole documents.
    """
    text, known, skip = "", 0, 0
    for part, ends in documents:
        text += part
        start = 0
        for cut, tokens in safe_cuts(text, known, tokenizer):
            yield text[start:cut], known, skip, False
            start = max(0, cut - AROUND // 2 - 1)
            known, skip = cut - start, tokens
        text = text[start:]
        if ends and text:
            yield text, known, skip, True
        if ends:
            text, known, skip = "", 0, 0
    if text:
        yield text, known, skip, False


def safe_cuts(text, known, tokenizer):
    """
    Where a text can be cut without changing its tokens, as [(cut, tokens of the context before)].
    The tokens before a cut must not depend on how much follows, nor those after it on how much
    comes before. Two lengths without a common factor are tried, or a repeated string would pass.
    """
    cuts = list(word_ends(text, range(known + PIECE, len(text) - AROUND - REACH, PIECE)))
    lengths = (AROUND, AROUND // 2 + 1)
    tests = []
    for cut in cuts:
        for before in lengths:
            start = max(0, cut - before)
            tests += [text[start:cut + after] for after in (0, *lengths)]
    codes = tokenizer.encode_batch_fast(tests, add_special_tokens=False)
    tokens = [code.ids for code in codes]

    safe = []
    for number, cut in enumerate(cuts):
        far, far_long, far_short, near, near_long, near_short = tokens[6 * number:6 * number + 6]
        left_stays = (far == far_long[:len(far)] == far_short[:len(far)]
                      and near == near_long[:len(near)] == near_short[:len(near)])
        if left_stays and far_long[len(far):] == near_long[len(near):]:
            safe.append((cut, len(near)))
    return safe


def write_tokens(path, documents, tokenizer, bar):
    """
    Write the tokens of documents, each framed as the tokenizer frames it and ended by its end of
    text. Returns (tokens, bytes of text, bytes that no token stands for, white space aside).
    """
    prefix = prefix_ids(tokenizer)
    eot = ids_of(tokenizer)[1]
    kept = byte_counter(tokenizer)
    size = lost = 0
    begins = True
    cut = pieces(documents, tokenizer)
    with open(path, "wb") as file:
        file.write(np.array([eot], "<u2").tobytes())  # the first document follows one, too
        while batch := list(itertools.islice(cut, BATCH)):
            texts = [text for text, *_ in batch]
            codes = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (text, known, skip, ends), code in zip(batch, codes):
                ids = code.ids[skip:]
                data = text[known:].encode()
                size += len(data)
                lost += visible(data) - kept(ids)
                bar.update(len(data))

                if begins:
                    ids = prefix + ids
                if ends:
                    ids = ids + [eot]
                file.write(np.array(ids, "<u2").tobytes())
                begins = ends
        return file.tell() // 2, size, max(0, lost)


def byte_counter(tokenizer):
    """A function: how many bytes, white space aside, a list of ids stands for."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return lambda ids: visible(tokenizer.decode(ids).encode())
    # here a token is written with one letter for each byte, and these letters are white space
    tokens = [tokenizer.id_to_token(number) or "" for number in range(ids_of(tokenizer)[0])]
    sizes = np.array([len(re.sub("[ĠĉĊċČč]", "", token)) for token in tokens])
    return lambda ids: int(sizes[ids].sum())


def visible(data):
    """The number of bytes that are no white space."""
    return len(data.translate(None, b" \t\n\v\f\r"))


# ------------------------------------------------------------------------------ tokens → folder

def prepare(input=input, tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=val_fraction,
            data_dir=data_dir, text_field=text_field):
    """Make the folder data_dir of a text, whole or not at all, and print what is in it."""
    folder = Path(data_dir).resolve()
    check_folder(folder)
    near = next(path for path in folder.parents if path.exists())
    with explained(f"cannot make {data_dir}", OSError), \
            tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=near) as work, \
            tempfile.TemporaryFile(dir=work) as file:
        coder = None
        if tokenizer != "bpe":
            coder = load_tokenizer(tokenizer)
            ids_of(coder)  # fails now, and not after an hour

        starts = spool(find_files(input, folder, work), text_field, file)
        size = file.tell()
        split = find_split(file, size, val_fraction)
        if coder is None:
            print(f"making a BPE of {vocab_size:,} tokens ...", flush=True)
            every = 1 + split // BPE_TEXT
            texts = itertools.islice(documents(file, 0, split), 0, None, every)
            coder = train_bpe(texts, vocab_size)

        new = Path(work, "new")
        new.mkdir()
        ranges = {"train": (0, split), "val": (split, size)}
        meta, lost = write_folder(new, file, ranges, coder)
        put_in_place(new, folder, work)
    report(meta, lost, starts, split, data_dir)


def write_folder(folder, file, ranges, tokenizer):
    """Write the four files. Returns what is in meta.json, and how many bytes have no token."""
    vocabulary, eot = ids_of(tokenizer)
    meta = {"vocab_size": vocabulary, "eos_token_id": eot}
    all_lost = 0
    with progress("tokenizing", ranges["val"][1]) as bar:
        for split, (start, stop) in ranges.items():
            texts = documents(file, start, stop)
            tokens, size, lost = write_tokens(folder / f"{split}.bin", texts, tokenizer, bar)
            require(tokens > 1, f"the {split} part of the text, {size:,} bytes, has no token")
            meta[f"{split}_tokens"] = tokens
            meta[f"{split}_bytes"] = size
            all_lost += lost
    meta["tokenizer_sha256"] = fingerprint(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
    return meta, all_lost


def check_folder(folder):
    """Refuse a data_dir with other files in it: the whole folder will be replaced."""
    require(folder.is_dir() or not folder.exists(), f"--data_dir={folder} is not a folder")
    names = os.listdir(folder) if folder.exists() else []
    other = sorted(set(names) - {"train.bin", "val.bin", "tokenizer.json", "meta.json"})
    require(not other, f"--data_dir={folder} holds {', '.join(other[:3])}, not of prepare.py: "
            "choose another folder, as this one is replaced")


def put_in_place(new, folder, work):
    """Replace a folder by a finished one. Of several at once the last wins, whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    while new.exists():
        check_folder(folder)
        old = Path(tempfile.mkdtemp(dir=work), "old")
        try:
            with contextlib.suppress(FileNotFoundError):
                folder.rename(old)
            new.rename(folder)
        except OSError:
            # another preparation may just have put its own there: once more
            if not folder.exists():
                raise
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)


def report(meta, lost, starts, split, data_dir):
    """Say what was made, and what to run next."""
    first = bisect.bisect([start for start, _ in starts], split)
    more = len(starts) - first
    place = starts[first - 1][1] + (f" and {more:,} files after it" if more else "")
    share = meta["val_bytes"] / (meta["train_bytes"] + meta["val_bytes"])
    for name in SPLITS:
        print(f"{name}: {meta[f'{name}_bytes']:,} bytes, {meta[f'{name}_tokens']:,} tokens")
    print(f"validation is the last {share:.1%} of the text: the end of {place}")
    if lost:
        print(f"{lost:,} bytes of the text are lost: the tokenizer has no tokens for them")
    flag = "" if data_dir == "data" else f" --data_dir={data_dir}"
    print(f"{data_dir} is ready, next: python train.py{flag}")


# ------------------------------------------------------------------ reading: folder → batches

class Data:
    """
    A folder of prepare.py, opened once: a run keeps these files, whatever happens to the folder.
    `meta` is meta.json, `tokenizer` a tokenizers.Tokenizer, `eot` the id that ends a text.
    """

    def __init__(self, folder):
        again = f"run python prepare.py --data_dir={folder} on your text again"
        with explained(f"cannot read {folder}, {again}", OSError, ValueError):
            self.meta = json.loads(Path(folder, "meta.json").read_text("utf-8"))
            self.files = {split: open(Path(folder, f"{split}.bin"), "rb") for split in SPLITS}
        self.tokenizer = load_tokenizer(Path(folder, "tokenizer.json"))

        found = {"tokenizer_sha256": fingerprint(self.tokenizer)}
        for split, file in self.files.items():
            found[f"{split}_tokens"] = os.fstat(file.fileno()).st_size // 2
        for name, value in found.items():
            require(self.meta.get(name) == value,
                    f"{folder}/meta.json is of other files than those beside it: {again}")
        self.folder = folder
        self.eot = self.meta["eos_token_id"]
        self.start = prefix_ids(self.tokenizer) or [self.eot]  # what an empty prompt stands for

    def windows(self, split, starts, length):
        """
        The `length` tokens from each of `starts` on, and the tokens that follow them, as
        (inputs, targets): int64, both (len(starts), length). Past the end targets are -1.
        """
        # mapped anew each time: a map that stays keeps all it ever read in memory
        ids = np.memmap(self.files[split], "<u2", "r")
        places = np.add.outer(starts, np.arange(length + 1))
        tokens = np.where(places < len(ids), ids.take(places, mode="clip").astype(np.int64), -1)
        require(tokens.max() < self.meta["vocab_size"],
                f"{self.folder}/{split}.bin holds the id {tokens.max()}, but the vocabulary has "
                f"{self.meta['vocab_size']}: run python prepare.py on your text again")
        return tokens[:, :-1].clip(min=0), tokens[:, 1:]

    def training_batch(self, first, count, length, seed):
        """
        Sequences number `first` to `first + count - 1` of a run, as (inputs, targets). An epoch has
        each window of `length` tokens once, in an order of its own, from an offset of its own.
        """
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


# ------------------------------------------------- options and errors, for all three scripts

def configure(config, argv, presets=lambda flags: {}):
    """
    Set the settings of a script, given as its globals(), from its command line: --key=value,
    --key value, --switch alone, or a file of `key = value` lines. What presets(flags) returns is
    laid over the block first. Returns {name: value} of what the command line gave.
    """
    settings = settings_of(config)
    flags = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            show_help(config)
            sys.exit()
        if word.endswith(".py") and not word.startswith("--"):
            flags |= read_config_file(word, settings)
            continue

        require(word.startswith("--"), f"{word}: a flag looks like --key=value; --help lists them")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = following_value(name, words, settings)
        flags[name] = parse(name, text, settings)

    config.update(presets(flags) | flags)
    return flags


def settings_of(config):
    """The settings among a script's globals, those with a lowercase name and a plain value."""
    return {name: value for name, value in config.items()
            if name.islower() and name[0] != "_" and isinstance(value, (bool, int, float, str))}


def following_value(name, words, settings):
    """The value of a flag without "=": the next word, taken from `words`, or true for a switch."""
    has_value = bool(words) and not words[0].startswith("--")
    if isinstance(settings.get(name), bool):
        return words.pop(0) if has_value and words[0].lower() in BOOLEANS else "true"
    if has_value:
        return words.pop(0)
    return ""


def read_config_file(path, settings):
    """{name: value} of the lines `name = value` in a file like nanoGPT's configs. Runs nothing."""
    flags = {}
    with explained(f"cannot read {path}", OSError, SyntaxError, ValueError):
        for line in ast.parse(Path(path).read_text("utf-8")).body:
            if isinstance(line, ast.Assign):
                name = ast.unparse(line.targets[0])
                flags[name] = parse(name, str(ast.literal_eval(line.value)), settings)
            elif not isinstance(line, ast.Expr):
                raise ValueError(f"line {line.lineno} is not of the form name = value")
    return flags


def parse(name, text, settings):
    """The value that a text gives a setting: of the type that the setting has in the block."""
    if name not in settings:
        near = difflib.get_close_matches(name, settings, n=1)
        hint = f": did you mean --{near[0]}?" if near else ", see --help"
        fail(f"unknown flag --{name}{hint}")
    default = settings[name]
    try:
        value = BOOLEANS[text.lower()] if isinstance(default, bool) else type(default)(text)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        fail(f"--{name}={text}: {name} is {kind}, as in --{name}={default}")
    if not isinstance(value, str):
        # only what is -1 in the block, a value to be worked out, may be given as -1
        least = min(0, default)
        require(least <= value < float("inf"), f"--{name}={text} must be {least} or more")
    return value


def show_help(config):
    """Print a script's docstring and its block of settings."""
    source = Path(config["__file__"]).read_text("utf-8")
    block = re.search(r"(?ms)^# -+ settings\n(.*?)^# -+ ", source)[1]
    print((config["__doc__"] or "").strip(), block.strip(), sep="\n\n")


def load_tokenizer(name):
    """
    The tokenizers.Tokenizer of a tokenizer.json, of a folder that holds one, or of a hub id,
    without the truncation and padding that may be saved with it.
    """
    path = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else str(name)
    # the tokenizers library raises plain Exception, so nothing finer can be named
    with explained(f"cannot load the tokenizer {name}", Exception):
        if os.path.exists(path):
            tokenizer = Tokenizer.from_file(path)
        else:
            tokenizer = Tokenizer.from_pretrained(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def fingerprint(tokenizer):
    """sha256 of what a tokenizer does, however its file is laid out."""
    return hashlib.sha256(json.dumps(json.loads(tokenizer.to_str())).encode()).hexdigest()


def prefix_ids(tokenizer):
    """The ids that the tokenizer's own rules put in front of a text: a BOS, or often nothing."""
    encoding = tokenizer.encode("a")
    marks = encoding.special_tokens_mask
    return encoding.ids[:marks.index(0)] if 0 in marks else []


def process_rank():
    """(rank, number of processes), as torchrun gives them. One stray variable means nothing."""
    values = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not all(value.isdigit() for value in values) or "MASTER_ADDR" not in os.environ:
        return 0, 1
    rank, world = map(int, values)
    return (rank, world) if world > 1 else (0, 1)


def fail(message):
    """End the program: the message as one line on stderr, exit status 1."""
    rank, world = process_rank()
    where = f" on rank {rank}" if world > 1 else ""
    sys.exit(f"error{where}: " + " ".join(str(message).split()))


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
    """The values in a JSON file of ours; what cannot be read ends the program with one line."""
    with explained(f"cannot read {path}", OSError, ValueError):
        return json.loads(Path(path).read_text("utf-8"))


def printable(text):
    """The text with control characters shown as escapes, since a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def say(line):
    """Print a line above any progress bar, on the first process only."""
    if process_rank()[0] == 0:
        tqdm.write(line)


@contextlib.contextmanager
def tolerated(what, *kinds):
    """Go on without what a run can do without: an exception becomes a warning, once."""
    try:
        yield
    except kinds as error:
        if what not in WARNED:
            say(f"warning: {what} fails, the run goes on "
                f"({type(error).__name__}: {str(error)[:200]})")
        WARNED.add(what)


WARNED = set()


def lock(folder):
    """Keep other runs out of a folder while this one lasts, where the file system can."""
    with explained(f"cannot write to {folder}: choose another", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "log.csv").open("a").close()
    try:
        import fcntl
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run uses {folder}: wait for its end, or choose another --out_dir")
    except (ImportError, OSError) as error:
        say(f"warning: {folder} cannot be locked ({error}): start no second run in it")


class SteadyStream:
    """A standard stream that ends no run: what cannot be shown is replaced or dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # there is none after 2>&-
        self.stream.reconfigure(errors="replace")
        self.broken = False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError:
            self.broken = True

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.broken = True


def steady_output():
    """Let neither a closed pipe nor an unprintable character end this program."""
    sys.stdout = SteadyStream(sys.stdout)
    sys.stderr = SteadyStream(sys.stderr)


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    steady_output()
    flags = configure(globals(), sys.argv[1:])
    check_settings()
    require(tokenizer == "bpe" or "vocab_size" not in flags,
            f"--vocab_size is for --tokenizer=bpe: {tokenizer} has a vocabulary of its own")
    try:
        prepare(input, tokenizer, vocab_size, val_fraction, data_dir, text_field)
    except KeyboardInterrupt:
        fail(f"stopped, nothing was changed in {data_dir}")


if __name__ == "__main__":
    main()
