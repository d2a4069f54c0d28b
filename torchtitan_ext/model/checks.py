"""What would stop a job later, or lose its state in silence, found before anything is built."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, BytesStorageMetadata
from torchtitan.components.checkpoint import DATALOADER, LR_SCHEDULER, OPTIMIZER, TRAIN_STATE
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.distributed import ParallelDims

from torchtitan_ext.data import check_dataset
from torchtitan_ext.lighthouse.context_parallel import check_context_parallel
from torchtitan_ext.unpickling import load_object, load_plain

from .args import flavors
from .model import LighthouseTransformer


def check_job(job_config: JobConfig) -> None:
    """Raise one ValueError that lists every problem of this launch: field, value and remedy.

    Every rank reads the same files and comes to the same answer. Rank 0 also notes which
    checkpoint a new run starts from, so that a later launch can tell whether it continues that run.
    """
    n_ranks = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    problems = job_problems(job_config, n_ranks)
    if problems:
        raise ValueError("this job can't run as configured:\n- " + "\n- ".join(problems))
    if job_config.checkpoint.enable and int(os.environ.get("RANK", 0)) == 0:
        _note_start(job_config)


def job_problems(job_config: JobConfig, n_ranks: int | None) -> list[str]:
    """Every problem of a launch on `n_ranks` processes; None leaves out what depends on their number."""
    if not hasattr(job_config, "lighthouse"):
        return [
            f"job.custom_config_module = {job_config.job.custom_config_module!r}: "
            "set it to 'torchtitan_ext.model.config', which adds the [lighthouse] section"
        ]
    problems = [*_model_problems(job_config), *_data_problems(job_config)]
    dims = None
    if n_ranks is not None:
        try:
            dims = parallel_dims(job_config, n_ranks)
        except ValueError as error:
            problems.append(str(error))
        else:
            problems += _batch_problems(job_config, dims)
    return [*problems, *_checkpoint_problems(job_config, dims)]


def parallel_dims(job_config: JobConfig, n_ranks: int) -> ParallelDims:
    """How `n_ranks` processes share the work, as torchtitan will have it. Raises ValueError if they can't."""
    degrees = {
        name: getattr(job_config.parallelism, f"{field}_degree")
        for name, field in {
            "dp_replicate": "data_parallel_replicate",
            "dp_shard": "data_parallel_shard",
            "cp": "context_parallel",
            "tp": "tensor_parallel",
            "pp": "pipeline_parallel",
            "ep": "expert_parallel",
            "etp": "expert_tensor_parallel",
        }.items()
    }
    try:
        return ParallelDims(**degrees, world_size=n_ranks)
    except (AssertionError, ZeroDivisionError) as error:
        product = " x ".join(f"{name} {degrees[name]}" for name in list(degrees)[:5])
        raise ValueError(
            f"[parallelism] {product}: the degrees' product must be the number of ranks, {n_ranks}; "
            "parallelism.data_parallel_shard_degree = -1 takes what the other degrees leave"
        ) from error


def _batch_problems(job_config: JobConfig, dims: ParallelDims) -> Iterator[str]:
    training, degree = job_config.training, dims.dp_replicate * dims.dp_shard
    at_once, wanted = training.local_batch_size * degree, training.global_batch_size
    if wanted == 0 or (wanted > 0 and wanted % at_once):
        below = wanted // at_once * at_once
        yield (
            f"training.global_batch_size = {wanted}: must be a multiple of training.local_batch_size x "
            f"data-parallel degree = {training.local_batch_size} x {degree} = {at_once}; nearest: "
            + (f"{below} or {below + at_once}" if below else f"{at_once}")
        )
    for name, section in _data_sections(job_config):
        if section.seq_len % dims.seq_len_divisor:
            yield (
                f"{name}.seq_len = {section.seq_len}: must be a multiple of {dims.seq_len_divisor} for a "
                f"context-parallel degree of {dims.cp} and a tensor-parallel degree of {dims.tp}"
            )


