"""Which checkpoint a launch goes on from, and what is wrong with it."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, BytesStorageMetadata
from torchtitan.components.checkpoint import (
    DATALOADER,
    INTERRUPTED,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    TRAIN_STATE,
)
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

from torchtitan_ext.unpickling import load_object, load_plain

from .args import flavors
from .hf_config import config_problems
from .model import LighthouseTransformer
from .optimizer import resume_problems

METADATA, HF_INDEX = ".metadata", "model.safetensors.index.json"  # each is written last


def is_saved(path: Path) -> bool:
    """Whether the folder holds a checkpoint, which may be weights alone (checkpoint.last_save_in_hf)."""
    return any((path / name).is_file() for name in (METADATA, HF_INDEX))


def checkpoint_problems(job_config: JobConfig, dims: ParallelDims | None) -> Iterator[str]:
    """What keeps a launch from its checkpoint: field, value and remedy. Without dims, not what depends on ranks."""
    checkpoint = job_config.checkpoint
    folder, initial = checkpoint_folder(job_config), checkpoint.initial_load_path
    if not checkpoint.enable:
        if initial:
            yield (
                f"checkpoint.initial_load_path = {initial!r} with checkpoint.enable = false: "
                "nothing would be loaded; set checkpoint.enable to true or drop the path"
            )
        return
    if folder.resolve() in (own := Path(job_config.job.dump_folder).resolve(), *own.parents):
        yield (
            f"checkpoint.folder = {checkpoint.folder!r}: what else job.dump_folder = {job_config.job.dump_folder!r} "
            "holds would be taken for checkpoints; name a folder in it, for example 'checkpoint'"
        )
        return
    known = {MODEL, OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE}
    if unknown := sorted({*checkpoint.exclude_from_loading} - known):
        yield (
            f"checkpoint.exclude_from_loading = {checkpoint.exclude_from_loading}: a checkpoint has no "
            f"{', '.join(unknown)}; choose from {', '.join(sorted(known))}"
        )
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        yield (
            "checkpoint.last_save_in_hf = true with checkpoint.last_save_model_only = false: the last checkpoint "
            "couldn't be saved, because Hugging Face's format holds weights alone; set last_save_in_hf to false, "
            "and export the checkpoint with scripts/export_hf.py"
        )
    if job_config.lighthouse.enable and checkpoint.last_save_model_only:
        yield (
            "checkpoint.last_save_model_only = true: the last checkpoint of a Lighthouse run "
            "couldn't be resumed dense, its optimizer and data position are missing; set it to false"
        )
    if initial and checkpoint.initial_load_model_only and not checkpoint.initial_load_in_hf:
        yield (
            "checkpoint.initial_load_model_only = true: optimizer, learning-rate schedule, data "
            f"position and step of {initial} would be dropped; set it to false (and to start "
            "from the weights alone, name what to drop in checkpoint.exclude_from_loading)"
        )

    if not folder.exists():
        if checkpoint.load_step != -1:
            yield (
                f"checkpoint.load_step = {checkpoint.load_step}: {folder} doesn't exist, so there is nothing to load; "
                "set it to -1 to start "
                + (
                    f"from checkpoint.initial_load_path = {initial!r}"
                    if initial
                    else "from scratch"
                )
            )
        if checkpoint.initial_load_in_hf:
            yield from _hf_problems(job_config)
        elif initial:
            yield from _state_problems(
                job_config, dims, "checkpoint.initial_load_path", Path(initial)
            )
            counted = TRAIN_STATE not in checkpoint.exclude_from_loading  # else from 0 again
            if counted and step_of(initial) >= job_config.training.steps:
                yield (
                    f"training.steps = {job_config.training.steps}: {initial} has done as many; "
                    "set the number of steps counted from the start of the first stage"
                )
        return

    # From here on torchtitan loads from the run's own folder and ignores initial_load_path.
    steps = complete_steps(folder)
    if initial and not steps:
        yield (
            f"checkpoint.initial_load_path = {initial!r} would be ignored, because the run's own "
            f"folder {folder} exists, without a complete checkpoint: delete {folder}"
        )
        return
    note = _start_note(job_config)
    noted = note.read_text().strip() if note.exists() else ""
    if steps and not _is_same(noted, _names(initial)):
        origin, remedy = noted.partition("\n")[0], "drop the path"
        if os.path.exists(origin):
            remedy = f"set it to {origin}"
        elif origin:
            remedy = f"set it to where that lies now, and write that path into {note}"
        yield (
            f"checkpoint.initial_load_path = {initial!r} would be ignored, because {folder} holds "
            f"a run that started from {origin or 'scratch'}: to continue that one, {remedy}; to start anew, choose "
            f"another job.dump_folder or delete {folder}"
        )
        return
    step = _step_to_load(job_config, steps)
    if step not in (-1, *steps):
        yield (
            f"checkpoint.load_step = {step}: {folder} holds no complete checkpoint of that step, "
            f"only of {sorted(steps)}; choose one of them, or -1 for the newest"
        )
    elif rewritten := list(_rewrite_problems(job_config, dims, step)):
        yield from rewritten
    elif step > job_config.training.steps:
        yield (
            f"training.steps = {job_config.training.steps}: {folder} holds a run that is past it, at "
            f"step {step}; raise it, choose another job.dump_folder or delete {folder}"
        )
    elif step != -1:
        yield from _state_problems(job_config, dims, "job.dump_folder", folder / f"step-{step}")


def _hf_problems(job_config: JobConfig) -> Iterator[str]:
    """What the Hugging Face folder that a new run starts from lacks."""
    checkpoint, field = job_config.checkpoint, "checkpoint.initial_load_path"
    path = checkpoint.initial_load_path
    if not path:
        field, path = "model.hf_assets_path", job_config.model.hf_assets_path
    if not checkpoint.initial_load_model_only:
        yield (
            "checkpoint.initial_load_model_only = false with checkpoint.initial_load_in_hf = true: Hugging Face's "
            "format holds weights alone; set it to true"
        )
    shapes: dict[str, list[int]] = {}
    try:
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        yield f"{field} = {path!r}: {file} can't be read ({error}); fetch it again"
        return
    if not shapes:
        yield (
            f"{field} = {path!r}: no *.safetensors there, from which checkpoint.initial_load_in_hf = true would "
            "start; give the folder that holds them, or set it to false"
        )
    elif job_config.model.flavor in flavors:
        args = flavors[job_config.model.flavor]
        with torch.device("meta"):
            weights = LighthouseTransformer(args).state_dict()
        adapter = Llama3StateDictAdapter(args, None)
        yield from _other_model(job_config, field, path, adapter.to_hf(weights), shapes)
        yield from config_problems(args, job_config.model.flavor, field, Path(path))


def _rewrite_problems(job_config: JobConfig, dims: ParallelDims | None, step: int) -> Iterator[str]:
    """That a launch which goes on from the run's own `step` would reach checkpoints that are there."""
    checkpoint, folder = job_config.checkpoint, checkpoint_folder(job_config)
    cause, first = f"checkpoint.load_step = {checkpoint.load_step}", step
    if checkpoint.create_seed_checkpoint:
        cause, first = "checkpoint.create_seed_checkpoint = true", -1
    anew = step != -1 and TRAIN_STATE in excluded_states(job_config, dims)
    if anew:
        cause, first = "checkpoint.exclude_from_loading, with 'train_state', counts from 0 again", 0
    saved = _step_folders(folder)
    later = [path for number, path in saved.items() if number > first and not _is_half_saved(path)]
    if not later or checkpoint.load_only:
        return
    names = ", ".join(path.name for path in later)
    yield f"{cause}: {folder} holds {names}, which this launch would write over; " + (
        f"choose another job.dump_folder, and checkpoint.initial_load_path = {str(folder / f'step-{step}')!r}"
        if anew
        else f"to give them up, put them aside ({_put_aside(folder, later)}) and launch again, without "
        "checkpoint.load_step"
    )


