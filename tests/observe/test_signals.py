import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from observe import signal_ranks

from rung.observe import StopSignals, agree


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_request_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.requested == 0 and signals.name == ""
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at once: the same request, delivered twice
        wait_for(lambda: signals.requested)
        assert signals.requested == number and signals.name == signal.Signals(number).name
        other = signal.SIGTERM if number == signal.SIGUSR1 else signal.SIGUSR1
        os.kill(os.getpid(), other)
    assert signal.getsignal(number) is before and signals.requested == number


def test_the_second_signal_ends_a_process_that_hangs_in_c():
    code = """
import ctypes
from rung.observe import StopSignals
with StopSignals(debounce_seconds=0.0) as signals:
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(1000)  # no Python handler runs before it returns
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert "SIGINT: stopping after this step" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    assert child.wait(20) == 128 + signal.SIGINT
    assert "SIGINT again" in child.stderr.read()


def test_outside_the_main_thread_nothing_is_installed():
    found = []

    def body():
        with StopSignals() as signals:
            found.append(signals.requested)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [0]


def test_agreeing_alone():
    assert agree(15) == 15 and agree(0) == 0


def test_all_ranks_agree(workers):
    assert workers.run(2, signal_ranks.agreed) == [(0, 15), (0, 15)]
