"""Ctrl-C before a command has begun: one exit code, and no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from streamer.interrupted import EXIT, importing, is_command

# modules that are slow to come, one of which is like an extension: it swallows what is raised
SLOW = """
import signal, sys, os

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            print("there", flush=True)
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                if {swallowed}:
                    raise ImportError(name) from None
                raise

sys.meta_path.insert(0, Finder())
import runpy
sys.orig_argv = [sys.executable, "-m", "{module}"]
sys.argv = ["{module}", *{arguments}]
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""


@pytest.mark.smoke
@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize(
    ("module", "arguments", "names"),
    [
        ("streamer.run", [], ["streamer.kv"]),
        ("streamer.run", ["--prompt", "x"], ["streamer.session"]),
        ("streamer", ["profile"], ["streamer.bench"]),
        ("streamer.profile", ["--json", "x"], ["streamer.footprint"]),
        ("streamer.plan", [], ["streamer.budget"]),
        ("streamer.bench", [], ["streamer.probe", "mlx.core"]),
    ],
)
def test_ctrl_c_while_modules_come(
    module: str, arguments: list[str], names: list[str], swallowed: bool
) -> None:
    code = SLOW.format(module=module, arguments=arguments, names=names, swallowed=swallowed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT, "there\n", "")


@pytest.mark.smoke
def test_whose_ctrl_c_it_is() -> None:
    assert is_command(["python", "-m", "streamer.run", "--model", "x"])
    assert is_command(["python", "-X", "dev", "-m", "streamer"])
    for argv in ([], ["python"], ["python", "-m", "pytest", "-m", "streamer"], ["x", "-m"]):
        assert not is_command(argv)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ZeroDivisionError), importing():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
