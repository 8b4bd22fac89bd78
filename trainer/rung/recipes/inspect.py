"""Looking at a finished model: what it writes, and how well it knows each held-out file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rung.errors import UserError

__all__ = ["FileScore", "Report", "evaluate_files", "sample_texts"]


def sample_texts(
    model: Path,
    prompt: str,
    *,
    samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[str]:
    """Continuations of ``prompt`` by the weights in a run's folder or a Hugging Face folder.

    An empty prompt begins a new document. Sample i is the same whatever the number of samples.
    """
    from rung.checkpoint import load_huggingface
    from rung.data import load_tokenizer
    from rung.rollout import generate

    folder = weights_folder(model)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json, so text cannot be read or written")
    if samples < 1 or max_new_tokens < 1:
        raise UserError(f"--samples={samples} and --tokens={max_new_tokens} must be above zero")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, decoder = load_huggingface(folder, device=device)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    eos_id = json.loads((folder / "config.json").read_text()).get("eos_token_id")
    ids = tokenizer.encode(prompt).ids or ([eos_id] if eos_id is not None else [0])
    texts = []
    for index in range(samples):
        out = generate(
            decoder, ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            sample_id=index, eos_id=eos_id,
        )  # fmt: skip
        texts.append(tokenizer.decode(out))
    return texts


@dataclass(frozen=True)
class FileScore:
    """One held-out file."""

    name: str
    bytes: int
    bits_per_byte: float
    gzip_bits_per_byte: float | None


@dataclass(frozen=True)
class Report:
    """Held-out bits per byte, in all and by file."""

    eval_loss: float
    bits_per_byte: float
    gzip_bits_per_byte: float | None
    files: list[FileScore]

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def render(self, listed: int) -> str:
        """Totals, how many files the model knows better than gzip, and the ``listed`` best and worst of them."""
        lines = [f"held-out loss {self.eval_loss:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte"]
        scored = [file for file in self.files if file.gzip_bits_per_byte is not None]
        if self.gzip_bits_per_byte is not None and scored:
            wins = sum(file.bits_per_byte < (file.gzip_bits_per_byte or 0) for file in scored)
            lines.append(f"gzip -9 of the same files, each alone: {self.gzip_bits_per_byte:.4f} bits per byte")
            lines.append(f"the model needs fewer bits than gzip on {wins} of {len(scored)} files")
        ranked = sorted(scored, key=lambda file: file.bits_per_byte - (file.gzip_bits_per_byte or 0))
        if listed and ranked:
            lines.append(f"  {'model':>7} {'gzip -9':>8} {'bytes':>9}  file")
            half = max(1, listed // 2)
            shown = ranked if len(ranked) <= listed else [*ranked[:half], None, *ranked[-half:]]
            for file in shown:
                if file is None:
                    lines.append("      …")
                    continue
                lines.append(f"  {file.bits_per_byte:7.4f} {file.gzip_bits_per_byte:8.4f} {file.bytes:9}  {file.name}")
        return "\n".join(lines)


@torch.no_grad()
def evaluate_files(
    model: Path, *, corpus: Path | None = None, seq_len: int | None = None, batch_size: int = 8
) -> Report:
    """Score every held-out file of a corpus with one process.

    Windows cut the stream of files; a token's cost goes to its own file (the end-of-document token to the file it
    ends), so the total is the in-run evaluation's.
    """
    import rung_kernels
    from rung.checkpoint import load_huggingface
    from rung.data import DataConfig, open_data

    settings = run_settings(model)
    if corpus is not None:
        data = DataConfig(name="corpus", paths=[str(corpus)], seq_len=seq_len or settings.get("seq_len", 256))
    elif settings:
        data = DataConfig(**{**settings, **({"seq_len": seq_len} if seq_len else {})})
    else:
        raise UserError(f"{model} does not say what it was evaluated on; give --corpus")
    source = open_data(data, 0)
    if source.num_eval_windows == 0 or source.token_bytes is None or len(source.eval_sources) != 1:
        raise UserError(
            f"{source.path}: file by file needs one corpus with a held-out split, as `rung data build` makes it"
        )
    theirs = weights_folder(model) / "tokenizer.json"
    if theirs.is_file() and source.tokenizer_path and theirs.read_bytes() != source.tokenizer_path.read_bytes():
        raise UserError(
            f"{source.path} was tokenized with another tokenizer than {theirs}; build it again with this one"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, decoder = load_huggingface(weights_folder(model), device=device)
    decoder.eval()
    held_out = source.corpora[source.eval_sources[0][0]]
    dataset = source.eval_sources[0][1].dataset
    nats = torch.zeros(dataset.num_documents, dtype=torch.float64)
    sizes = torch.zeros(dataset.num_documents, dtype=torch.int64)
    tokens = 0
    for first in range(0, source.num_eval_windows, batch_size):
        windows = list(range(first, min(first + batch_size, source.num_eval_windows)))
        batch = source.read_eval(windows)
        logits = decoder(
            batch.tokens_BT.to(device),
            document_ids_BT=None if batch.document_ids_BT is None else batch.document_ids_BT.to(device),
        )
        losses = rung_kernels.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten().to(device)).double().cpu()
        for row, window in enumerate(windows):
            labels = batch.labels_BT[row]
            count = int((labels != -100).sum())
            start = window * data.seq_len + 1
            owners = torch.from_numpy(dataset.document_ids(start, start + count))
            begin = row * data.seq_len
            nats.index_add_(0, owners, losses[begin : begin + count])
            sizes.index_add_(0, owners, source.token_bytes[labels[:count]])
            tokens += count
    files = []
    for index, entry in enumerate(held_out_documents(held_out.path)):
        if sizes[index] > 0:
            bits = float(nats[index]) / math.log(2) / int(sizes[index])
            gzip_bits = 8 * entry["gzip9_bytes"] / entry["bytes"] if entry["bytes"] else None
            files.append(FileScore(entry["name"], int(entry["bytes"]), bits, gzip_bits))
    info = held_out.info
    return Report(
        eval_loss=float(nats.sum()) / tokens,
        bits_per_byte=float(nats.sum()) / math.log(2) / int(sizes.sum()),
        gzip_bits_per_byte=info.splits["valid"].gzip_bits_per_byte if info else None,
        files=files,
    )


def weights_folder(path: Path) -> Path:
    """A run's exported weights, or the Hugging Face folder itself."""
    for folder in (path / "export", path):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"{path} holds no weights: neither {path / 'export'} nor a Hugging Face folder. "
        f"Only completed runs leave some; `rung ckpt export {path} {path / 'export'}` writes those of its checkpoint"
    )


def run_settings(path: Path) -> dict[str, Any]:
    """The data settings of the run that a folder belongs to; empty when it belongs to none."""
    import yaml

    for folder in (path, path.parent):
        if (folder / "resolved.yaml").is_file():
            data: dict[str, Any] = yaml.safe_load((folder / "resolved.yaml").read_text())["data"]
            return data
    return {}


def held_out_documents(corpus: Path) -> list[dict[str, Any]]:
    """Names and sizes of the held-out files, in the order of the token file."""
    return [json.loads(line) for line in (corpus / "valid_documents.jsonl").read_text().splitlines()]
