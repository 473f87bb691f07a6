"""Verifiers that misbehave, as an installed package that scoring processes find on their PYTHONPATH."""

from __future__ import annotations

from pathlib import Path

from plugin_package import write_package

_SOURCE = '''
import os, resource, sys, time
from longshore.errors import Rejected
from longshore.types import Verdict

def verdict(reward, **more):
    return Verdict(reward, "x", **more)

class Scripted:
    """Does what the reply says."""
    version = "3"
    def __init__(self, options):
        self.scores = 0
    def score(self, request):
        self.scores += 1
        word, _, rest = request.reply.partition(" ")
        return getattr(self, "do_" + word)(rest, request)
    def do_reward(self, rest, request):
        return verdict(float(rest), breakdown={"half": float(rest) / 2}, reason="as told")
    def do_count(self, rest, request):
        return verdict(self.scores)
    def do_pid(self, rest, request):
        return verdict(os.getpid())
    def do_echo(self, rest, request):
        return verdict(1.0, reason=repr((request.task, request.conversation, request.turn_info)))
    def do_sleep(self, rest, request):
        time.sleep(float(rest))
        return verdict(1.0)
    def do_spin(self, rest, request):
        while True:
            pass
    def do_exit(self, rest, request):
        os._exit(int(rest))
    def do_raise(self, rest, request):
        raise ValueError(rest)
    def do_refuse(self, rest, request):
        raise Rejected("task", rest)
    def do_nothing(self, rest, request):
        return None
    def do_print(self, rest, request):
        print('{"verdict": {"reward": 99}}', flush=True)
        os.write(1, b"raw bytes on fd 1" * 100000)
        return verdict(0.25)
    def do_read(self, rest, request):
        return verdict(len(sys.stdin.read()) + 0.5)
    def do_eat(self, rest, request):
        return verdict(len(bytearray(int(rest))))
    def do_env(self, rest, request):
        return verdict(1.0, reason=repr((sorted(os.environ), os.getcwd(), os.listdir("."))))
    def do_limits(self, rest, request):
        limits = [resource.getrlimit(n) for n in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE, resource.RLIMIT_AS)]
        return verdict(1.0, reason=repr(limits))
    def do_fork(self, rest, request):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        return verdict(pid)

class Unloadable:
    version = "1"
    def __init__(self, options):
        raise RuntimeError("needs a licence")

class Stillborn:
    version = "1"
    def __init__(self, options):
        os._exit(7)
'''


def install(folder: Path) -> Path:
    """Writes the package and returns the folder for PYTHONPATH."""
    points = {name.lower(): f"ls_scorers:{name}" for name in ("Scripted", "Unloadable", "Stillborn")}
    return write_package(folder, "ls_scorers", {"ls_scorers.py": _SOURCE}, {"longshore.verifiers": points})
