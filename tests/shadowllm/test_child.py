"""Child processes: every way in which they can answer, fail and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from shadowllm.child import Child, ChildError, call, module_command
from shadowllm.errors import UserError

SCRIPT = str(Path(__file__).with_name("answering_child.py"))
COMMAND = (sys.executable, SCRIPT)
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")


def child(*arguments, **options):
    return Child((*COMMAND, *arguments), "the child", **options)


@pytest.fixture(scope="module")
def running():
    with child() as one:
        yield one


class TestAnswers:
    @pytest.mark.parametrize(
        "value",
        [
            None,
            [1, 2.5, True, {"a": []}],
            "naïve – 影 😀\nsecond line\u2028third\0",
            "\udcff",  # as in the name of a file that is not UTF-8
            float("inf"),
        ],
    )
    def test_json_comes_back(self, running, value):
        assert running.ask(["echo", value]) == value

    def test_large_messages(self, running):
        value = "ä" * 1_000_000 + "".join(map(str, range(100_000)))
        assert running.ask(["echo", value]) == value

    def test_progress_from_threads(self, running):
        told = []
        assert running.ask(["count", 200], told.append) == "done"
        assert sorted(told) == list(range(200))

    def test_noise_on_stdout_is_no_message(self, running):
        assert [running.ask(["noise", value]) for value in (1, 2)] == [1, 2]

    def test_output_that_is_not_kept_goes_to_stderr(self, capfd):
        assert call(child(keep_output=False), ["noise", 3]) == 3
        out, err = capfd.readouterr()
        assert out == ""
        for words in ("printed before it serves", "a library's, on stdout", "of C code", "of a process", "served"):
            assert words in err

    def test_an_environment(self):
        code = "import os; from shadowllm.child import serve; serve(lambda name, _: os.environ.get(name))"
        command = (sys.executable, "-c", code)
        assert call(Child(command, "it", environment=os.environ | {"SHADE": "deep"}), "SHADE") == "deep"
        assert call(Child(command, "it"), "SHADOWLLM_CHANNEL") is None  # removed, so its processes lack it

    def test_by_hand(self):
        requests = "".join(json.dumps(request) + "\n" for request in (["noise", "x"], ["count", 1], ["refuse", 0]))
        done = subprocess.run(COMMAND, input=requests, capture_output=True, text=True, check=False)
        lines = done.stdout.removeprefix("printed before it serves\n").splitlines()
        assert [json.loads(line) for line in lines] == [
            {"result": "x"},
            {"progress": 0},
            {"result": "done"},
            {"problem": "the file ünïcode.bin is broken", "remedy": "make it again"},
        ]
        assert done.returncode == 1
        done = subprocess.run(COMMAND, input='["bug", 7]', capture_output=True, text=True, check=False)
        assert done.stderr.endswith("KeyError: 7\n")


class TestErrors:
    def test_a_user_error(self):
        with child() as one, pytest.raises(UserError) as caught:
            one.ask(["refuse", None])
        assert (caught.value.problem, caught.value.remedy) == ("the file ünïcode.bin is broken", "make it again")

    @pytest.mark.parametrize("keep_output", [True, False])
    def test_a_bug_shows_its_traceback(self, keep_output):
        with child(keep_output=keep_output) as one:
            for _ in range(2):  # a dead child gives the same error again
                with pytest.raises(ChildError, match=r"^the child failed \(exit status 1\):\n") as caught:
                    one.ask(["bug", "a key"])
        error = caught.value
        assert error.said[-1] == "KeyError: 'a key'"
        assert "Traceback (most recent call last):" in str(error)
        assert "return {}[value]" in str(error)
        assert ("a warning before it" in error.said) is keep_output
        assert (error.status, error.signal) == (1, None)

    def test_results_are_json_only(self):
        with child() as one, pytest.raises(ChildError, match=r"TypeError: .*float32 is not JSON serializable"):
            one.ask(["not JSON", None])
        with child() as one:
            with pytest.raises(TypeError):
                one.ask(["echo", {1, 2}])
            assert one.ask(["echo", 1]) == 1

    def test_death_by_a_signal(self):
        with child() as one, pytest.raises(ChildError, match="the child died of SIGABRT:\n") as caught:
            one.ask(["kill", "SIGABRT"])
        assert (caught.value.status, caught.value.signal, caught.value.said[-1]) == (-6, "SIGABRT", "last words")
        with child() as one, pytest.raises(ChildError, match=r"the child died of SIGKILL; .* run out of memory"):
            one.ask(["kill", "SIGKILL"])

    def test_an_end_without_an_answer(self):
        with child() as one, pytest.raises(ChildError, match=r"exit status 3\)"):
            one.ask(["exit", 3])
        with Child((sys.executable, "-c", "print('hello')"), "it") as other, pytest.raises(ChildError) as caught:
            other.ask("anything" * 100_000)
        assert (caught.value.status, caught.value.said) == (0, ["hello"])

    def test_a_failure_after_the_answer(self):
        with child("fails") as one:
            assert one.ask(["echo", 1]) == 1
            with pytest.raises(ChildError, match=r"failed \(exit status 1\):\nprinted before it serves\nserved"):
                one.finish()

    def test_no_answer_in_time(self):
        with child() as one:
            one.ask(["echo", 0])
            with pytest.raises(TimeoutError):
                one.ask(["sleep", ""], timeout=0.2)
        assert one.process.returncode is not None
        with child(grace=0) as one:
            one.process.send_signal(signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                one.finish(timeout=0.2)

    def test_a_program_that_is_not_there(self):
        with pytest.raises(FileNotFoundError), child_of_nobody():
            pass

    def test_a_module_that_is_not_there(self):
        with pytest.raises(ChildError, match="No module named shadowllm"):
            call(Child(module_command("shadowllm.nowhere"), "it"), None)


def child_of_nobody():
    return Child(("/nowhere/python",), "nobody")


class TestEnds:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_with_an_exception_of_the_parent(self, error, tmp_path):
        def stop(_pid):
            raise error

        with pytest.raises(error), child() as one:
            one.ask(["sleep", str(tmp_path / "log")], stop)
        assert one.process.returncode == 128 + 15
        assert (tmp_path / "log").read_text() == "cleaned up"

    def test_one_that_does_not_listen_is_killed(self):
        def stop(_pid):
            raise InterruptedError

        with pytest.raises(InterruptedError), child(grace=0.2) as one:
            one.ask(["holds on", None], stop)
        assert one.process.returncode == -9

    def test_idle_and_without_grace(self):
        with child(grace=0) as one:
            pass
        assert one.process.returncode == -9
        with child() as one:
            one.ask(["echo", 1])
        assert one.process.returncode == 128 + 15
        assert not psutil.pid_exists(one.process.pid)  # no zombie

    def test_nothing_stays_open(self):
        before = psutil.Process().num_fds()
        for _ in range(3):
            call(child(), ["echo", 1])
            with pytest.raises(FileNotFoundError), child_of_nobody():
                pass
        assert psutil.Process().num_fds() == before

    @only_linux
    @pytest.mark.parametrize("how", ["kill", "terminate"])
    def test_with_a_parent_that_is_killed(self, how):
        code = (
            f"from shadowllm.child import Child\nwith Child({COMMAND!r}, 'it') as one:\n"
            "    one.ask(['holds on', None], lambda pid: print(pid, flush=True))"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
            one = psutil.Process(int(parent.stdout.readline()))
            getattr(parent, how)()
        _, alive = psutil.wait_procs([one], timeout=20)
        assert not alive

    @pytest.mark.parametrize("kills", [True, False])
    def test_with_a_parent_that_was_killed_before_it_serves(self, kills, tmp_path):
        slow = (
            "import time; time.sleep(1); from shadowllm.child import serve; serve(lambda path, _: open(path, 'w').name)"
        )
        code = (
            f"from shadowllm.child import Child\nwith Child({(sys.executable, '-c', slow)!r}, 'it') as one:\n"
            f"    print(one.process.pid, flush=True)\n    one.ask({str(tmp_path / 'file')!r})"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
            one = psutil.Process(int(parent.stdout.readline()))
            time.sleep(0.3)  # the request is sent
            if kills:
                parent.kill()
        _, alive = psutil.wait_procs([one], timeout=20)
        assert not alive
        assert (tmp_path / "file").exists() is not kills

    def test_by_itself_when_no_more_requests_come(self):
        with child() as one:
            one.ask(["echo", 1])
            one.finish(timeout=60)
        assert one.process.returncode == 0
