"""Validate a job before anything is built: silent loss of state or time, and failures without a clear message."""

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import _registry_model_converter_cls as CONVERTERS
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from torchtitan_ext.console import NOT_A_PATH, is_address
from torchtitan_ext.data.datasets import FILE_BASED, check_data
from torchtitan_ext.data.tokenizer import load_tokenizer
from torchtitan_ext.lighthouse.context_parallel import check_context_parallel
from torchtitan_ext.lighthouse.ulysses import check_heads, chunk_order
from torchtitan_ext.model import LighthouseModelArgs, choose_kernel, flavors

from .resume import checkpoint_problems, data_parallel_degree
from .schedule import optimizer_problems

DEGREES = {
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}


def check_job(job_config: JobConfig, with_start: bool = True, n_ranks: int | None = None) -> tuple[str, list[str]]:
    """The result of `choose_kernel`. Raises one ValueError, the same on all ranks, that lists the job's problems."""
    if problems := job_problems(job_config, n_ranks or launched_ranks(), with_start):
        raise ValueError("this job can't run as configured:\n- " + "\n- ".join(problems))
    return choose_kernel(job_config)


def launched_ranks() -> int | None:
    """The number of launched processes; None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def job_problems(job_config: JobConfig, n_ranks: int | None, with_start: bool = True) -> list[str]:
    """Problems of a launch on `n_ranks` processes, None if unknown; `with_start`, of the checkpoint to load too."""
    if problems := list(_value_problems(job_config)):
        return problems
    if not hasattr(job_config, "lighthouse"):
        module = job_config.job.custom_config_module
        return [f"job.custom_config_module = {module!r}: no [lighthouse]; set it to 'torchtitan_ext.model.settings'"]
    rules = _number_problems, _model_problems, _attention_problems, optimizer_problems, _data_problems, _wandb_problems
    problems, dims = [problem for rule in rules for problem in rule(job_config)], None
    if n_ranks is not None:
        try:
            dims = parallel_dims(job_config, n_ranks)
            problems += _batch_problems(job_config, dims)
        except ValueError as error:
            problems.append(str(error))
    return [*problems, *checkpoint_problems(job_config, dims, with_start)]


def _value_problems(settings: Any, section: str = "") -> Iterator[str]:
    """Fields of a dataclass and of nested ones with a value of the wrong type, or a path that is an address."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        name, value, hint = f"{section}{field.name}", getattr(settings, field.name), hints[field.name]
        if is_dataclass(value):
            yield from _value_problems(value, f"{name}.")
            continue
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            kind = hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
            why = f" ({error})" if isinstance(value, list) else ""
            yield f"{name} = {value!r}: must be of type {kind}{why}"
        may_be_address = field.name == "dataset_path" and str(settings.dataset).lower() in FILE_BASED
        if isinstance(value, str) and name.endswith(("folder", "path")) and is_address(value) and not may_be_address:
            yield f"{name} = {value!r} {NOT_A_PATH}"


class _Dims(ParallelDims):
    """torchtitan's, but FSDP wraps a single shard too, as later versions do: its mixed precision rounds as on several
    shards, takes less time and memory than autocast, and is the only one for tensor- and pipeline-parallel ranks."""

    def _mesh_exist(self, name: str, degree: int) -> bool:
        return super()._mesh_exist(name, degree) or (name == "fsdp" and self.dp_replicate == 1)

    @property
    def fsdp_enabled(self) -> bool:
        return super().fsdp_enabled or self.dp_replicate == 1


def parallel_dims(job_config: JobConfig, n_ranks: int) -> ParallelDims:
    """torchtitan's dimensions of `n_ranks` processes. Raises ValueError if the degrees don't fit."""
    parallelism = job_config.parallelism
    degrees = {name: getattr(parallelism, field) for name, field in DEGREES.items()}
    experts = {"ep": parallelism.expert_parallel_degree, "etp": parallelism.expert_tensor_parallel_degree}
    try:
        return _Dims(**degrees, **experts, world_size=n_ranks)
    except AssertionError as error:
        product = " x ".join(f"{name} {degree}" for name, degree in degrees.items())
        remedy = "parallelism.data_parallel_shard_degree = -1 takes what the other degrees leave"
        raise ValueError(f"[parallelism] {product}: must be the number of ranks, {n_ranks}; {remedy}") from error


