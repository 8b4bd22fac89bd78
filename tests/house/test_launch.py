"""The launch scripts, run with stand-ins for Python and for Slurm's commands, and torchrun's exit codes for real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rung.cli.launch import main, slurm
from rung.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LOCAL, SBATCH = ROOT / "launch/local.sh", ROOT / "launch/slurm/train.sbatch"


def stand_in(folder: Path, name: str, body: str) -> Path:
    """An executable that answers instead of the real one."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Stand-ins: eight cores, Python and srun that show what they are given, Slurm's answers about job 123456."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in(folder, "nproc", "echo 8")
    stand_in(folder, "python", 'printf "%s\\n" "OMP_NUM_THREADS=$OMP_NUM_THREADS" "$@"; exit "${EXIT_CODE:-0}"')
    stand_in(folder, "scontrol", 'if [[ "$1" == show ]]; then printf "gpu-7\\ngpu-8\\n"; else echo "scontrol $*"; fi')
    stand_in(folder, "squeue", 'echo "${JOB_STATE:-RUNNING}"')
    # Runs the node's part once, as the second node.
    stand_in(folder, "srun", 'while [[ "$1" == --* ]]; do echo "srun $1"; shift; done; SLURM_NODEID=1 exec "$@"')
    return folder


def run(script: Path, arguments: list[str], commands: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RUNG", "OMP_", "TORCH"))}
    environment = {**clean, "PATH": f"{commands}:{os.environ['PATH']}", "HOME": str(commands), **variables}
    return subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, env=environment)


def run_slurm_job(commands: Path, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    job = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NAME": "rung",
        "SLURM_JOB_NODELIST": "gpu-[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_PER_NODE": "a100:4",
        "SLURM_SUBMIT_DIR": str(commands),
        "RUNG_PYTHON": str(commands / "python"),
    }
    return run(SBATCH, arguments, commands, **{**job, **variables})


def test_local_script(commands: Path) -> None:
    stand_in(commands, "nvidia-smi", "exit 9")
    ran = run(LOCAL, ["--nproc", "2", "--", "a=1", "b=x y"], commands, PYTHON=str(commands / "python"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "OMP_NUM_THREADS=4",
        "-m",
        "rung.cli.torchrun",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "--max-restarts=0",
        "--nproc-per-node=2",
        "--start-method=forkserver",
        "-m",
        "rung.train",
        "a=1",
        "b=x y",
    ]


@pytest.mark.parametrize(("gpus", "nproc"), [(3, 3), (0, 1)])
def test_local_script_counts_gpus(commands: Path, gpus: int, nproc: int) -> None:
    stand_in(
        commands, "nvidia-smi", f'for ((i = 0; i < {gpus}; i++)); do echo "GPU $i: some"; echo "  MIG of it"; done'
    )
    ran = run(LOCAL, ["a=1"], commands, PYTHON=str(commands / "python"))
    assert f"--nproc-per-node={nproc}" in ran.stdout.splitlines()
    # A process that has touched CUDA must not be forked.
    assert ("--start-method=forkserver" in ran.stdout.splitlines()) == (gpus == 0)


def test_local_script_refuses_what_is_no_number(commands: Path) -> None:
    ran = run(LOCAL, ["--nproc", "two"], commands)
    assert ran.returncode == 2
    assert "--nproc=two" in ran.stderr


def test_slurm_script(commands: Path) -> None:
    ran = run_slurm_job(commands, ["experiment=quickstart", "note=x y"], SLURM_RESTART_COUNT="2")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "rung: job 123456, start 3, 2 node(s): gpu-[7-8]",
        "srun --kill-on-bad-exit=0",
        "srun --wait=60",
        "srun --cpu-bind=none",
        "srun --label",
        "OMP_NUM_THREADS=2",
        "-m",
        "rung.cli.torchrun",
        "--nnodes=2",
        "--nproc-per-node=4",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=gpu-7:23456",
        "--rdzv-id=123456-2",
        "--rdzv-conf=is_host=0,join_timeout=900",
        "-m",
        "rung.train",
        "experiment=quickstart",
        "note=x y",
        "run.dir=runs/rung-123456",
    ]


def test_slurm_script_keeps_the_users_folder_and_reads_the_site_file(commands: Path) -> None:
    site = commands / "site.sh"
    site.write_text("export OMP_NUM_THREADS=3\n")
    ran = run_slurm_job(commands, ["run.dir=mine"], RUNG_SITE=str(site), RUNG_NPROC_PER_NODE="1")
    lines = ran.stdout.splitlines()
    assert lines[-1] == "run.dir=mine"
    assert {"OMP_NUM_THREADS=3", "--nproc-per-node=1", "--rdzv-id=123456-0"} <= set(lines)


