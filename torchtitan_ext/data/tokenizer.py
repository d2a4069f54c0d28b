"""Load a tokenizer. `byte_tokenizer/` holds one of 256 bytes, then <bos>, <eos> and <pad>.

No text encodes to the last three: every "<" is matched first, as byte 60, because its token isn't `normalized`.
"""

import os
from pathlib import Path

from torchtitan.components.tokenizer import HuggingFaceTokenizer


def load_tokenizer(folder: str | Path, named: str = "", remedy: str = "") -> HuggingFaceTokenizer:
    """The tokenizer in a folder. Raises ValueError, beginning with `named`, if its files don't make one."""
    try:
        return HuggingFaceTokenizer(str(folder))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and panics
        named = named or f"model.hf_assets_path = {str(folder)!r}"
        remedy = remedy or f"give the folder that holds tokenizer.json (a relative path counts from {os.getcwd()})"
        raise ValueError(f"{named}: no tokenizer there ({error}); {remedy}") from error
