"""What a finished run leaves behind: weights that others can load, a picture, a taste of what the model writes."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

from rung.checkpoint import export_huggingface, gathered_tensors
from rung.loop import Outcome, Training
from rung.recipes.config import Config

__all__ = ["finish"]


def finish(config: Config, run: Training, outcome: Outcome) -> dict[str, str]:
    """Export, plot, sample; returns lines for the summary on rank 0. Collective."""
    facts: dict[str, str] = {}
    gzip_bits = run.source.gzip_bits_per_byte
    bits = outcome.evaluation.get("bits_per_byte")
    if bits is not None and gzip_bits is not None:
        facts["held-out text"] = f"{bits:.4f} bits per byte; gzip -9 of the same files: {gzip_bits:.4f}"
    folder = Path(config.run.dir)
    if config.export.huggingface:
        export(config, run, folder / "export")
        facts["weights"] = f"{folder / 'export'} (Hugging Face format)"
    if run.world.is_main:
        facts["metrics"] = str(folder / "metrics.jsonl")
        if config.export.huggingface:
            facts["look closer"] = f"rung eval {folder}; rung sample {folder} --prompt TEXT"
        else:
            facts["weights"] = f"none (export.huggingface=false): rung ckpt export {folder} DIR writes them"
        facts["picture"] = attempt(lambda: plot_run(folder, gzip_bits))
        if config.export.huggingface and run.source.tokenizer_path is not None:
            for prompt in config.export.sample_prompts:
                text = attempt(functools.partial(sample_text, folder / "export", prompt, config))
                facts["sample"] = f"{facts.get('sample', '')}\n{prompt}{text}"
    run.world.barrier()
    return facts


def export(config: Config, run: Training, directory: Path) -> None:
    """Write the weights of a spread model from rank 0, one gathered tensor at a time."""
    is_main = run.world.is_main
    fresh = directory.with_name(f".{directory.name}.new")
    tensors = gathered_tensors(run.model, keep=is_main)

    def write() -> None:
        export_huggingface(
            fresh,
            config.model,
            tensors,
            tokenizer_json=run.source.tokenizer_path,
            eos_id=run.source.eos_id,
        )
        shutil.rmtree(directory, ignore_errors=True)  # an earlier run's; only now that the new one is whole
        fresh.rename(directory)

    try:
        if is_main:
            shutil.rmtree(fresh, ignore_errors=True)
            write()
    finally:
        for _ in tensors:  # every rank takes part in every gather, also when rank 0 failed to write
            pass


def plot_run(folder: Path, gzip_bits: float | None) -> Path:
    """Draw the loss curve beside the metrics."""
    from rung.observe import plot

    return plot([folder], folder / "loss.png", gzip_bits_per_byte=gzip_bits)


def sample_text(directory: Path, prompt: str, config: Config) -> str:
    """Continue a prompt with the exported weights, as ``rung sample`` does."""
    from rung.recipes.inspect import sample_texts

    return sample_texts(directory, prompt, max_new_tokens=config.export.sample_tokens, seed=config.run.seed)[0]


def attempt(action: Callable[[], object]) -> str:
    """The weights are safe by now: a picture or a sample that fails is told, and costs nobody the run."""
    try:
        return str(action())
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
