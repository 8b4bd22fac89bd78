"""Tokenizers: the same bytes every time, text back byte for byte, and the bytes that every token stands for."""

import os
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rung.data.tokenizer import end_of_text_id, load_tokenizer, token_byte_lengths, train_tokenizer
from rung.errors import UserError

TEXTS = [f"def function_{i}(x):\n    return x ** {i * i}  # größer 漢字 🎉\r\n\n\n" * (i % 7) for i in range(300)]
HARD = ["", " ", "\0\x7f\ud7ff\uffff", "<|endoftext|> is text", "e\u0301 ﬁ Å", "\t\t\n   \r\n" * 9, "a" * 1000, "🎉漢ß"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, 400))
    return load_tokenizer(path)


def test_training_gives_the_same_bytes_in_every_process():
    """Whatever the number of threads, the hash seed and the order of the texts."""
    script = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[2]); from test_tokenizer import TEXTS, train_tokenizer;"
        "print(hashlib.sha256(train_tokenizer(TEXTS[::int(sys.argv[1])], 400).encode()).hexdigest())"
    )
    digests = set()
    for threads, step in (("1", "1"), ("4", "-1")):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", script, step, os.path.dirname(__file__)]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1


def test_text_comes_back_byte_for_byte(tokenizer):
    lengths = token_byte_lengths(tokenizer)
    assert lengths.shape == (400,)
    assert lengths.dtype == np.int64
    for text in [*HARD, *TEXTS[:20]]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert 0 not in ids, "the name of the end-of-document token inside a document is ordinary text"
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert lengths[ids].sum() == len(text.encode())
    assert lengths[0] == 0


def test_end_of_text(tokenizer):
    assert end_of_text_id(tokenizer) == 0
    with pytest.raises(UserError, match=r"no '<eod>'; set eos_token to a special token: <\|endoftext\|>"):
        end_of_text_id(tokenizer, "<eod>")
    assert '"<eod>"' in train_tokenizer(TEXTS, 300, "<eod>")


def test_sentencepiece_style_lengths():
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}, "▁": 258, "ü": 259}
    vocabulary["▁▁"] = 260
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "▁")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["→"])
    lengths = token_byte_lengths(tokenizer)
    assert lengths[[1, 2, 258, 259, 260, 261]].tolist() == [0, 1, 1, 2, 2, 3]
    text = "   ü 漢→ü"
    assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())


def test_other_tokenizers_are_refused(tmp_path):
    lossy = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="bits per byte need a byte-level"):
        token_byte_lengths(lossy)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "missing.json")
    with pytest.raises(UserError, match="vocab_size=256 is too small"):
        train_tokenizer([], 256)


def test_truncation_and_padding_are_switched_off(tmp_path):
    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS, 300))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path / "tokenizer.json").encode("a b c d").ids) == 7