def _model_problems(job_config: JobConfig) -> Iterator[str]:
    flavor, lighthouse = job_config.model.flavor, job_config.lighthouse
    if flavor not in flavors:
        yield f"model.flavor = {flavor!r} is unknown: choose one of {', '.join(flavors)}"
    else:
        n_layers = flavors[flavor].n_layers
        bad = [i for i in lighthouse.dense_layers or () if not 0 <= i < n_layers]
        if bad:
            yield (
                f"lighthouse.dense_layers = {lighthouse.dense_layers}: {bad} out of range, "
                f"flavor {flavor} has layers 0 to {n_layers - 1}"
            )
    yield from _loss_problems(job_config)
    mode = job_config.activation_checkpoint.mode
    option = job_config.activation_checkpoint.selective_ac_option
    if mode not in (modes := ("none", "selective", "full", "memory_budget")):
        yield f"activation_checkpoint.mode = {mode!r}: choose one of {', '.join(modes)}"
    elif mode == "selective" and option != "op" and not option.isdecimal():
        yield (
            f"activation_checkpoint.selective_ac_option = {option!r}: use 'op', or a number n to "
            "recompute every n-th block"
        )
    degree = job_config.parallelism.context_parallel_degree
    balancer = job_config.parallelism.context_parallel_load_balancer
    if degree > 1 and balancer not in ("headtail", None):
        yield (
            f"parallelism.context_parallel_load_balancer = {balancer!r}: attention is 'sdpa', for which "
            "torchtitan has 'headtail' alone; use that or None"
        )
    if not lighthouse.enable:
        return
    for name, section in _data_sections(job_config):
        try:
            if degree > 1:
                check_context_parallel(lighthouse, section.seq_len, degree, balancer is not None)
            else:
                lighthouse.check_seq_len(section.seq_len)
        except ValueError as error:
            yield f"[lighthouse] on [{name}]: {error}"
    schedule = job_config.lr_scheduler
    if schedule.decay_ratio != 0.0 and schedule.total_steps is None:
        yield (
            f"lr_scheduler.decay_ratio = {schedule.decay_ratio}: the rate would decay to the end of this "
            "stage and jump back in the dense one; set it to 0.0, or lr_scheduler.total_steps to the steps "
            "of both stages"
        )


def _data_sections(job_config: JobConfig) -> Iterator[tuple[str, Training | Validation]]:
    """The sections that say what sequences this job reads, by name."""
    yield "training", job_config.training
    if job_config.validation.enable:
        yield "validation", job_config.validation


def _loss_problems(job_config: JobConfig) -> Iterator[str]:
    if not job_config.loss.fuse_output:
        return
    dims = job_config.parallelism
    for field in ("tensor_parallel_degree", "pipeline_parallel_degree"):
        if getattr(dims, field) > 1:
            yield (
                f"parallelism.{field} = {getattr(dims, field)}: loss.fuse_output needs the whole output "
                "projection beside the loss; set one of the two back (1, or false)"
            )
    if dims.fsdp_reshard_after_forward == "always":
        yield (
            "parallelism.fsdp_reshard_after_forward = 'always': the output projection would be gone when "
            "the loss needs it; use 'default' or 'never', or set loss.fuse_output to false"
        )


def _data_problems(job_config: JobConfig) -> Iterator[str]:
    path, flavor = job_config.model.hf_assets_path, job_config.model.flavor
    try:
        vocab_size = build_hf_tokenizer(job_config).get_vocab_size()
        if flavor in flavors and vocab_size > flavors[flavor].vocab_size:
            yield (
                f"model.hf_assets_path = {path!r}: its {vocab_size} tokens exceed the "
                f"{flavors[flavor].vocab_size} embeddings of model.flavor = {flavor!r}; "
                "choose a larger flavor or a smaller tokenizer"
            )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        yield (
            f"model.hf_assets_path = {path!r}: no tokenizer there ({error}); "
            "give the folder that holds tokenizer.json"
        )
    for name, section in _data_sections(job_config):
        try:
            check_dataset(section.dataset, section.dataset_path)
        except ValueError as error:
            yield str(error).replace("training.dataset", f"{name}.dataset")


