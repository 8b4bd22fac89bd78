"""`rung doctor` says what is wrong, line by line."""

from pathlib import Path

import pytest

from rung.cli import doctor


def test_report_is_one_line_for_each_finding(capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in {"ok", "warn", "fail"} for line in lines)
    assert status == (2 if any(line.startswith("fail") for line in lines) else 0)
    assert any(line.startswith("ok   packages: torch 2.") for line in lines)


def test_a_failure_names_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUNG_CACHE", str(tmp_path / "file" / "cache"))
    assert doctor.main(["--quick"]) == 2
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("fail"))
    assert line.startswith("fail cache:")
    assert "RUNG_CACHE" in line


def test_two_processes_agree() -> None:
    assert doctor._loop_test("gloo", "").status == "ok"


def test_a_failing_process_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOOP_TEST", "raise SystemExit('no network')")
    finding = doctor._loop_test("gloo", "mend it")
    assert finding.status == "fail"
    assert "no network" in finding.found
    assert finding.fix == "mend it"
