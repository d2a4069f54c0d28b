"""What would stop a job later, or lose its state in silence, found before anything is built."""

import os
import re
import shlex
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch._dynamo import list_backends
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, BytesStorageMetadata
from torchtitan.components.checkpoint import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    TRAIN_STATE,
)
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

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
    problems = [
        *_number_problems(job_config),
        *_model_problems(job_config),
        *_optimizer_problems(job_config),
        *_data_problems(job_config),
    ]
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


def _number_problems(job_config: JobConfig) -> Iterator[str]:
    """Numbers that training divides by, counts to or allocates, and would trip over."""
    smallest = {"training.steps": 0, "training.gc_freq": 1, "metrics.log_freq": 1}
    for name, _ in _data_sections(job_config):
        smallest |= {f"{name}.seq_len": 1, f"{name}.local_batch_size": 1}
    if job_config.validation.enable:
        smallest["validation.freq"] = 1
    if job_config.checkpoint.enable:
        smallest["checkpoint.interval"] = 1
    for field, least in smallest.items():
        if (number := attrgetter(field)(job_config)) < least:
            yield f"{field} = {number}: must be {least} or more"
    if job_config.checkpoint.enable and job_config.checkpoint.keep_latest_k == 1:
        yield (
            "checkpoint.keep_latest_k = 1: the one would be deleted while the next may not be complete; "
            "use 2 or more, or 0 to keep all"
        )
    table, longest = job_config.training.seq_len, job_config.validation.seq_len
    if job_config.validation.enable and longest > table:
        yield (
            f"validation.seq_len = {longest}: the model's positions end at training.seq_len = {table}; "
            "use that at most"
        )
    profiling = job_config.profiling
    profiled = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < profiled:
        yield (
            f"profiling.profile_freq = {profiling.profile_freq}: must be profiler_warmup + profiler_active = "
            f"{profiled} or more"
        )


def _optimizer_problems(job_config: JobConfig) -> Iterator[str]:
    """What torchtitan's own builders say, of a model of one layer."""
    try:
        optimizers = build_optimizers([nn.Linear(1, 1)], job_config.optimizer, None)
        build_lr_schedulers(optimizers, job_config.lr_scheduler, max(0, job_config.training.steps))
    except Exception as error:  # of any kind
        yield f"[optimizer] and [lr_scheduler]: training can't start with these ({error}); correct them"


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
    compiled = job_config.compile
    if mode == "memory_budget" and not (compiled.enable and "model" in compiled.components):
        yield (
            "activation_checkpoint.mode = 'memory_budget': the compiler keeps to the budget; set compile.enable to "
            "true, with 'model' in compile.components"
        )
    if compiled.enable and compiled.backend not in (backends := list_backends(exclude_tags=())):
        yield f"compile.backend = {compiled.backend!r}: choose one of {', '.join(backends)}"
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


def build_tokenizer(job_config: JobConfig) -> Any:
    """torchtitan's tokenizer of this job. Raises ValueError where its files don't make one."""
    try:
        return build_hf_tokenizer(job_config)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and panics
        raise ValueError(str(error)) from error


def _data_problems(job_config: JobConfig) -> Iterator[str]:
    path, flavor = job_config.model.hf_assets_path, job_config.model.flavor
    try:
        tokenizer = build_tokenizer(job_config)
        # Ids may leave gaps, and beyond the embeddings a GPU fails amid a step.
        ids = tokenizer.get_vocab().values()
        vocab_size = max(ids, default=-1) + 1
        if flavor in flavors and vocab_size > flavors[flavor].vocab_size:
            yield (
                f"model.hf_assets_path = {path!r}: its token ids go to {vocab_size - 1}, beyond the "
                f"{flavors[flavor].vocab_size} embeddings of model.flavor = {flavor!r}; "
                "choose a larger flavor or a smaller tokenizer"
            )
        for change in ("truncation", "padding"):
            if setting := getattr(tokenizer.tokenizer, change):
                yield (
                    f"model.hf_assets_path = {path!r}: its tokenizer.json sets {change}, {setting}, which would change "
                    "every document; set it to null there"
                )
    except ValueError as error:
        yield (
            f"model.hf_assets_path = {path!r}: no tokenizer there ({error}); "
            "give the folder that holds tokenizer.json"
        )
    for name, section in _data_sections(job_config):
        if (workers := section.dataloader.num_workers) not in (0, 1):
            yield (
                f"{name}.dataloader.num_workers = {workers}: use 0 or 1, because several workers would read the "
                "same files, and resume in another order"
            )
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
        if checkpoint.initial_load_in_hf:
            yield from _hf_problems(job_config)
        elif initial:
            yield from _state_problems(
                job_config, dims, "checkpoint.initial_load_path", Path(initial)
            )
            if step_of(initial) >= job_config.training.steps:
                yield (
                    f"training.steps = {job_config.training.steps}: {initial} has done as many; "
                    "set the number of steps counted from the start of the first stage"
                )
        elif checkpoint.load_step != -1:
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


def _check_objects(path: Path, metadata: Metadata, excluded: list[str]) -> None:
    """Loads what is no tensor, as torch will, because here an error can name it. Raises ValueError."""
    for key, file, saved in _objects(path, metadata):
        if key.split(".")[0] in excluded:
            continue
        try:
            value = load_object(saved)
            if key.startswith(f"{DATALOADER}.dp_rank_"):
                load_plain(value)
        except Exception as error:  # whatever the bytes happen to spell
            raise ValueError(
                f"{key} in {file} is damaged or was made to run code ({error})"
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


def data_position(job_config: JobConfig, rank: int) -> dict[str, Any]:
    """Where a data-parallel rank goes on in the data, as its loader takes it; empty from the data's start."""
    path, excluded = checkpoint_to_load(job_config), job_config.checkpoint.exclude_from_loading
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