def _checkpoint_problems(job_config: JobConfig, dims: ParallelDims | None) -> Iterator[str]:
    checkpoint = job_config.checkpoint
    folder, initial = _folder(job_config), checkpoint.initial_load_path
    if not checkpoint.enable:
        if initial:
            yield (
                f"checkpoint.initial_load_path = {initial!r} with checkpoint.enable = false: "
                "nothing would be loaded; set checkpoint.enable to true or drop the path"
            )
        return
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
        if initial and not checkpoint.initial_load_in_hf:
            yield from _state_problems(
                job_config, dims, "checkpoint.initial_load_path", Path(initial)
            )
            if step_of(initial) >= job_config.training.steps:
                yield (
                    f"training.steps = {job_config.training.steps}: {initial} has done as many; "
                    "set the number of steps counted from the start of the first stage"
                )
        elif not initial and checkpoint.load_step != -1:
            yield (
                f"checkpoint.load_step = {checkpoint.load_step}: {folder} doesn't exist, so there "
                "is nothing to load; set it to -1 to start from scratch"
            )
        return

    # From here on torchtitan loads from the run's own folder and ignores initial_load_path.
    yield from _mistaken_folders(folder)
    steps = complete_steps(folder)
    if initial and not steps:
        yield (
            f"checkpoint.initial_load_path = {initial!r} would be ignored, because the run's own "
            f"folder {folder} exists, without a complete checkpoint: delete {folder}"
        )
        return
    started_from = _started_from(job_config)
    if steps and started_from != _resolved(initial):
        yield (
            f"checkpoint.initial_load_path = {initial!r} would be ignored, because {folder} holds "
            f"a run that started from {started_from or 'scratch'}: to continue that one, "
            + (f"set it to {started_from}" if started_from else "drop the path")
            + f"; to start anew, choose another job.dump_folder or delete {folder}"
        )
        return
    step = _step_to_load(job_config, steps)
    if step not in (-1, *steps):
        yield (
            f"checkpoint.load_step = {step}: {folder} holds no complete checkpoint of that step, "
            f"only of {sorted(steps)}; choose one of them, or -1 for the newest"
        )
    elif step > job_config.training.steps:
        yield (
            f"training.steps = {job_config.training.steps}: {folder} holds a run that is past it, at "
            f"step {step}; raise it, choose another job.dump_folder or delete {folder}"
        )
    elif step != -1:
        yield from _state_problems(job_config, dims, "job.dump_folder", folder / f"step-{step}")


def _mistaken_folders(folder: Path) -> Iterator[str]:
    """What torchtitan takes for a checkpoint of the run's own, and couldn't load."""
    steps = complete_steps(folder)
    for path in sorted(folder.iterdir()):
        found = re.search(r"step-(\d+)", path.name)
        has_index = [
            (path / name).is_file() for name in (".metadata", "model.safetensors.index.json")
        ]
        if found and any(has_index) and path.name not in {f"step-{step}" for step in steps}:
            yield (
                f"{path}: torchtitan takes this folder for the run's checkpoint of step {int(found[1])}, which "
                f"it is not; move it out of {folder}"
            )


def _state_problems(
    job_config: JobConfig, dims: ParallelDims | None, field: str, path: Path
) -> Iterator[str]:
    """What the checkpoint at `path`, which `field` leads to, lacks to be resumed by this launch."""
    excluded = job_config.checkpoint.exclude_from_loading
    try:
        metadata = complete_metadata(path)
        _check_objects(path, metadata, excluded)
    except ValueError as error:
        yield f"{field}: {error}{_way_on(job_config, field, path)}"
        return
    saved = metadata.state_dict_metadata
    if job_config.model.flavor in flavors:
        yield from _weight_problems(job_config, field, path, saved)
    if path == _folder(job_config) / "step-0":
        return  # torchtitan's seed checkpoint: weights alone
    wanted = {OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE}.difference(excluded)
    missing = sorted(wanted - {key.split(".")[0] for key in saved})
    if missing:
        yield (
            f"{field}: {path} holds no {', '.join(missing)}, so training can't go on from it; "
            "use a checkpoint saved with checkpoint.last_save_model_only = false"
        )
    if dims and DATALOADER in wanted and DATALOADER not in missing:
        degree = dims.dp_replicate * dims.dp_shard
        saved_degree = sum(key.startswith(f"{DATALOADER}.dp_rank_") for key in saved)
        if degree != saved_degree:
            yield (
                f"data-parallel degree = {degree}: {path} was saved by a degree of {saved_degree}, and "
                f"its data position holds for no other; launch as many data-parallel ranks (or start "
                "the data over on purpose: checkpoint.exclude_from_loading = ['dataloader'])"
            )


