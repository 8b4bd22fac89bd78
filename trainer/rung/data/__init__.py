"""Tokens on disk, the order they are read in, and how corpora are made.

The order of the data is a function of (corpus fingerprints, seed, number of samples consumed); nothing else is kept.
"""

from rung.data.batch import IGNORED, Batch
from rung.data.build import build_corpus
from rung.data.corpus import Corpus, CorpusInfo, SplitInfo, TokenSource, check_vocab
from rung.data.indexed import IndexedDataset, IndexedDatasetWriter
from rung.data.inspect import Inspection, inspect_corpus, render_inspection
from rung.data.order import SampleOrder
from rung.data.source import DataConfig, DataSource, open_data, prepare
from rung.data.stdlib import cache_folder, ensure_python_stdlib
from rung.data.tokenizer import load_tokenizer, token_byte_lengths

__all__ = [
    "IGNORED",
    "Batch",
    "Corpus",
    "CorpusInfo",
    "DataConfig",
    "DataSource",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "Inspection",
    "SampleOrder",
    "SplitInfo",
    "TokenSource",
    "build_corpus",
    "cache_folder",
    "check_vocab",
    "ensure_python_stdlib",
    "inspect_corpus",
    "load_tokenizer",
    "open_data",
    "prepare",
    "render_inspection",
    "token_byte_lengths",
]
