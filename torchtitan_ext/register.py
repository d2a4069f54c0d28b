"""Import this to train with stock torchtitan: `experimental.custom_import = "torchtitan_ext.register"`.

Registers `llama3_lighthouse` and the data sets. Everything else of this package changes nothing when imported.
"""

from .train.spec import register

register()