def _check_objects(path: Path, metadata: Metadata, excluded: list[str]) -> None:
    """Loads what is no tensor, as torch will, because here an error can name it. Raises ValueError."""
    by_place = sorted(
        metadata.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset)
    )
    for index, stored in by_place:
        is_object = isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
        if not is_object or index.fqn.split(".")[0] in excluded:
            continue
        with open(path / stored.relative_path, "rb") as file:
            file.seek(stored.offset)
            saved = file.read(stored.length)
        try:
            value = load_object(saved)
            if index.fqn.startswith(f"{DATALOADER}.dp_rank_"):
                load_plain(value)
        except Exception as error:  # whatever the bytes happen to spell
            raise ValueError(
                f"{index.fqn} in {path / stored.relative_path} is damaged or was made to run code ({error})"
            ) from error


def _way_on(job_config: JobConfig, field: str, path: Path) -> str:
    """How to go on where the checkpoint at `path`, which `field` leads to, can't be loaded."""
    folder = path.parent
    older = (folder / f"step-{step}" for step in sorted(complete_steps(folder), reverse=True))
    newest = next((other for other in older if other != path and _is_complete(other)), None)
    if field != "job.dump_folder":
        if newest:
            return f"; the newest complete one beside it is {newest}: to start from that, set {field} to it"
        return ""
    if newest is None:
        return f"; no other in {folder} is complete: to start anew, choose another job.dump_folder"
    this_launch = f"--checkpoint.load_step {step_of(newest)}"
    if job_config.checkpoint.load_step != -1:
        return f"; the newest complete one is {newest.name}: {this_launch}"
    aside = shlex.join(["mv", str(path), str(folder.with_name(f"broken-{path.name}"))])
    return (
        f"; the newest complete one is {newest.name}: to go on from that, now and in every later launch, put "
        f"the broken one aside ({aside}) and launch again; for one launch alone, add {this_launch}"
    )


def _weight_problems(
    job_config: JobConfig, field: str, path: Path, saved: dict[str, STORAGE_TYPES]
) -> Iterator[str]:
    with torch.device("meta"):
        weights = LighthouseTransformer(flavors[job_config.model.flavor]).state_dict()
    other = [
        f"{name} is {list(size)} there and {list(weight.shape)} here"
        if size
        else f"{name} is not there"
        for name, weight in weights.items()
        if (size := getattr(saved.get(name), "size", None)) != weight.shape
    ]
    if other:
        yield (
            f"model.flavor = {job_config.model.flavor!r}: {path}, which {field} leads to, is of another "
            f"model ({len(other)} of {len(weights)} weights: {other[0]}); use the flavor that it was trained with"
        )


def _folder(job_config: JobConfig) -> Path:
    return Path(job_config.job.dump_folder, job_config.checkpoint.folder)


def checkpoint_to_load(job_config: JobConfig) -> Path | None:
    """What a launch without problems starts from; None from scratch."""
    checkpoint, folder = job_config.checkpoint, _folder(job_config)
    if not checkpoint.enable:
        return None
    if folder.exists():
        step = _step_to_load(job_config, complete_steps(folder))
        return None if step == -1 else folder / f"step-{step}"
    return Path(checkpoint.initial_load_path) if checkpoint.initial_load_path else None


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


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that torchtitan would consider: the metadata is written last."""
    names = [path.parent.name for path in folder.glob("step-*/.metadata")]
    return [int(name[5:]) for name in names if re.fullmatch(r"step-(0|[1-9]\d*)", name)]


def _resolved(path: str | None) -> str | None:
    return os.path.realpath(path) if path else None


def _start_note(job_config: JobConfig) -> Path:
    return Path(job_config.job.dump_folder, "started_from.txt")


def _started_from(job_config: JobConfig) -> str | None:
    note = _start_note(job_config)
    return note.read_text().strip() if note.exists() else None


def _note_start(job_config: JobConfig) -> None:
    if complete_steps(_folder(job_config)):
        return
    note, initial = _start_note(job_config), _resolved(job_config.checkpoint.initial_load_path)
    if initial:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(initial + "\n")
    else:
        note.unlink(missing_ok=True)