def _put_aside(folder: Path, checkpoints: list[Path]) -> str:
    """A shell command that moves checkpoints out of their folder, into a new one beside it."""
    places = (folder.with_name(f"{folder.name}-aside-{number}") for number in count(1))
    place = str(next(place for place in places if not place.exists()))
    return f"{shlex.join(['mkdir', place])} && {shlex.join(['mv', *map(str, checkpoints), place])}"


def _state_problems(
    job_config: JobConfig, dims: ParallelDims | None, field: str, path: Path
) -> Iterator[str]:
    """What the checkpoint at `path`, which `field` leads to, lacks to be resumed by this launch."""
    excluded = excluded_states(job_config, dims)
    try:
        metadata = complete_metadata(path)
        objects = _checked_objects(path, metadata, excluded)
    except ValueError as error:
        yield f"{field}: {error}{_way_on(job_config, field, path)}"
        return
    saved = metadata.state_dict_metadata
    if job_config.model.flavor in flavors:
        yield from _weight_problems(job_config, field, path, saved)
    if path == checkpoint_folder(job_config) / "step-0":
        return  # torchtitan's seed checkpoint: weights alone
    yield from resume_problems(job_config, field, path, objects)
    wanted = {OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE}.difference(excluded)
    missing = sorted(wanted - {key.split(".")[0] for key in saved})
    if missing:
        yield (
            f"{field}: {path} holds no {', '.join(missing)}, so training can't go on from it; "
            "use a checkpoint saved with checkpoint.last_save_model_only = false"
        )
    if dims and DATALOADER in wanted and DATALOADER not in missing:
        degree, saved_degree = data_parallel_degree(dims), _saved_degree(metadata)
        if degree != saved_degree:
            yield (
                f"data-parallel degree = {degree}: {path} was saved by a degree of {saved_degree}, and "
                f"its data position holds for no other; launch as many data-parallel ranks (or start "
                "the data over on purpose: checkpoint.exclude_from_loading = ['dataloader'])"
            )


