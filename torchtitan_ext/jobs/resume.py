"""Find the checkpoint that a launch continues from, and its problems."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader, Metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torchtitan.components.checkpoint import DATALOADER, LR_SCHEDULER, OPTIMIZER, TRAIN_STATE
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

from torchtitan_ext.data.unpickling import load_object, load_plain
from torchtitan_ext.model import flavors
from torchtitan_ext.model.hf_config import computed, config_problems, difference, llama_config
from torchtitan_ext.model.model import meta_model

from .recorded import CONFIG_FILE, LEARNED_WITH, read_config
from .schedule import schedule_changes, trained_with

INTERRUPTED = ".interrupted"  # marks a checkpoint that was saved on SIGTERM, at a step that was not due
METADATA = ".metadata"  # written last
STATES = {OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE}  # of a checkpoint, besides the weights
Weights = Mapping[str, torch.Tensor]


def checkpoint_folder(job_config: JobConfig) -> Path:
    return Path(job_config.job.dump_folder, job_config.checkpoint.folder)


def saves_checkpoints(job_config: JobConfig) -> bool:
    return job_config.checkpoint.enable and not job_config.checkpoint.load_only


def checkpoint_to_load(job_config: JobConfig) -> Path | None:
    """The checkpoint that a launch starts from; None from scratch."""
    checkpoint, folder = job_config.checkpoint, checkpoint_folder(job_config)
    if not checkpoint.enable:
        return None
    if _loads_from(folder, checkpoint.load_only):
        step = max(complete_steps(folder), default=-1) if checkpoint.load_step == -1 else checkpoint.load_step
        return None if step == -1 else folder / f"step-{step}"
    start = checkpoint.initial_load_path or (checkpoint.initial_load_in_hf and job_config.model.hf_assets_path)
    return Path(start) if start else None


def recorded_job(start: Path | None) -> dict:
    """The job of the run that saved the checkpoint `start`; empty if it recorded none."""
    # the run's folder of checkpoints may be a link, and so may `start`
    for path in (start, start.resolve()) if start and (start / METADATA).is_file() else ():
        with suppress(ValueError, FileNotFoundError):
            return read_config(path.absolute().parent.parent / CONFIG_FILE, "training.steps")
    return {}


def changes_since(before: dict, job_config: JobConfig) -> dict[str, tuple[Any, Any]]:
    """By field, value before and now of what decides what a run learns and differs from the recorded job `before`."""
    now, changes = json.loads(json.dumps(job_config.to_dict())), {}
    for section in LEARNED_WITH:
        for field, value in now[section].items():
            if value != (old := before.get(section, {}).get(field, value)):
                changes[f"{section}.{field}"] = old, value
    return changes


def describe_changes(start: Path | None, job_config: JobConfig) -> str:
    changes = changes_since(recorded_job(start), job_config)
    return ", ".join(f"{field} = {now!r} (was {before!r})" for field, (before, now) in changes.items())


def _loads_from(folder: Path, load_only: bool) -> bool:
    """Whether a launch loads from the run's own folder of checkpoints. torchtitan does if there is one, so
    `remove_half_saved` deletes it if killed saves left nothing else there."""
    half_saved = [path for path in _step_folders(folder).values() if _is_half_saved(path)]
    others = {*folder.glob("*")}.difference(half_saved)  # listed last, as rank 0 may be deleting
    return folder.exists() and (load_only or folder.is_symlink() or folder.is_mount() or bool(others))


def excluded_states(job_config: JobConfig, dims: ParallelDims | None) -> list[str]:
    """The states that a launch does not load: those in `checkpoint.exclude_from_loading`.

    A run's own checkpoints are loaded whole, or a relaunch after a crash would start the data over each time. Only the
    data position of another data-parallel degree is excluded from those too. Of its step-0, torchtitan's seed
    checkpoint, only the weights are loaded.
    """
    excluded, path = job_config.checkpoint.exclude_from_loading, checkpoint_to_load(job_config)
    if path is None or path.parent != checkpoint_folder(job_config):
        return excluded
    if path.name == "step-0":
        return sorted(STATES)
    if dims and DATALOADER in excluded:
        with suppress(ValueError):  # checkpoint_problems reports it
            if data_parallel_degree(dims) != saved_degree(complete_metadata(path)):
                return [DATALOADER]
    return []


def saved_state(job_config: JobConfig, dims: ParallelDims | None, state: str) -> dict[str, Any]:
    """The objects of DATALOADER or TRAIN_STATE that a launch loads; empty where both start over."""
    path = checkpoint_to_load(job_config)
    if path and state not in excluded_states(job_config, dims):
        with suppress(ValueError):  # checkpoint_problems reports it
            objects = _checked_objects(path, complete_metadata(path), STATES - {state})
            return {key.removeprefix(f"{state}."): value for key, value in objects.items()}
    return {}


def data_parallel_degree(dims: ParallelDims) -> int:
    """Number of ranks, or of groups that share sequences, with their own data."""
    return dims.dp_replicate * dims.dp_shard


def saved_degree(metadata: Metadata) -> int:
    return sum(key.startswith(f"{DATALOADER}.dp_rank_") for key in metadata.state_dict_metadata)


def checkpoint_problems(job_config: JobConfig, dims: ParallelDims | None, with_start: bool) -> Iterator[str]:
    """Problems of [checkpoint] and, `with_start`, of the checkpoint to load; without dims, none that ranks decide."""
    checkpoint, dump = job_config.checkpoint, job_config.job.dump_folder
    folder, initial = checkpoint_folder(job_config), checkpoint.initial_load_path
    if with_start and not saves_checkpoints(job_config) and complete_steps(folder):
        remedy = "its curve would replace the run's; choose another folder"
        yield f"job.dump_folder = {dump!r}: holds a run's checkpoints, and this launch saves none: {remedy}"
    if not checkpoint.enable:
        if initial or checkpoint.initial_load_in_hf:
            start = f"initial_load_path = {initial!r}" if initial else "initial_load_in_hf = true"
            remedy = "set it to true, with checkpoint.load_only to save nothing"
            yield f"checkpoint.{start}: checkpoint.enable = false loads nothing; {remedy}"
        return
    field, name = f"checkpoint.folder = {checkpoint.folder!r}", checkpoint.folder.rstrip("/")
    if name in ("", "..") or name != Path(name).name:
        yield f"{field}: must name a folder in {dump}, as 'checkpoint' does; to save elsewhere, change job.dump_folder"
        return
    if folder.is_symlink() and not folder.exists():
        yield f"{field}: {folder} links to {folder.readlink()}, which is not there: mount it, or make that folder"
        return
    if checkpoint.last_save_in_hf:
        remedy = "set it to false, and call python -m torchtitan_ext export for config.json and the tokenizer too"
        yield f"checkpoint.last_save_in_hf = true: that format holds weights only; {remedy}"
    if job_config.lighthouse.enable and checkpoint.last_save_model_only:
        yield "checkpoint.last_save_model_only = true: a dense stage can't continue from weights only; set it to false"
    if initial and checkpoint.initial_load_model_only and not checkpoint.initial_load_in_hf:
        yield f"checkpoint.initial_load_model_only = true: drops all but the weights of {initial}; set it to false"
    if with_start:
        rules = _resume_problems if _loads_from(folder, checkpoint.load_only) else _start_problems
        yield from rules(job_config, dims)


def _start_problems(job_config: JobConfig, dims: ParallelDims | None) -> Iterator[str]:
    checkpoint, folder = job_config.checkpoint, checkpoint_folder(job_config)
    initial = checkpoint.initial_load_path
    if (step := checkpoint.load_step) != -1:
        yield f"checkpoint.load_step = {step}: there is no {folder}; set it to -1 to start from {initial or 'scratch'}"
    start, field = checkpoint_to_load(job_config), "checkpoint.initial_load_path" if initial else "model.hf_assets_path"
    if start and checkpoint.initial_load_in_hf:
        yield from _hf_problems(job_config, field, start)
    elif start:
        yield from _state_problems(job_config, dims, field, start)


def _resume_problems(job_config: JobConfig, dims: ParallelDims | None) -> Iterable[str]:
    """Problems of a run with a folder of checkpoints: torchtitan loads from it and ignores initial_load_path."""
    checkpoint, folder = job_config.checkpoint, checkpoint_folder(job_config)
    initial, steps = checkpoint.initial_load_path, complete_steps(folder)
    if not steps and (initial or checkpoint.initial_load_in_hf):
        setting = f"initial_load_path = {initial!r}" if initial else "initial_load_in_hf = true"
        reason = f"the run's own folder {folder} exists, without a complete checkpoint"
        return [f"checkpoint.{setting} would be ignored, because {reason}: delete {folder}"]
    record = Path(job_config.job.dump_folder, CONFIG_FILE)
    try:
        recorded = read_config(record, "checkpoint.initial_load_path")["checkpoint"] if record.exists() else {}
    except ValueError as error:  # it is damaged
        return [str(error)]
    start = recorded.get("initial_load_path")
    if steps and not _same_checkpoint(start, initial):
        reason = f"{folder} holds a run that started from {start or 'scratch'}"
        gone = "" if not start or os.path.exists(start) else " (deleted since, but not read again)"
        change = f"set it to {start}{gone}" if start else "drop the path"
        remedy = f"to continue that one, {change}; to start over, choose another job.dump_folder or delete {folder}"
        return [f"checkpoint.initial_load_path = {initial!r} would be ignored, because {reason}: {remedy}"]
    # The start agrees; now the checkpoint itself. _state_problems reports one that isn't complete.
    path = checkpoint_to_load(job_config)
    step = int(path.name.removeprefix("step-")) if path else -1
    if step in (-1, *steps) and (rewritten := _rewrite_problem(job_config, step)):
        return [rewritten]
    if step in steps and step > (total := job_config.training.steps):
        return [f"training.steps = {total}: {folder} is past it, at step {step}; raise it, or change job.dump_folder"]
    field = "job.dump_folder" if checkpoint.load_step == -1 else f"checkpoint.load_step = {checkpoint.load_step}"
    return _state_problems(job_config, dims, field, path) if path else []


def _same_checkpoint(recorded: str | None, now: str | None) -> bool:
    """Whether `recorded` and `now` are the same checkpoint, perhaps in a folder that was moved."""
    if not recorded or not now:
        return not recorded and not now
    n_parts = 3 if not os.path.exists(recorded) else None  # the run, checkpoint/, step-N
    return Path(now).resolve().parts[::-1][:n_parts] == Path(recorded).resolve().parts[::-1][:n_parts]


def _hf_problems(job_config: JobConfig, field: str, path: Path) -> Iterator[str]:
    """Problems of the Hugging Face folder `path`, which `field` names, that a new run starts from."""
    files = list(path.glob("*.safetensors"))
    for file in files:
        try:
            safe_open(file, "pt")  # its error names no file, nor does that of torch's reader
        except (OSError, SafetensorError) as error:
            yield f"{field} = {str(path)!r}: {file} can't be read ({error}); fetch it again"
            return
    if not files:
        yield f"{field} = {str(path)!r}: no *.safetensors there; give the folder that holds them"
    elif args := flavors.get(job_config.model.flavor):
        weights = Llama3StateDictAdapter(args, None).to_hf(meta_model(args).state_dict())
        described = list(config_problems(job_config, field, path))  # clearer than shapes
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()  # joins the shards of a tensor
        yield from described or _shape_problems(job_config, field, path, weights, metadata)


def _rewrite_problem(job_config: JobConfig, step: int) -> str | None:
    """The problem that a launch from the run's own `step` would overwrite later checkpoints."""
    checkpoint, folder = job_config.checkpoint, checkpoint_folder(job_config)
    cause = f"checkpoint.load_step = {checkpoint.load_step}"
    if checkpoint.create_seed_checkpoint:
        cause, step = "checkpoint.create_seed_checkpoint = true", -1
    later = [path for number, path in _step_folders(folder).items() if number > step and not _is_half_saved(path)]
    if checkpoint.load_only or not later:
        return None
    held = f"{folder} holds {', '.join(path.name for path in later)}, which this launch would write over"
    held += f"; to go on from {later[-1].name}, drop that" if (later[-1] / METADATA).is_file() else ""
    aside = f"put them aside ({_put_aside(folder, later)})"
    return f"{cause}: {held}; to go on without them, {aside} and launch again, without checkpoint.load_step"


