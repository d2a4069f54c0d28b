"""Write data sets to a disk and read them with a loader."""

import gzip
import json
from copy import deepcopy
from itertools import islice
from pathlib import Path

import pyarrow as pa
from backports import zstd
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import ConfigManager

from torchtitan_ext.data import tokenizer
from torchtitan_ext.data.dataloader import build_dataloader
from torchtitan_ext.data.datasets import check_data

TOKENIZER = HuggingFaceTokenizer(str(Path(tokenizer.__file__).parent / "byte_tokenizer"))
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
JOB = ConfigManager().parse_args(["--job.custom_config_module=torchtitan_ext.model.settings"])
END = "<|endoftext|>"
LAYOUTS = {  # what users' tokenizer_config.json say
    "one token": {"bos_token": END, "eos_token": END, "unk_token": END, "add_bos_token": False},
    "end": {"eos_token": END, "pad_token": {"content": "<pad>", "lstrip": True}},
    "two tokens": {"bos_token": "<s>", "eos_token": "</s>"},
    "two tokens, of which it adds one": {"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True},
}
MERGES = (("i", "t"), ("Ġ", "it"), ("2", "0"), ("<", "/"), ("|", ">"), ("e", "n"))


def write_bpe(folder: Path, config: dict, merges=MERGES) -> Tokenizer:
    """A user's tokenizer in `folder`; returns the same without special tokens."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    plain = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [*merges]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    whole = deepcopy(plain)
    whole.add_special_tokens([END, "<s>", "</s>", "<pad>"])
    ids = [(token, whole.token_to_id(token)) for token in ("<s>", "</s>")]
    for setting, template in (("add_bos_token", "<s> $A"), ("add_eos_token", "$A </s>")):
        if config.get(setting):
            whole.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    folder.mkdir(exist_ok=True)
    whole.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return plain


def write_text(file: Path, text: str = "") -> Path:
    """The file, written in folders that are made for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def write_c4(root: Path, shards: list[list[str]]) -> Path:
    for i, texts in enumerate(shards):
        write_lines(root / f"en/c4-train.{i:05d}-of-{len(shards):05d}.json.gz", texts)
    return root


def write_tree(root: Path, shards: list[list[str]]) -> Path:
    for i, texts in enumerate(shards):
        for j, text in enumerate(texts):
            write_text(root / f"package_{i}/module_{j}.py").write_bytes(text.encode())
    return root


def write_parquet(file: Path, texts: list[str], **settings):
    table = pa.table({"number": range(len(texts)), "text": pa.array(texts, pa.string())})
    parquet.write_table(table, file, row_group_size=2, **settings)


def write_lines(file: Path, texts: list[str]):
    lines = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts).encode()
    pack = {".gz": gzip.compress, ".zst": zstd.compress}.get(file.suffix, bytes)
    write_text(file).write_bytes(pack(lines))


def write_files(root: Path, shards: list[list[str]]) -> Path:
    """A folder of files of every format with many documents per file."""
    root.mkdir()
    for i, texts in enumerate(shards):
        suffix = ("parquet", "jsonl.zst", "jsonl.gz", "json")[i % 4]
        (write_parquet if suffix == "parquet" else write_lines)(root / f"{i:05}.{suffix}", texts)
    return root


def write_sources(root: Path, shards: list[list[str]]) -> Path:
    """What `loader` mixes: the same documents as three data sets."""
    for dataset, write in WRITE.items():
        write(root / dataset, shards)
    return root


WRITE = {"c4_local": write_c4, "python_source": write_tree, "text": write_files}


def check_dataset(dataset, path):
    config = deepcopy(JOB)
    config.validation.dataset, config.validation.dataset_path = dataset, path
    check_data(config, "validation")


def loader(dataset, path, seq_len, batch_size=1, rank=0, world=1, workers=0, infinite=True, skip=False, **more):
    config = deepcopy(JOB)
    config.training.dataset, config.training.dataset_path = dataset, str(path)
    if dataset == "mixture":
        entries = [{"dataset": name, "path": f"{path}/{name}", "weight": i + 1} for i, name in enumerate(WRITE)]
        config.training.mixture = entries
    config.training.seq_len, config.training.local_batch_size = seq_len, batch_size
    config.training.global_batch_size = more.get("global_batch_size", 5 * batch_size * world)
    config.training.dataloader.num_workers = workers
    config.training.dataloader.prefetch_factor = more.get("prefetch_factor")
    config.training.skip_damaged_data = skip
    return build_dataloader(world, rank, more.get("tokenizer", TOKENIZER), config, infinite=infinite)


def tokens(batch):
    """The tokens that made the batch: an input and its label overlap in all but one."""
    inputs, labels = batch[0]["input"], batch[1]
    assert (inputs[:, 1:] == labels[:, :-1]).all()
    return [[*row, last] for row, last in zip(inputs.tolist(), labels[:, -1].tolist(), strict=True)]


def stream(batches):
    return [token for batch in batches for row in tokens(batch) for token in row]


def stopped(make, *stops):
    """What loaders that `make` gives draw, as many batches of each, of which each resumes the state of the one before;
    and the last of them."""
    drawn, state = [], {}
    for stop in stops:
        part = make()
        part.state_dict()  # the checkpointer asks for its keys before it loads
        part.load_state_dict(state)
        drawn += stream(islice(part, stop))
        state = part.state_dict()
    return drawn, part


def documents(dataset, path, rank=0, world=1):
    """What one rank reads in an epoch, as the documents' bytes in their order."""
    left, texts = iter(stream(loader(dataset, path, 1, rank=rank, world=world, infinite=False))), []
    for token in left:
        assert token == BOS
        texts.append(bytes(iter(left.__next__, EOS)))  # up to EOS, which may be the odd token left over
    return texts