def data_parallel_degree(dims: ParallelDims) -> int:
    """How many ranks, or groups of ranks that share sequences, read data of their own."""
    return dims.dp_replicate * dims.dp_shard


def _saved_degree(metadata: Metadata) -> int:
    """How many data-parallel ranks' data positions a checkpoint holds."""
    return sum(key.startswith(f"{DATALOADER}.dp_rank_") for key in metadata.state_dict_metadata)


def _objects(path: Path, metadata: Metadata) -> Iterator[tuple[str, Path, bytes]]:
    """What is no tensor in a checkpoint: key, file and the bytes that torch.save made of it."""
    by_place = sorted(
        metadata.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset)
    )
    for index, stored in by_place:
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with open(path / stored.relative_path, "rb") as file:
                file.seek(stored.offset)
                yield index.fqn, path / stored.relative_path, file.read(stored.length)


def _checked_objects(path: Path, metadata: Metadata, excluded: list[str]) -> dict[str, Any]:
    """Loads what is no tensor, as torch will, because here an error can name it. Raises ValueError."""
    loaded = {}
    for key, file, saved in _objects(path, metadata):
        if key.split(".")[0] in excluded:
            continue
        try:
            loaded[key] = load_object(saved)
            if key.startswith(f"{DATALOADER}.dp_rank_"):
                load_plain(loaded[key])
        except Exception as error:  # whatever the bytes happen to spell
            raise ValueError(
                f"{key} in {file} is damaged or was made to run code ({error})"
            ) from error
    return loaded


def _way_on(job_config: JobConfig, field: str, path: Path) -> str:
    """How to go on where the checkpoint at `path`, which `field` leads to, can't be loaded."""
    folder = path.parent
    places = [folder]
    if field != "job.dump_folder":  # which may name a run, or its folder of checkpoints
        places += [path, path / job_config.checkpoint.folder]
    others = (
        place / f"step-{step}"
        for place in places
        for step in sorted(complete_steps(place), reverse=True)
    )
    newest = next((other for other in others if other != path and _is_complete(other)), None)
    if field != "job.dump_folder":
        if newest:
            return f"; the newest complete one near it is {newest}: to start from that, set {field} to it"
        return ""
    if newest is None:
        return f"; no other in {folder} is complete: to start anew, choose another job.dump_folder"
    later = [path for step, path in _step_folders(folder).items() if step > step_of(newest)]
    return (
        f"; the newest complete one is {newest.name}: to go on from that, put what is later aside "
        f"({_put_aside(folder, later)}) and launch again, without checkpoint.load_step"
    )


def _weight_problems(
    job_config: JobConfig, field: str, path: Path, saved: dict[str, STORAGE_TYPES]
) -> Iterator[str]:
    with torch.device("meta"):
        weights = LighthouseTransformer(flavors[job_config.model.flavor]).state_dict()
    shapes = {name: list(getattr(stored, "size", ())) for name, stored in saved.items()}
    yield from _other_model(job_config, field, path, weights, shapes)


