"""Import this to train with stock torchtitan: `experimental.custom_import = "torchtitan_ext.register"`.

Registers `llama3_lighthouse` and the data sets. No other module has side effects when imported.

    torchrun --nproc_per_node=8 -m torchtitan.train --job.config_file configs/530m/stage1.toml \\
        --job.custom_config_module torchtitan_ext.model.settings --experimental.custom_import torchtitan_ext.register

torchtitan's trainer does not know `extends`, `training.skip_nonfinite_steps` and `parallelism.fsdp_no_sync`, and does
not divide the gradients of pipeline parallelism by the number of tokens.
"""

from .train.spec import register

register()
