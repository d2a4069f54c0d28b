"""The byte-level tokenizer whose files lie in `byte_tokenizer/`: 256 bytes, then <bos>, <eos> and <pad>."""

import json
import os
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torchtitan.components.tokenizer import HuggingFaceTokenizer

SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def load_tokenizer(folder: str | Path, named: str = "", remedy: str = "") -> HuggingFaceTokenizer:
    """The tokenizer in a folder. Raises ValueError, with what `named` the folder, where its files don't make one."""
    try:
        return HuggingFaceTokenizer(str(folder))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and panics
        named = named or f"model.hf_assets_path = {str(folder)!r}"
        remedy = remedy or f"give the folder that holds tokenizer.json (a relative path counts from {os.getcwd()})"
        raise ValueError(f"{named}: no tokenizer there ({error}); {remedy}") from error


def save_byte_tokenizer(folder: Path) -> None:
    """Writes the tokenizer.json and tokenizer_config.json that torchtitan and transformers load.

    Ids 0..255 are the bytes of the UTF-8 text; SPECIAL_TOKENS follow, and no text encodes to them: every "<" is
    matched first, as byte 60, because its token isn't `normalized`, so a document that spells "<eos>" is five bytes.
    """
    # ByteLevel writes a printable Latin-1 byte as that character, the others in order as what remains of the alphabet.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(char): char for char in alphabet if ord(char) < 256}
    others = (char for char in alphabet if ord(char) >= 256)
    vocab = {printable.get(byte) or next(others): byte for byte in range(256)}

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<", normalized=False)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=True) for token in SPECIAL_TOKENS.values()])
    tokenizer.save(str(folder / "tokenizer.json"))

    # Spelled out, because both loaders take a bare string for a token that isn't normalized.
    flags = {"normalized": True, "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, token in SPECIAL_TOKENS.items():
        config[name] = {"__type": "AddedToken", "content": token} | flags
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
