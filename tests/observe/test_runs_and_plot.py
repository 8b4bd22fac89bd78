import io
import json
import math
import os
import time

import pytest

from rung.errors import UserError
from rung.observe import list_runs, plot, read_status, runs_table, write_status
from rung.observe.plotting import smooth


def make_run(path, steps=50, state="completed", scale=1.0, error=None):
    path.mkdir(parents=True)
    with open(path / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            loss = None if step == 7 else scale * (2 + 8 / step)
            file.write(json.dumps({"step": step, "loss": loss, "tokens": 4096 * step}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "eval_loss": 2.5 * scale, "bits_per_byte": scale}) + "\n")
        file.write('{"step": 51, "lo')
    write_status(path, state, steps, error)
    return path


def test_status_is_replaced_whole(tmp_path):
    assert read_status(tmp_path) is None
    write_status(tmp_path, "running", 3)
    write_status(tmp_path, "failed", 4, "why")
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "failed", "step": 4, "error": "why"}
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    (tmp_path / "status.json").write_text("[]")
    assert read_status(tmp_path) is None


def test_listing(tmp_path):
    from rich.console import Console

    make_run(tmp_path / "sweep" / "a")
    b = make_run(tmp_path / "sweep" / "b", steps=5, state="failed", error="rank 3 was lost\nand more")
    c = make_run(tmp_path / "c", state="running")
    hour_ago = time.time() - 3600
    for name in ("status.json", "metrics.jsonl"):
        os.utime(c / name, (hour_ago, hour_ago))
    make_run(c / "checkpoints" / "not-a-run-of-its-own")
    runs = {run.path.name: run for run in list_runs(tmp_path)}
    assert runs.keys() == {"a", "b", "c"}
    assert (runs["a"].step, runs["a"].eval_loss, runs["a"].tokens) == (50, 2.5, 50 * 4096)
    assert runs["b"].eval_loss is None and runs["b"].loss == 2 + 8 / 5 and runs["c"].state == "silent"
    console = Console(width=80, file=io.StringIO())
    console.print(runs_table(list_runs(tmp_path), tmp_path))
    text = console.file.getvalue()
    assert "sweep/b: rank 3 was lost\n" in text and "and more" not in text and "1h00m ago" in text
    assert [run.path for run in list_runs(b)] == [b] and list_runs(tmp_path / "none") == []


@pytest.mark.parametrize("options", [{}, {"log_x": True, "gzip_bits_per_byte": 2.3}])
def test_plot_writes_a_picture(tmp_path, options):
    from PIL import Image

    runs = [make_run(tmp_path / name / "run", scale=scale) for name, scale in (("a", 1.0), ("b", 1.3))]
    picture = plot(runs, tmp_path / "out" / "loss.png", **options)
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_plot_names_every_empty_run(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"(?s)2 problems.*a: no metrics.*b: no metrics"):
        plot([tmp_path / "a", tmp_path / "b"], tmp_path / "x.png")
    with pytest.raises(UserError, match="no run"):
        plot([], tmp_path / "x.png")


def test_smoothing_is_centred_drops_spikes_and_keeps_gaps():
    assert smooth([5.0, 4.0, 3.0, 2.0, 1.0], 1) == [5.0, 4.0, 3.0, 2.0, 1.5]
    assert smooth([5.0, 4.0, 3.0, 2.0, 1.0], 1, stride=2) == [5.0, 3.0, 1.5]
    assert smooth([1.0, 1.0, 9.0, 1.0, 1.0], 1) == [1.0] * 5
    gap = smooth([3.0, float("nan"), 1.0, 1.0], 1)
    assert math.isnan(gap[1]) and gap[::2] == [3.0, 1.0]