def _other_model(
    job_config: JobConfig,
    field: str,
    path: str | Path,
    weights: dict[str, torch.Tensor],
    shapes: dict[str, list[int]],
) -> Iterator[str]:
    other = [
        f"{name} is {shape} there and {list(weight.shape)} here"
        if shape
        else f"{name} is not there"
        for name, weight in weights.items()
        if (shape := shapes.get(name)) != list(weight.shape)
    ]
    if other:
        yield (
            f"model.flavor = {job_config.model.flavor!r}: {path}, which {field} leads to, is of another "
            f"model ({len(other)} of {len(weights)} weights: {other[0]}); use the flavor that it was trained with"
        )


def checkpoint_folder(job_config: JobConfig) -> Path:
    return Path(job_config.job.dump_folder, job_config.checkpoint.folder)


def checkpoint_to_load(job_config: JobConfig) -> Path | None:
    """What a launch without problems starts from; None from scratch."""
    checkpoint, folder = job_config.checkpoint, checkpoint_folder(job_config)
    if not checkpoint.enable:
        return None
    if folder.exists():
        step = _step_to_load(job_config, complete_steps(folder))
        return None if step == -1 else folder / f"step-{step}"
    return Path(checkpoint.initial_load_path) if checkpoint.initial_load_path else None


def excluded_states(job_config: JobConfig, dims: ParallelDims | None) -> list[str]:
    """What of `checkpoint.exclude_from_loading` a launch leaves out of the checkpoint that it loads.

    An exclusion holds for the checkpoint that was loaded when it was first set. What the run has saved since is
    loaded whole: otherwise the same command, launched again after a crash, would start its data or its schedule over
    each time. Only a data position that was saved by another data-parallel degree, and holds for no other, is left
    out of any.
    """
    excluded, path = job_config.checkpoint.exclude_from_loading, checkpoint_to_load(job_config)
    if path is None:
        return excluded
    noted, now = _noted_exclusions(job_config), _names(path)
    left_out = {state for state in excluded if _is_same(noted.get(state, now), now)}
    if dims and DATALOADER in excluded:
        with suppress(ValueError):  # of an incomplete one, named by checkpoint_problems
            if data_parallel_degree(dims) != _saved_degree(complete_metadata(path)):
                left_out.add(DATALOADER)
    return sorted(left_out)


def data_position(job_config: JobConfig, dims: ParallelDims, rank: int) -> dict[str, Any]:
    """Where a data-parallel rank goes on in the data, as its loader takes it; empty from the data's start."""
    path, excluded = checkpoint_to_load(job_config), excluded_states(job_config, dims)
    wanted = [f"{DATALOADER}.{name}" for name in (f"dp_rank_{rank}", "world_size")]
    try:
        objects = list(_objects(path, complete_metadata(path))) if path else []
        return {
            key.removeprefix(f"{DATALOADER}."): load_object(saved)
            for key, _, saved in objects
            if key in wanted and DATALOADER not in excluded
        }
    except Exception:  # named by job_problems
        return {}


def _step_to_load(job_config: JobConfig, steps: list[int]) -> int:
    """Of the run's own checkpoints, which are of these steps; -1 where there is none."""
    load_step = job_config.checkpoint.load_step
    return max(steps, default=-1) if load_step == -1 else load_step


def step_of(path: str | Path) -> int:
    """The steps that the checkpoint in a folder has done; 0 where the name doesn't tell."""
    found = re.fullmatch(r"step-(\d+)", Path(path).name)
    return int(found[1]) if found else 0


def complete_metadata(path: Path) -> Metadata:
    """The metadata of the checkpoint in the step-N folder `path`; ValueError where it isn't complete."""
    if not path.exists():
        raise ValueError(
            f"{path} is not a complete checkpoint: it does not exist; train it first, or give "
            "the step-N folder of another"
        )
    try:
        metadata = FileSystemReader(path).read_metadata()
        sizes: dict[str, int] = {}
        for stored in metadata.storage_data.values():
            end = stored.offset + stored.length
            sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
    except Exception as error:  # whatever the bytes happen to spell
        raise ValueError(
            f"{path} is not a complete checkpoint: no .metadata that can be read ({error}); "
            "give the step-N folder of one that was saved to its end"
        ) from error
    broken = []
    for name, size in sorted(sizes.items()):
        if not (path / name).is_file():
            broken.append(f"{name} is missing")
        elif (held := (path / name).stat().st_size) < size:
            broken.append(f"{name} holds {held:,} of {size:,} bytes")
    if broken:
        raise ValueError(
            f"{path} is not a complete checkpoint: {', '.join(broken)}; restore it, or use another"
        )
    return metadata