def _put_aside(folder: Path, checkpoints: list[Path]) -> str:
    """A shell command that moves checkpoints into a new folder beside theirs."""
    place = next(place for number in count(1) if not os.path.exists(place := f"{folder}-aside-{number}"))
    return f"{shlex.join(['mkdir', place])} && {shlex.join(['mv', *map(str, checkpoints), place])}"


def _state_problems(job_config: JobConfig, dims: ParallelDims | None, field: str, path: Path) -> Iterator[str]:
    """Problems of resuming from the checkpoint at `path`, which `field` names."""
    excluded, folder = excluded_states(job_config, dims), checkpoint_folder(job_config)
    try:
        metadata = complete_metadata(path)
        objects = _checked_objects(path, metadata, excluded)
    except ValueError as error:
        yield f"{field}: {error}{_recovery_hint(job_config, field, path)}"
        return
    if args := flavors.get(job_config.model.flavor):
        yield from _shape_problems(job_config, field, path, meta_model(args).state_dict(), metadata)
        yield from changed_problems(job_config, field, path, recorded_job(path), trained_with(objects))
    if path.parent != folder and objects.get(f"{TRAIN_STATE}.step", 0) >= (steps := job_config.training.steps):
        yield f"training.steps = {steps}: {path} has reached that step; count from the start of the first stage"
    wanted = STATES.difference(excluded)
    if missing := sorted(wanted - {key.split(".")[0] for key in metadata.state_dict_metadata}):
        remedy = "use one with checkpoint.last_save_model_only = false" + _recovery_hint(job_config, field, path)
        yield f"{field}: {path} holds no {', '.join(missing)}; {remedy}"
    if dims and DATALOADER in wanted.difference(missing):
        degree, before = data_parallel_degree(dims), saved_degree(metadata)
        if degree != before:
            remedy = "launch as many ranks, or start the data over: checkpoint.exclude_from_loading = ['dataloader']"
            yield f"data-parallel degree = {degree}: {path} was saved by a degree of {before}; {remedy}"