@pytest.mark.parametrize(
    ("variables", "queued_again"),
    [
        ({"EXIT_CODE": "75"}, True),
        ({"EXIT_CODE": "75", "SLURM_RESTART_COUNT": "3", "RUNG_MAX_REQUEUES": "3"}, False),
        ({"EXIT_CODE": "75", "JOB_STATE": "CANCELLED"}, False),
        ({"EXIT_CODE": "2"}, False),
        ({"EXIT_CODE": "1"}, False),
        ({"EXIT_CODE": "0"}, False),
    ],
)
def test_slurm_script_queues_again_only_after_saving(
    commands: Path, variables: dict[str, str], queued_again: bool
) -> None:
    ran = run_slurm_job(commands, [], **variables)
    assert ran.returncode == int(variables["EXIT_CODE"])
    assert ("scontrol requeue 123456" in ran.stdout.splitlines()) is queued_again


def test_slurm_script_hands_the_signal_on(commands: Path) -> None:
    """Slurm signals the batch shell before the time limit; the step's processes must hear of it, and be waited for."""
    stand_in(
        commands, "srun", "trap 'sleep 0.2; echo told; exit 75' USR1; kill -USR1 $PPID; while :; do sleep 0.05; done"
    )
    ran = run_slurm_job(commands, [])
    assert ran.returncode == 75
    assert ran.stdout.splitlines()[-3:] == [
        "told",
        "rung: stopped and saved; queueing the job again",
        "scontrol requeue 123456",
    ]


def test_launch_slurm_prints_command_and_script(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["slurm", "--print", "--nodes", "2", "--time=1:00:00", "--", "experiment=quickstart"])
    assert status == 0
    first, *script = capsys.readouterr().out.splitlines()
    assert "sbatch --nodes=2 --gpus-per-node=8 --time=1:00:00" in first
    assert first.endswith("train.sbatch experiment=quickstart")
    assert "\n".join(script) + "\n" == SBATCH.read_text()


def test_launch_slurm_submits(
    commands: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(commands, "sbatch", 'echo "$RUNG_PYTHON" "$@"; exit 7')
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    assert slurm(["a=1"], nodes=3, gpus_per_node=0, options=["--partition=p"]) == 7
    out = capfd.readouterr().out
    assert out.startswith(f"{sys.executable} --nodes=3 --gpus-per-node=0 --partition=p ")
    assert out.endswith("train.sbatch a=1\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["local", "--nproc", "0"],
        ["local", "--partition=p"],
        ["slurm", "--nodes", "0"],
        ["slurm", "--partition", "p"],
        ["local", "quickstart"],
    ],
)
def test_launch_refuses(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        main(arguments)


@pytest.mark.parametrize("code", [0, 2, 75])
def test_torchrun_passes_the_workers_exit_code_on(tmp_path: Path, code: int) -> None:
    """Plain torchrun answers 1. The first worker to end decides; the other one is ended by torchrun."""
    script = tmp_path / "worker.py"
    script.write_text(
        f"import os, sys, time\nif {code} and os.environ['RANK'] == '0': time.sleep(60)\nsys.exit({code})\n"
    )
    command = [sys.executable, "-m", "rung.cli.torchrun", "--standalone", "--nproc-per-node=2", str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == code, ran.stderr
    assert ran.stderr == ""


SAVES_ON_SIGTERM = """
import os, signal, sys, time
def save(*_):
    time.sleep(float(os.environ["RANK"]))
    print("saved", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, save)
os.write(1, b"ready\\n")  # in one piece: two workers share the pipe
time.sleep(60)
"""


def test_torchrun_lets_every_worker_save(tmp_path: Path) -> None:
    """Plain torchrun forgets the workers' exit codes when it is signalled."""
    script = tmp_path / "worker.py"
    script.write_text(SAVES_ON_SIGTERM)
    command = [sys.executable, "-m", "rung.cli.torchrun", "--standalone", "--nproc-per-node=2", str(script)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as ran:
        assert ran.stdout is not None
        assert [ran.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        ran.terminate()
        assert ran.stdout.read() == "saved\n" * 2
        assert ran.wait() == 75


def test_torchrun_shows_what_killed_a_worker(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    command = [sys.executable, "-m", "rung.cli.torchrun", "--standalone", "--nproc-per-node=1", str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 128 + 9
    assert "SIGKILL" in ran.stderr


def test_what_ranks_refuse_is_said_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rung", "launch", "local", "--nproc", "2", "--", "device=cpu", "data=corpus"]
    overrides = [f"data.paths=[{tmp_path / 'missing'}]", f"run.dir={tmp_path / 'run'}"]
    ran = subprocess.run([*command, *overrides], capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("rung: error: ") and ran.stderr.count("\n") == 1 and "missing" in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_imports_leaves_nothing(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "rung", "launch", "local", "--nproc", "2", "--", "device=cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ran:
        assert ran.stdout is not None
        started: list[psutil.Process] = []
        while not any("forkserver" in " ".join(process.cmdline()) for process in started):
            assert ran.poll() is None, ran.stdout.read()
            time.sleep(0.1)
            started = psutil.Process(ran.pid).children(recursive=True)
        ran.send_signal(number)
        assert ran.wait(timeout=60) == 128 + number
        assert ran.stdout.read() == ""
    assert psutil.wait_procs(started, timeout=10)[1] == []