def sequences_at_once(job_config: JobConfig, dims: ParallelDims) -> int:
    """Sequences in one microbatch of all ranks; a step may accumulate several."""
    return job_config.training.local_batch_size * data_parallel_degree(dims)


def _batch_problems(job_config: JobConfig, dims: ParallelDims) -> Iterator[str]:
    wanted, at_once = job_config.training.global_batch_size, sequences_at_once(job_config, dims)
    if at_once > 0 and wanted >= 0 and (wanted == 0 or wanted % at_once):
        rule = f"must be a positive multiple of training.local_batch_size x data-parallel degree = {at_once}"
        yield f"training.global_batch_size = {wanted}: {rule}"


def data_sections(job_config: JobConfig) -> Iterator[tuple[str, Training | Validation]]:
    yield "training", job_config.training
    if job_config.validation.enable:
        yield "validation", job_config.validation


def _number_problems(job_config: JobConfig) -> Iterator[str]:
    """Numbers that training divides by, allocates or counts to."""
    positive = ["metrics.log_freq", "training.seq_len", "training.local_batch_size", "training.steps"]
    if (norm := job_config.training.max_norm) <= 0:
        yield f"training.max_norm = {norm}: gradients are scaled down to it; give a number above 0"
    if job_config.validation.enable:
        positive += ["validation.seq_len", "validation.local_batch_size", "validation.freq"]
        table, longest = job_config.training.seq_len, job_config.validation.seq_len
        if longest > table:
            yield f"validation.seq_len = {longest}: positions end at training.seq_len = {table}; use that at most"
    if job_config.checkpoint.enable:
        positive.append("checkpoint.interval")
    positive += [f"rope.{name}" for name, value in vars(job_config.rope).items() if value is not None]
    for field in positive:
        if (number := attrgetter(field)(job_config)) < 1:
            yield f"{field} = {number}: must be 1 or more"