def changed_problems(job_config: JobConfig, field: str, path: Path | str, before: dict, saved: dict) -> Iterator[str]:
    """Problems of continuing, from the checkpoint `path` that `field` names, a job recorded as `before` and `saved`."""
    args, trained = flavors[job_config.model.flavor], before.get("model", {}).get("flavor")
    if trained in flavors and (other := difference(computed(llama_config(flavors[trained])), args)):
        yield f"model.flavor = {job_config.model.flavor!r}: {path} is of {trained!r} ({other}); set it to that"
    default = {"rope.theta": args.rope_theta} | {f"rope.{k}": v for k, v in vars(args.rope_scaling_args).items()}
    for name, values in changes_since(before, job_config).items():
        old, now = (default.get(name) if value is None else value for value in values)
        if name in default and old != now:
            remedy = "set it to that, or export that checkpoint and start a new run from the export"
            yield f"{name} = {now}: {path} has {old}; {remedy}"
    yield from schedule_changes(job_config, field, path, saved)


def _recovery_hint(job_config: JobConfig, field: str, path: Path) -> str:
    """How to continue if the checkpoint at `path`, which `field` names, can't be loaded."""
    folder = path.parent
    # an initial_load_path may name a run, or its folder of checkpoints
    places = [folder, path, path / job_config.checkpoint.folder]
    others = (place / f"step-{step}" for place in places for step in complete_steps(place)[::-1])
    newest = next((other for other in others if other != path), None)
    if folder != checkpoint_folder(job_config):
        return f"; the newest complete one near it is {newest}: to start from that, set {field} to it" if newest else ""
    if newest is None:
        return f"; {folder} holds no other: to start over, choose another job.dump_folder"
    aside = f"put it aside ({_put_aside(folder, [path])}) and " if path.exists() else ""
    return f"; to go on from {newest.name}, {aside}launch again, without checkpoint.load_step"


