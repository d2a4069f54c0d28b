"""A checkpoint of torchtitan's as a Hugging Face folder that loads as a plain Llama.

The job config that a run leaves in its dump folder says which model its checkpoints hold.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from .command_line import make_folder, size
from .model import LighthouseModelArgs, get_train_spec
from .model.checkpoints import HF_INDEX, METADATA, complete_metadata, complete_steps, is_saved
from .model.hf_config import llama_config
from .records import CONFIG_FILE, read_config
from .runner import import_extension

TOKENIZER_CONFIG = "tokenizer_config.json"
# What of it changes no encoding, beside the tokens that it names.
NAMES_AND_TEMPLATES = (
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template"),
    *("clean_up_tokenization_spaces", "model_max_length", "padding_side", "truncation_side"),
)
TEXTS = (
    "In 2023 it was -3.5 %, wasn't it?",
    "  def f(x):\n\n\treturn {x: [x < 1]}  \r\n",
    "\u00c5ngstr\u00f6m e\u0301 \u00df \u00a0 \u6f22\u5b57 \u0627\u0644 \U0001f600\u200d",
)
JOB_FIELDS = (
    ("model", "flavor"),
    ("model", "hf_assets_path"),
    ("training", "seq_len"),
    ("checkpoint", "folder"),
    ("lighthouse", "enable"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint and what its run's job config says of it.

    path: the step-N folder. model_args: of the model under dense attention, max_seq_len that of the
    training. tokenizer_path: the training's tokenizer. lighthouse: whether that run had Lighthouse on.
    """

    path: Path
    model_args: LighthouseModelArgs
    tokenizer_path: Path
    lighthouse: bool

    @property
    def _in_hugging_face(self) -> bool:
        return not (self.path / METADATA).is_file()

    @property
    def _adapter(self) -> BaseStateDictAdapter:
        return get_train_spec().state_dict_adapter(self.model_args, None)

    @property
    def _reader(self) -> FileSystemReader:
        if self._in_hugging_face:
            return self._adapter.get_hf_storage_reader(str(self.path))
        return FileSystemReader(self.path)

    def as_saved(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors in the checkpoint's names and shapes."""
        return self._adapter.to_hf(state) if self._in_hugging_face else state

    def metadata(self) -> Metadata:
        """Raises ValueError where the checkpoint isn't complete."""
        if not self._in_hugging_face:
            return complete_metadata(self.path)
        try:
            return self._reader.read_metadata()
        except Exception as error:  # of safetensors
            raise ValueError(
                f"{self.path} is not a complete checkpoint ({error}); restore it, or use another"
            ) from error

    def n_bytes(self, dtype: torch.dtype) -> int:
        """Of all weights in `dtype`."""
        return sum(t.numel() for t in _meta_state(self.model_args).values()) * dtype.itemsize

    def load_state(
        self,
        dtype: torch.dtype = torch.float32,
        advance: Callable[[int], None] = lambda n_bytes: None,
    ) -> dict[str, torch.Tensor]:
        """The model's state dict, on the CPU; of the rest of the checkpoint nothing is read. `advance` hears of each
        part's bytes."""
        state = {
            key: torch.empty_like(tensor, dtype=dtype, device="cpu")
            for key, tensor in _meta_state(self.model_args).items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # one process is what we want
            for _, keys in groupby(state, lambda key: key.split(".")[:2]):  # a block at a time
                part = self.as_saved({key: state[key] for key in keys})
                dcp.load(part, storage_reader=self._reader, no_dist=True)
                state |= self._adapter.from_hf(part) if self._in_hugging_face else part
                advance(sum(tensor.nbytes for tensor in part.values()))
        return state


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a step-N folder, or a run's dump folder for its newest complete step.

    Raises ValueError, with the remedy, where there is none that is complete, or where the run's job
    config or tokenizer is missing or doesn't fit the checkpoint.
    """
    step_folder = Path(path).resolve()
    if (step_folder / CONFIG_FILE).is_file():
        dump_folder = step_folder
        job = _read_job(dump_folder)
        folder = dump_folder / job["checkpoint"]["folder"]
        steps = [*complete_steps(folder), *complete_steps(folder, HF_INDEX)]
        if not steps:
            raise ValueError(
                f"{folder} holds no complete checkpoint: train with checkpoint.enable = true until the "
                "first is saved (checkpoint.interval)"
            )
        step_folder = folder / f"step-{max(steps)}"
    elif not is_saved(step_folder):
        raise ValueError(
            f"{step_folder} is not a complete checkpoint or a run's folder: it has no .metadata and no {CONFIG_FILE}; "
            "give the step-N folder of a checkpoint that was saved to its end, or its run's folder"
        )
    else:
        dump_folder = step_folder.parents[1]
        job = _read_job(dump_folder)

    flavor, flavors = job["model"]["flavor"], get_train_spec().model_args
    if flavor not in flavors:
        raise ValueError(
            f"model.flavor = {flavor!r} in {dump_folder / CONFIG_FILE} is unknown: export with the "
            f"version of this package that trained it; this one has {', '.join(flavors)}"
        )
    model_args = replace(flavors[flavor], max_seq_len=job["training"]["seq_len"])
    checkpoint = Checkpoint(
        step_folder, model_args, Path(job["model"]["hf_assets_path"]), job["lighthouse"]["enable"]
    )
    expected = checkpoint.as_saved(_meta_state(model_args))
    saved = checkpoint.metadata().state_dict_metadata
    unfit = [
        key
        for key, tensor in expected.items()
        if getattr(saved.get(key), "size", None) != tensor.shape
    ]
    if unfit:
        raise ValueError(
            f"{step_folder} holds no model of flavor {flavor!r}, {len(unfit)} of its tensors ({unfit[0]}, ...) are "
            f"missing or of another shape: correct model.flavor in {dump_folder / CONFIG_FILE}"
        )

    tokenizer_path = checkpoint.tokenizer_path
    try:
        HuggingFaceTokenizer(str(tokenizer_path))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(
            f"model.hf_assets_path = {str(tokenizer_path)!r} in {dump_folder / CONFIG_FILE}: no tokenizer "
            f"there ({error}); call from the folder that the training was launched from, or correct the path"
        ) from error
    return checkpoint


def export(
    checkpoint: Checkpoint,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write config.json, model.safetensors (weights in `dtype`) and the tokenizer's files to `folder`.

    advance: hears of the bytes read and written, `n_bytes` of the checkpoint each.

    Raises ValueError where `folder` exists and isn't an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name another folder, or delete it")
    with TemporaryDirectory() as small_files:
        _save_small_files(checkpoint, dtype, Path(small_files))
        make_folder(folder)
        total, free = checkpoint.n_bytes(dtype), shutil.disk_usage(folder).free
        if total > free:
            raise ValueError(
                f"{folder}: {size(free)} are free there, and the model has {size(total)} in {dtype}: make room, or "
                "name another folder"
            )
        _save_weights(checkpoint, dtype, folder / "model.safetensors", total, advance)
        # The config last, so that a folder that lacks something doesn't load.
        for file in sorted(Path(small_files).iterdir(), key=lambda file: file.name == CONFIG_FILE):
            shutil.copy(file, folder)


def _save_small_files(checkpoint: Checkpoint, dtype: torch.dtype, folder: Path) -> None:
    source = checkpoint.tokenizer_path
    tokenizer = HuggingFaceTokenizer(str(source))
    expected = [tokenizer.encode(text, add_bos=True, add_eos=False) for text in TEXTS]
    _save_tokenizer(tokenizer, source, folder)
    # A tokenizer with one token for both has it between documents.
    end = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    config = llama_config(checkpoint.model_args) | {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": end,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    try:
        from transformers import AutoTokenizer, logging
    except ImportError:
        return  # not needed to export
    logging.set_verbosity_error()  # it warns of a RoPE that a short training doesn't reach the end of
    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text, ids in zip(TEXTS, expected, strict=True):
        if (theirs := exported(text).input_ids) != ids:
            raise ValueError(
                f"model.hf_assets_path = {str(source)!r}: transformers would encode {text!r} as {theirs}, and training "
                f"encoded it as {ids}, so nothing is exported; look at the tokens that {source / TOKENIZER_CONFIG} "
                "names and tokenizer.json lacks, or has with other properties"
            )


def _save_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    file: Path,
    total: int,
    advance: Callable[[int], None],
) -> None:
    adapter = get_train_spec().state_dict_adapter(checkpoint.model_args, None)
    state, written = adapter.to_hf(checkpoint.load_state(dtype, advance)), 0
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(save_file, state, file, metadata={"format": "pt"})
        while wait([writing], timeout=1).not_done:
            now = min(file.stat().st_size, total) if file.exists() else 0
            advance(now - written)
            written = now
        writing.result()
    advance(total - written)


def _read_job(dump_folder: Path) -> dict:
    file = dump_folder / CONFIG_FILE
    try:
        job = read_config(file, JOB_FIELDS)
    except FileNotFoundError as error:
        raise ValueError(
            f"{file} is missing, which says what model the checkpoint holds: keep the checkpoint in its "
            f"run's folder, or copy the run's {CONFIG_FILE} there"
        ) from error
    import_extension(job.get("experimental", {}).get("custom_import", "torchtitan_ext.model"), file)
    return job


def _meta_state(args: LighthouseModelArgs) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return get_train_spec().model_cls(args).state_dict()


def _save_tokenizer(tokenizer: HuggingFaceTokenizer, source: Path, folder: Path) -> None:
    """The training's tokenizer, which begins a text with bos as the training's documents do.

    The class that the source names may build another from the vocabulary: the one saved reads tokenizer.json as it is.
    """
    if tokenizer.bos_id is not None and not tokenizer.hf_adds_bos:
        tokenizer.tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A",
            special_tokens=[(tokenizer.bos_token, tokenizer.bos_id)],
        )
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, value in (tokenizer.config or {}).items():
        if re.fullmatch(r"(?!add_)\w+_token", name):
            token = isinstance(value, dict)  # which transformers knows by its type
            config[name] = value | {"__type": "AddedToken"} if token else value
        elif name in NAMES_AND_TEMPLATES:
            config[name] = value
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if (template := source / "chat_template.jinja").is_file():
        shutil.copy(template, folder)
