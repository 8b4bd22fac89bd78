"""The training loops that are compared, as programs that take turns: Rung's, the bare one, Hugging Face's Trainer.

Started by overhead.py and gpu_mfu.py as ``contenders.py SPEC COMMANDS REPLIES``: a JSON file and two open file numbers.
All train the same shape on the same batches in the same order with the same AdamW, clipping and learning rate, so that
their losses have to agree where they start from the same weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measuring import Turns

if TYPE_CHECKING:
    from rung.recipes.config import Config

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass
class Spec:
    """What one contender runs."""

    kind: str
    """rung, bare or huggingface."""
    overrides: list[str]
    """Settings of Rung that all follow."""
    tokens: str
    """.npy file, int32 [steps, sequences, seq_len + 1]: what the others read, in the order in which Rung reads."""
    weights: str | None
    """State dict that the others start from; None: their own draws."""
    device: str
    precision: str
    compile: bool

    def save(self, path: Path) -> str:
        path.write_text(json.dumps(asdict(self)))
        return str(path)


def overrides(prefix: Path, run_dir: Path, extra: list[str]) -> list[str]:
    """Rung's settings on a corpus, without what would add work that the others do not do: evaluation and TensorBoard.

    Left on: metrics.jsonl, the console, status.json, signals, all checks.
    """
    return [
        "data=corpus",
        f"data.paths=[{prefix}]",
        f"run.dir={run_dir}",
        "optim=adamw",
        f"optim.lr={LR}",
        f"optim.betas=[{BETAS[0]},{BETAS[1]}]",
        f"optim.eps={EPS}",
        f"optim.weight_decay={WEIGHT_DECAY}",
        "schedule=constant",
        f"train.clip_grad_norm={CLIP}",
        "eval.batches=1",
        "logging.tensorboard=false",
        *extra,
    ]


def write_corpus(prefix: Path, vocab_size: int, num_tokens: int, seed: int) -> None:
    """Uniform random tokens in Megatron's format: speed does not depend on what they say."""
    from rung.data import IndexedDatasetWriter

    tokens = np.random.default_rng(seed).integers(0, vocab_size, num_tokens)
    tokens[0] = vocab_size - 1
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        writer.add_document(tokens)


def write_batches(config: Config, steps: int, path: Path) -> None:
    """What Rung reads in its first ``steps`` steps, for the others."""
    from rung.data import open_data

    source = open_data(config.data, config.run.seed)
    size = config.train.global_batch_size
    windows = np.empty((steps, size, config.data.seq_len + 1), dtype=np.int32)
    for step in range(steps):
        batch = source.read(source.sample_ids(step * size, size))
        windows[step, :, :-1], windows[step, :, -1] = batch.tokens_BT.numpy(), batch.labels_BT[:, -1].numpy()
    np.save(path, windows)


def write_weights(config: Config, path: Path) -> None:
    """Rung's initial weights."""
    import torch

    from rung.layout import Layout
    from rung.models import build
    from rung.parallel import Groups, ParallelConfig, dtypes, initialize, parallelize

    with torch.device("meta"):
        whole = build(config.model)
    alone = Groups(Layout(), 0, "cpu")
    model = parallelize(whole, alone, ParallelConfig(), dtypes("float32"), seq_len=1, num_micro_batches=1)
    initialize(model, torch.device("cpu"), config.run.seed)
    torch.save(model.parts[0].state_dict(), path)


def rung(spec: Spec, turns: Turns) -> None:
    """`rung train` as it is, with a monitor that also waits for its turn."""
    from rung.loop.monitor import Monitor
    from rung.recipes import pretrain
    from rung.recipes.config import load_config

    class TakesTurns(Monitor):
        asked_to_end = False

        def begin(self, step: int) -> None:
            self.asked_to_end = not turns.next()
            super().begin(step)

        def end(self, step: int, batch: Any, lr: float, loss: Any, *others: Any) -> None:
            turns.loss = loss
            super().end(step, batch, lr, loss, *others)

        @property
        def stop_requested(self) -> bool:
            return self.asked_to_end or super().stop_requested

    pretrain.Monitor = TakesTurns  # type: ignore[misc]
    pretrain.pretrain(*load_config(spec.overrides, 1))


def bare(spec: Spec, turns: Turns) -> None:
    """bare_llama.py."""
    import bare_llama
    import torch

    from rung.recipes.config import load_config

    config, _ = load_config(spec.overrides, 1)
    shape = bare_llama.Shape(**{f.name: getattr(config.model, f.name) for f in fields(bare_llama.Shape)})
    model = bare_llama.make(shape, config.data.seq_len, spec.precision, spec.device)
    if spec.weights:
        model.load_state_dict(torch.load(spec.weights, weights_only=True))
    steps = bare_llama.steps(
        model,
        torch.from_numpy(np.load(spec.tokens)).to(spec.device),
        micro_batch_size=config.train.micro_batch_size,
        precision=spec.precision,
        compile_model=spec.compile,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        clip_grad_norm=CLIP,
    )
    while turns.next():
        turns.loss = next(steps)


def huggingface(spec: Spec, turns: Turns) -> None:
    """Trainer over LlamaForCausalLM, as fast as its settings make it: SDPA, fused AdamW, no logging, no waits."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    from rung.models.huggingface import to_huggingface_config, to_huggingface_name
    from rung.recipes.config import load_config

    config, _ = load_config(spec.overrides, 1)
    model_config = transformers.LlamaConfig(**{**to_huggingface_config(config.model), "use_cache": False})
    model_config._attn_implementation = "sdpa"
    with torch.device(spec.device):
        model = transformers.LlamaForCausalLM(model_config)
    if spec.weights:
        state = torch.load(spec.weights, weights_only=True)
        model.load_state_dict({to_huggingface_name(name): value for name, value in state.items()})
    windows = torch.from_numpy(np.load(spec.tokens)).flatten(0, 1).long()
    # Labels shifted beforehand, so that every position counts, as in the other loops.
    dataset = [{"input_ids": w[:-1], "labels": w[:-1], "shift_labels": w[1:]} for w in windows]

    class TakesTurns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not turns.next():
                raise EndOfTurns
            turns.loss = None

    class Trainer(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            turns.loss = loss if turns.loss is None else turns.loss + loss
            return loss

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(dataset)  # type: ignore[arg-type]

    class EndOfTurns(Exception):
        """Ends the training from inside."""

    train = config.train
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=len(dataset) // train.global_batch_size,
            per_device_train_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=train.global_batch_size // train.micro_batch_size,
            optim="adamw_torch_fused",
            learning_rate=LR,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            bf16=spec.precision == "bf16",
            torch_compile=spec.compile,
            use_cpu=spec.device == "cpu",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # the default waits for the device in every step
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[TakesTurns()])
        with contextlib.suppress(EndOfTurns):
            trainer.train()


CONTENDERS = {"rung": rung, "bare": bare, "huggingface": huggingface}


def main() -> None:
    spec_path, commands, replies = sys.argv[1:]
    spec = Spec(**json.loads(Path(spec_path).read_text()))
    turns = Turns(os.fdopen(int(commands)), os.fdopen(int(replies), "w"), spec.device)
    try:
        CONTENDERS[spec.kind](spec, turns)
    except BaseException as error:
        with contextlib.suppress(BrokenPipeError):
            turns.send({"error": f"{type(error).__name__}: {error}".strip()})
        raise


if __name__ == "__main__":
    main()