def shape_mismatch(weights: Weights, saved: Metadata) -> str | None:
    """How many weights are missing or of another shape in a checkpoint, and the first; None for none. Only complete
    tensors count: torch silently loads only the rest of a tensor whose shard is missing."""
    tensors = {name: x for name, x in saved.state_dict_metadata.items() if isinstance(x, TensorStorageMetadata)}
    complete = {name: x for name, x in tensors.items() if sum(c.sizes.numel() for c in x.chunks) == x.size.numel()}
    shapes = {name: list(x.size) for name, x in complete.items()}
    expected = {name: list(weight.shape) for name, weight in weights.items()}
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if not wrong:
        return None
    first = wrong[0]
    there = f"is {shapes[first]} there and {expected[first]} here" if first in shapes else "is not there"
    return f"{len(wrong)} of {len(weights)} weights: {first} {there}"


def _shape_problems(job: JobConfig, field: str, path: Path, weights: Weights, saved: Metadata) -> Iterator[str]:
    if mismatch := shape_mismatch(weights, saved):
        model = f"{path}, which {field} leads to, is of another model ({mismatch})"
        yield f"model.flavor = {job.model.flavor!r}: {model}; use the flavor that it was trained with"


def _checked_objects(path: Path, metadata: Metadata, excluded: Collection[str]) -> dict[str, Any]:
    """Load all objects but tensors, as torch will. Raises ValueError that names a damaged one."""
    loaded = {}
    for index, stored in metadata.storage_data.items():
        key, file = index.fqn, path / stored.relative_path
        is_object = isinstance(metadata.state_dict_metadata.get(key), BytesStorageMetadata)
        if not is_object or key.split(".")[0] in excluded:
            continue
        try:
            with open(file, "rb") as data:
                data.seek(stored.offset)
                loaded[key] = load_object(data.read(stored.length))
            if key.startswith(f"{DATALOADER}.dp_rank_"):
                load_plain(loaded[key])
        except Exception as error:  # from any bytes
            raise ValueError(f"{key} in {file} is damaged or was made to run code ({error})") from error
    return loaded


