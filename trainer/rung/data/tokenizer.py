"""Tokenizers: loading, training, and how many bytes each token stands for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rung.errors import UserError

__all__ = ["END_OF_TEXT", "end_of_text_id", "load_tokenizer", "token_byte_lengths", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
"""The token that ends every document, in the tokenizers trained here."""
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|endofsequence|>", "[EOS]")

# The rule of Llama 3's tokenizer: contractions, words with one mark or space before them, numbers in threes, runs of
# marks with their line end, line ends with the blank before them, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a ``tokenizer.json`` so that it encodes text as text: nothing truncated, padded or added, and the name of a
    special token inside a document is ordinary characters. Raises UserError when the file is missing or unreadable."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give the path of a tokenizer.json")
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, eos_token: str | None = None) -> str:
    """Train a byte-level BPE of at most ``vocab_size`` tokens and return its JSON.

    Token 0 is ``eos_token``, by default ``END_OF_TEXT``. The 256 bytes are tokens, so every text can be encoded and
    comes back byte by byte. The same texts, in any order, give the same JSON: merges go by counts, ties by token ids.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size} is too small: the bytes and the end-of-document token make 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token or END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    text: str = tokenizer.to_str(pretty=True)
    return text


def end_of_text_id(tokenizer: Tokenizer, token: str | None = None) -> int:
    """The id of ``token``, or of the first usual name of an end-of-document token that the vocabulary has."""
    for name in _KNOWN_ENDS if token is None else (token,):
        if (found := tokenizer.token_to_id(name)) is not None:
            return int(found)
    special = sorted(added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special)
    wanted = "known end-of-document token" if token is None else repr(token)
    raise UserError(f"the tokenizer has no {wanted}; set eos_token to a special token: {', '.join(special) or 'none'}")


def token_byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """For every token id, the UTF-8 bytes it stands for: [largest id + 1] int64.

    Byte-level BPE exactly (a character of a token is a byte of text); SentencePiece-style vocabularies with "▁" as one
    space and <0xNN> as one byte, so a space that such a tokenizer puts before a document is counted as well. Special
    tokens stand for 0 bytes. Raises UserError for tokenizers that do not give back the text's bytes, such as WordPiece.
    """
    kinds = set(_kinds(json.loads(tokenizer.to_str())))
    byte_level = "ByteLevel" in kinds
    if not byte_level and not kinds & {"Metaspace", "ByteFallback"}:
        raise UserError(
            "bits per byte need a byte-level or SentencePiece-style tokenizer; this one loses bytes of the text"
        )
    added = tokenizer.get_added_tokens_decoder()
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int64)
    for token, index in vocabulary.items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        elif byte_level:
            lengths[index] = len(token)
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("▁", " ").encode())
    return lengths


def _kinds(node: Any) -> Iterator[str]:
    """Every "type" in the pre-tokenizer and the decoder of a tokenizer's JSON, nested ones included."""
    if isinstance(node, dict):
        if "model" in node:
            node = [node.get("pre_tokenizer"), node.get("decoder")]
        else:
            yield str(node.get("type"))
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _kinds(child)