def _model_problems(job_config: JobConfig) -> Iterator[str]:
    flavor, dense_layers = job_config.model.flavor, job_config.lighthouse.dense_layers
    args, parallelism = flavors.get(flavor), job_config.parallelism
    if not args:
        yield f"model.flavor = {flavor!r} is unknown: choose one of {', '.join(flavors)}"
    elif bad := [layer for layer in dense_layers or () if not 0 <= layer < args.n_layers]:
        last = args.n_layers - 1
        yield f"lighthouse.dense_layers = {dense_layers}: {bad} out of range, {flavor} has layers 0 to {last}"
    if unknown := [name for name in job_config.model.converters if name not in CONVERTERS]:
        yield f"model.converters = {unknown}: unknown; choose from {', '.join(CONVERTERS)}"
    if job_config.quantize.linear.float8.enable_fsdp_float8_all_gather:
        reason = "checkpoints would hold torchao's tensors, which no stage without it, export or niah can read"
        yield f"quantize.linear.float8.enable_fsdp_float8_all_gather = true: {reason}; set it to false"
    tied = args and args.enable_weight_tying
    if tied or job_config.loss.fuse_output:
        legal: dict[str, tuple] = {"tensor_parallel_degree": (1,), "pipeline_parallel_degree": (1,)}
        reason, remedy = "the flavor's embeddings are also", ""
        if not tied:
            legal["fsdp_reshard_after_forward"] = ("default", "never")
            reason, remedy = "loss.fuse_output needs all of", ", or set loss.fuse_output to false"
        for field, values in legal.items():
            if (value := getattr(parallelism, field)) not in values:
                use = " or ".join(map(repr, values)) + remedy
                yield f"parallelism.{field} = {value!r}: {reason} the output projection; use {use}"
    degree, tensor_parallel = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    n_kv_heads = (args.n_kv_heads or args.n_heads) if args else 0
    if tensor_parallel > 0 and n_kv_heads % tensor_parallel:
        yield f"parallelism.tensor_parallel_degree = {tensor_parallel}: must divide {flavor}'s {n_kv_heads} KV heads"
    elif args and degree > 1 and tensor_parallel > 0 and parallelism.context_parallel_rotate_method == "allgather":
        try:
            check_heads(args.n_heads // tensor_parallel, n_kv_heads // tensor_parallel, degree)
        except ValueError as error:
            remedy = "or set parallelism.context_parallel_rotate_method to 'alltoall', torch's ring attention"
            yield f"parallelism.context_parallel_degree = {degree}: {error}; {remedy}"


def _attention_problems(job_config: JobConfig) -> Iterator[str]:
    compiled, parallelism, lighthouse = job_config.compile, job_config.parallelism, job_config.lighthouse
    degree, balancer = parallelism.context_parallel_degree, parallelism.context_parallel_load_balancer
    ring = degree > 1 and parallelism.context_parallel_rotate_method == "alltoall"
    if ring and balancer is None and compiled.enable and "model" in compiled.components:
        reason = "without a load balancer ranks compile different graphs, and from torch 2.14 on they wait forever"
        remedy = "set parallelism.context_parallel_load_balancer to 'headtail', or compile.enable to false"
        yield f"parallelism.context_parallel_rotate_method = 'alltoall': {reason}; {remedy}"
    for name, section in data_sections(job_config):
        seq_len = section.seq_len
        try:
            if lighthouse.enable:
                check_context_parallel(lighthouse, seq_len, degree, balancer is not None)
            elif degree > 1 and seq_len % (n_chunks := len(chunk_order(degree, balancer is not None))):
                yield f"{name}.seq_len = {seq_len}: ranks share it in {n_chunks} chunks; use a multiple of that"
        except ValueError as error:
            yield f"[lighthouse] on [{name}]: {error}"


def _wandb_problems(job_config: JobConfig) -> Iterator[str]:
    """A missing key on this machine; a launch finds what else keeps W&B from starting."""
    if not job_config.metrics.enable_wandb or os.environ.get("WANDB_MODE", "online") != "online":
        return
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = netrc.is_file() and "login user" in " ".join(netrc.read_text().split())  # as `wandb login` leaves it
    if not logged_in and not os.environ.keys() & {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"}:
        yield "metrics.enable_wandb = true: W&B has no API key here; call `wandb login`, or set WANDB_MODE=offline"


def _data_problems(job_config: JobConfig) -> Iterator[str]:
    path, args = job_config.model.hf_assets_path, flavors.get(job_config.model.flavor)
    try:
        if problem := _tokenizer_problem(load_tokenizer(path), args):
            yield f"model.hf_assets_path = {path!r}: {problem}"
    except ValueError as error:
        yield str(error)
    for name, section in data_sections(job_config):
        if (workers := section.dataloader.num_workers) not in (0, 1):
            yield f"{name}.dataloader.num_workers = {workers}: several would read the same files; use 0 or 1"
        try:
            check_data(job_config, name)
        except ValueError as error:
            yield str(error)


def _tokenizer_problem(tokenizer: HuggingFaceTokenizer, args: LighthouseModelArgs | None) -> str | None:
    library = tokenizer.tokenizer
    for change in ("truncation", "padding"):
        if setting := getattr(library, change):
            return f"its tokenizer.json sets {change}, {setting}, which would change every document; set it to null"
    # Ids may have gaps; beyond the embeddings a GPU fails in the middle of a step.
    last_id = max(tokenizer.get_vocab().values(), default=-1)
    if args and last_id >= args.vocab_size:
        beyond = f"beyond the {args.vocab_size} embeddings of model.flavor"
        return f"its token ids go to {last_id}, {beyond}; choose a larger flavor or a smaller tokenizer"
    if (kind := type(library.model).__name__) in ("WordLevel", "WordPiece") and not library.pre_tokenizer:
        return f"its {kind} model has no pre-tokenizer, so a document would be one token; give a whole tokenizer.json"
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        remedy = "name a bos_token or eos_token in tokenizer_config.json there"
        return f"documents would run into each other, as no token begins or ends one; {remedy}"
    library.encode_special_tokens = True  # as documents are encoded
    unk_token = (tokenizer.config or {}).get("unk_token")  # any text may become it
    spelled = [
        token.content
        for index, token in library.get_added_tokens_decoder().items()
        if token.special
        if token.content != unk_token or index in (tokenizer.bos_id, tokenizer.eos_id)
        if index in library.encode(token.content, add_special_tokens=False).ids
    ]
    if not spelled:
        return None
    remedy = "lower its score in tokenizer.json below all others', or use a BPE tokenizer"
    return f"a document that spells {' or '.join(spelled)} would get that control token from its {kind} model; {remedy}"