def complete_metadata(path: Path) -> Metadata:
    """The metadata of the checkpoint in the step-N folder `path`. Raises ValueError if it isn't complete."""
    incomplete = f"{path} is not a complete checkpoint:"
    if not path.exists():
        raise ValueError(f"{incomplete} it does not exist; train it first, or give the step-N folder of another")
    sizes: dict[str, int] = {}
    try:
        metadata = FileSystemReader(path).read_metadata()
        for stored in metadata.storage_data.values():
            end = stored.offset + stored.length
            sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
    except Exception as error:  # from any bytes
        raise ValueError(f"{incomplete} no .metadata that can be read ({error}); give another step-N folder") from error
    held = {name: (path / name).stat().st_size if (path / name).is_file() else 0 for name in sizes}
    if broken := [f"{n} holds {held[n]:,} of {sizes[n]:,} bytes" for n in sizes if held[n] < sizes[n]]:
        raise ValueError(f"{incomplete} {', '.join(broken)}; restore it, or use another")
    return metadata


def _step_folders(folder: Path) -> dict[int, Path]:
    """The folders named exactly step-N in a folder of checkpoints."""
    matches = (re.fullmatch(r"step-(0|[1-9][0-9]*)", path.name) for path in folder.glob("step-*") if path.is_dir())
    return {step: folder / f"step-{step}" for step in sorted(int(match[1]) for match in matches if match)}


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that a run can continue from."""
    return [step for step, path in _step_folders(folder).items() if (path / METADATA).is_file()]


def stale_checkpoints(folder: Path, keep_latest_k: int) -> list[Path]:
    """The complete checkpoints to delete after a save. An INTERRUPTED one does not count for `keep_latest_k`, and goes
    once a later one is complete."""
    steps = complete_steps(folder)
    temporary = [step for step in steps if (folder / f"step-{step}" / INTERRUPTED).exists()]
    regular = [step for step in steps if step not in temporary]
    stale = [*regular[:-keep_latest_k], *(step for step in temporary if step < steps[-1])]
    return [folder / f"step-{step}" for step in stale]


def _is_half_saved(path: Path) -> bool:
    """Whether a step's folder contains only what a killed save leaves."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:  # rank 0 is deleting it
        return True
    left = {".metadata.tmp", "sharded", INTERRUPTED}
    return not path.is_symlink() and all(n.endswith(".distcp") or n in left for n in names)


def remove_half_saved(folder: Path) -> None:
    """Delete what killed saves left: their shards would mix with those of the next save. Delete an empty folder too."""
    for path in _step_folders(folder).values():
        if _is_half_saved(path):
            shutil.rmtree(path)
    with suppress(OSError):  # it holds more, is a link or a mount, or is not there
        folder.rmdir()