def _is_complete(path: Path) -> bool:
    try:
        complete_metadata(path)
    except ValueError:
        return False
    return True


def _step_folders(folder: Path) -> dict[int, Path]:
    """What is named step-N, from the first character to the last, in a folder of checkpoints."""
    paths = {path.name[5:]: path for path in folder.glob("step-*") if path.is_dir()}
    numbers = sorted(int(name) for name in paths if re.fullmatch("0|[1-9][0-9]*", name))
    return {number: paths[str(number)] for number in numbers}


def complete_steps(folder: Path, written_last: str = METADATA) -> list[int]:
    """Steps of the checkpoints that a run can go on from; with HF_INDEX, of those in Hugging Face's format."""
    saved = _step_folders(folder)
    return [step for step, path in saved.items() if (path / written_last).is_file()]


def stale_checkpoints(folder: Path, keep_latest_k: int) -> list[Path]:
    """The complete checkpoints that are to go after a save.

    What SIGTERM has saved between two intervals bridges to the next: it pushes out none that is to be kept, and goes
    when a later one is complete.
    """
    steps = complete_steps(folder)
    bridges = [step for step in steps if (folder / f"step-{step}" / INTERRUPTED).exists()]
    regular = [step for step in steps if step not in bridges]
    stale = [*regular[:-keep_latest_k], *(step for step in bridges if step < steps[-1])]
    return [folder / f"step-{step}" for step in stale]


def _is_half_saved(path: Path) -> bool:
    """Whether a step's folder holds what a save that was killed leaves, and nothing else."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:  # rank 0 is deleting it
        return True
    left = {".metadata.tmp", "sharded", INTERRUPTED}
    return not path.is_symlink() and all(n.endswith(".distcp") or n in left for n in names)


def remove_half_saved(folder: Path) -> None:
    """Deletes what killed saves left, whose shards would lie among those of the next save of that step."""
    for path in _step_folders(folder).values():
        if _is_half_saved(path):
            shutil.rmtree(path)


def _names(path: str | Path | None) -> str:
    """Lines by which a checkpoint is known: its path, and a digest that stays when it is moved; none without a path."""
    metadata = Path(path or "", METADATA)  # it holds a random id
    digest = [sha256(metadata.read_bytes()).hexdigest()] if path and metadata.is_file() else []
    return "\n".join([os.path.realpath(path), *digest]) if path else ""


def _is_same(one: str, other: str) -> bool:
    return one == other or not set(one.splitlines()).isdisjoint(other.splitlines())


def _start_note(job_config: JobConfig) -> Path:
    return Path(job_config.job.dump_folder, "started_from.txt")


def exclusion_note(job_config: JobConfig) -> Path:
    """The file in which a run notes from which checkpoint it has left out what."""
    return Path(job_config.job.dump_folder, "excluded_from_loading.json")


def _noted_exclusions(job_config: JobConfig) -> dict[str, str]:
    note = exclusion_note(job_config)
    try:
        return json.loads(note.read_text()) if note.exists() else {}
    except ValueError as error:
        raise ValueError(
            f"{note} is damaged ({error}), which said from which checkpoint the run has left out what: delete it, "
            f"and checkpoint.exclude_from_loading = {job_config.checkpoint.exclude_from_loading} holds anew"
        ) from error


def note_start(job_config: JobConfig) -> None:
    """Writes down which checkpoint a new run starts from, and what of a checkpoint is left out."""
    folder = Path(job_config.job.dump_folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, noted = checkpoint_to_load(job_config), _noted_exclusions(job_config)
    excluded = job_config.checkpoint.exclude_from_loading if path else []
    now = {state: noted.get(state, _names(path)) for state in excluded}
    _write_or_remove(exclusion_note(job_config), json.dumps(now) if now else None)
    if not complete_steps(checkpoint_folder(job_config)):
        _write_or_remove(_start_note(job_config), _names(job_config.checkpoint.initial_load_path))


def _write_or_remove(file: Path, text: str | None) -> None:
    if text:
        file.write_text(text + "\n")
    else:
        file.unlink(missing_ok=True)
