"""The child process of `test_child`, a script. A request ``[how, value]`` selects what it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from shadowllm.child import serve
from shadowllm.errors import UserError

os.write(1, b"printed before it serves\n")


def answer(request, progress):
    how, value = request
    match how:
        case "echo":
            return value
        case "count":
            threads = [threading.Thread(target=progress, args=(number,)) for number in range(value)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return "done"
        case "noise":
            print('{"result": "a library\'s, on stdout"}')
            os.write(1, b'{"result": "of C code"')  # without a line's end
            subprocess.run([sys.executable, "-c", 'print(\'{"result": "of a process"}\')'], check=True)
            return value
        case "refuse":
            raise UserError("the file ünïcode.bin is broken", "make it again")
        case "bug":
            print("a warning before it", file=sys.stderr)
            return {}[value]
        case "not JSON":
            return np.float32(1)
        case "kill":
            print("last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.Signals[value])
        case "exit":
            sys.exit(value)
        case "sleep":
            try:
                progress(os.getpid())
                time.sleep(60)
            finally:
                if value:
                    with open(value, "w") as file:
                        file.write("cleaned up")
        case "holds on":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            progress(os.getpid())
            time.sleep(60)
    raise AssertionError(how)


if __name__ == "__main__":
    code = serve(answer)
    print("served")
    sys.exit(code or len(sys.argv) - 1)
