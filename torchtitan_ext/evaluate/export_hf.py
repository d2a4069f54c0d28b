"""Export a checkpoint as a Hugging Face folder that loads as a plain Llama.

The job config in a run's dump folder names the model of its checkpoints.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

from torchtitan_ext.console import make_folder
from torchtitan_ext.data.tokenizer import load_tokenizer
from torchtitan_ext.jobs import resume
from torchtitan_ext.jobs.job_file import import_extension
from torchtitan_ext.jobs.recorded import CONFIG_FILE, read_config
from torchtitan_ext.model import LighthouseModelArgs, flavors
from torchtitan_ext.model.hf_config import llama_config
from torchtitan_ext.model.model import meta_model

TOKENIZER_CONFIG = "tokenizer_config.json"
# its fields that don't change the encoding, besides named tokens
NAMES_AND_TEMPLATES = {"added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "chat_template"}
NAMES_AND_TEMPLATES |= {"clean_up_tokenization_spaces", "model_max_length", "padding_side", "truncation_side"}
TEXTS = (
    "In 2023 it was -3.5 %, wasn't it?",
    "  def f(x):\n\n\treturn {x: [x < 1]}  \r\n",
    "\u00c5ngstr\u00f6m e\u0301 \u00df \u00a0 \u6f22\u5b57 \u0627\u0644 \U0001f600\u200d",
)
JOB_FIELDS = ("model.flavor", "model.hf_assets_path", "training.seq_len", "checkpoint.folder", "lighthouse.enable")
Advance = Callable[[int], None]  # gets the amount done since the last call


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its run's job config describes it."""

    path: Path  # the step-N folder
    model_args: LighthouseModelArgs  # dense, with the training's max_seq_len
    tokenizer: HuggingFaceTokenizer
    lighthouse: bool  # whether the run trained with it

    def n_bytes(self, dtype: torch.dtype) -> int:
        return sum(t.numel() for t in meta_model(self.model_args).parameters()) * dtype.itemsize

    def load_state(self, dtype: torch.dtype, advance: Advance = lambda n_bytes: None) -> dict[str, torch.Tensor]:
        """The model's state dict on the CPU; `advance` gets the bytes of each part. ValueError if it can't be read."""
        weights = meta_model(self.model_args).state_dict()
        state = {key: torch.empty_like(weight, dtype=dtype, device="cpu") for key, weight in weights.items()}
        reader, metadata = dcp.FileSystemReader(self.path), resume.complete_metadata(self.path)
        reader.read_metadata = lambda: metadata  # type: ignore[method-assign, misc]  # once, not per part
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # one process is intended
            for _, keys in groupby(state, lambda key: key.split(".")[:2]):  # a block at a time
                part = {key: state[key] for key in keys}
                try:
                    dcp.load(part, storage_reader=reader, no_dist=True)  # into the same tensors
                except CheckpointException as error:  # a run may delete it meanwhile
                    reason = f"{self.path} could not be read: {error.failures[0][0]}"
                    raise ValueError(f"{reason}; restore it, or give another step-N folder") from error
                advance(sum(tensor.nbytes for tensor in part.values()))
        return state


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a step-N folder, or a run's dump folder for its newest complete step.

    Raises ValueError if none is complete, or the run's job config or tokenizer doesn't fit the checkpoint;
    FileNotFoundError if there is no job config.
    """
    path = path.absolute()  # follows no links: a run's folder of checkpoints may be one
    is_run = (path / CONFIG_FILE).is_file()
    if not is_run and not (path / resume.METADATA).is_file():
        missing = f"it has no .metadata and no {CONFIG_FILE}; give a complete step-N folder, or its run's folder"
        raise ValueError(f"{path} is not a complete checkpoint or a run's folder: {missing}")
    config_file = (path if is_run else path.parents[1]) / CONFIG_FILE
    job = read_config(config_file, *JOB_FIELDS)
    if module := job.get("experimental", {}).get("custom_import"):
        import_extension(module, config_file)
    if is_run:
        folder = path / job["checkpoint"]["folder"]
        if not (steps := resume.complete_steps(folder)):
            remedy = "train with checkpoint.enable = true until the first is saved (checkpoint.interval)"
            raise ValueError(f"{folder} holds no complete checkpoint: {remedy}")
        path = folder / f"step-{steps[-1]}"
    flavor, assets = job["model"]["flavor"], job["model"]["hf_assets_path"]
    if flavor not in flavors:
        remedy = f"export with the version that trained it; this one has {', '.join(flavors)}"
        raise ValueError(f"model.flavor = {flavor!r} in {config_file} is unknown: {remedy}")
    model_args = replace(flavors[flavor], max_seq_len=job["training"]["seq_len"])  # type: ignore[call-arg]
    model_args.set_rope(**job.get("rope", {}))
    remedy = "call from the folder that the training was launched from, or correct the path"
    tokenizer = load_tokenizer(assets, f"model.hf_assets_path = {assets!r} in {config_file}", remedy)
    if mismatch := resume.shape_mismatch(meta_model(model_args).state_dict(), resume.complete_metadata(path)):
        reason = f"{path} holds no model of flavor {flavor!r} ({mismatch})"
        raise ValueError(f"{reason}; correct model.flavor in {config_file}")
    return Checkpoint(path, model_args, tokenizer, job["lighthouse"]["enable"])


def export(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32, advance: Advance = lambda n_bytes: None
) -> None:
    """Write config.json, model.safetensors (weights in `dtype`) and the tokenizer's files to `folder`. `advance` gets
    the bytes read and written, twice the `n_bytes` in all. Raises ValueError if `folder` isn't empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name another folder, or delete it")
    with TemporaryDirectory() as small_files:
        try:
            _save_small_files(checkpoint, dtype, Path(small_files))
        except OSError as error:
            raise OSError(f"{small_files} could not be saved: {error}; make room there, or set TMPDIR") from error
        make_folder(folder)
        state = Llama3StateDictAdapter(checkpoint.model_args, None).to_hf(checkpoint.load_state(dtype, advance))
        weights = folder / "model.safetensors"
        try:
            save_file(state, weights, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, for example
            raise OSError(f"{weights} could not be saved: {error}; make room there, or name another folder") from error
        shutil.copymode(Path(small_files, CONFIG_FILE), weights)  # safetensors 0.8 lets only the owner read
        advance(checkpoint.n_bytes(dtype))
        # The config last, so that an incomplete folder doesn't load.
        for file in sorted(Path(small_files).iterdir(), key=lambda file: file.name == CONFIG_FILE):
            shutil.copy(file, folder)


def _save_small_files(checkpoint: Checkpoint, dtype: torch.dtype, folder: Path) -> None:
    tokenizer, source = checkpoint.tokenizer, Path(checkpoint.tokenizer.tokenizer_path)
    _save_tokenizer(tokenizer, source, folder)
    # Some tokenizers have one token for both.
    end = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    config = llama_config(checkpoint.model_args) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": end}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    try:
        from transformers import AutoTokenizer, logging
    except ImportError:
        return  # not needed to export
    logging.set_verbosity_error()  # it warns when training is shorter than RoPE's range
    exported = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS:
        theirs, ids = exported(text).input_ids, tokenizer.encode(text, add_bos=True, add_eos=False)
        if theirs != ids:
            reason = f"transformers would encode {text!r} as {theirs}, and training encoded it as {ids}"
            remedy = f"compare the tokens that {TOKENIZER_CONFIG} names with those of tokenizer.json"
            raise ValueError(f"model.hf_assets_path = {str(source)!r}: {reason}; {remedy}")


def _save_tokenizer(tokenizer: HuggingFaceTokenizer, source: Path, folder: Path) -> None:
    """Save the training's tokenizer, which adds bos as training does."""
    saved = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    if tokenizer.bos_id is not None and not tokenizer.hf_adds_bos:
        ends = [tokenizer.eos_token] * tokenizer.hf_adds_eos
        ids = [(token, tokenizer.token_to_id(token)) for token in (tokenizer.bos_token, *ends)]
        saved.post_processor = TemplateProcessing(single=[tokenizer.bos_token, "$A", *ends], special_tokens=ids)
    (folder / "tokenizer.json").write_bytes(saved.to_str(pretty=True).encode())  # raises OSError, unlike save
    # This class reads tokenizer.json unchanged; the source's may not.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, value in (tokenizer.config or {}).items():
        if re.fullmatch(r"(?!add_)\w+_token", name):
            token = isinstance(value, dict)  # transformers needs its type
            config[name] = value | {"__type": "AddedToken"} if token else value
        elif name in NAMES_AND_TEMPLATES:
            config[name] = value
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if (template := source / "chat_template.jinja").is_file():
        shutil.copy(template, folder)
