"""Import every module of the package, then the module that may change things; print what each step changed."""

import json
import os
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path

import torch.distributed.checkpoint
import torchtitan.train  # noqa: F401  (its classes are compared too)
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list
from torchtitan.protocols import train_spec

import torchtitan_ext


def state():
    """All attributes of torch's and torchtitan's modules and classes, and what else a module of ours could change."""
    found = {"os.environ": dict(os.environ), "sys.path": [*sys.path], "SIGTERM": signal.getsignal(signal.SIGTERM)}
    found |= {name: flag() for name, flag in vars(torch.backends.cuda).items() if name.endswith("_enabled")}
    found |= {"DATASETS": [*DATASETS], "_op_sac_save_list": {*_op_sac_save_list}, "threads": torch.get_num_threads()}
    found["train specs"] = [*train_spec._extra_train_specs]
    found |= {"safe globals": {*torch.serialization.get_safe_globals()}, "dtype": torch.get_default_dtype()}
    found["matmul precision"] = torch.get_float32_matmul_precision()
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] in ("torch", "torchtitan"):
            for key, value in [*vars(module).items()]:
                found[f"{name}.{key}"] = id(value)
                if isinstance(value, type) and value.__module__ == name:
                    found |= {f"{name}.{key}.{attribute}": id(x) for attribute, x in [*vars(value).items()]}
    return found


def changes_by(step):
    before = state()
    step()
    after = state()
    return sorted(key for key in before if before[key] != after.get(key))


root = Path(torchtitan_ext.__file__).parent
modules = [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("*.py")]
modules.remove("torchtitan_ext.register")
warnings.simplefilter("ignore")
report = {
    "imports": changes_by(lambda: [*map(import_module, modules)]),
    "register": changes_by(lambda: import_module("torchtitan_ext.register")),
    "again": changes_by(lambda: torchtitan_ext.register.register()),
    "modules": modules,
}
print(json.dumps(report))
