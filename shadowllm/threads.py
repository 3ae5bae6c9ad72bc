"""The threads of ONNX Runtime: in a process of our own, one pool for all graphs.

The graphs of a step run one after the other. If each has its own threads, a graph must wake them when it starts. When
it ends, they must stop to wait actively, because the next graph needs the cores. This takes about a twentieth of a
step of a small model, and more where a core that waits is slow to wake.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

_sharing, _made, _lock = False, False, Lock()


def share_threads() -> None:
    """Let all sessions of this process use one pool of threads; the first one decides how many it has.

    Call it before the first session. ONNX Runtime then refuses sessions with threads of their own, so it is for
    processes in which only shadowllm uses ONNX Runtime, such as the command ``shadowllm``.
    """
    global _sharing
    _sharing = True


def give_threads(options: ort.SessionOptions, threads: int | None, wait_actively: bool) -> None:
    """Let a graph run on the pool of the process, or on threads of its own if there is none.

    Args:
        options: of the graph.
        threads: the number of threads; None for one per core.
        wait_actively: whether own threads wait actively after a run. They must not if another graph runs next.
    """
    if _sharing:
        _make_pool(threads or 0)
        options.use_per_session_threads = False
        return
    if threads:
        options.intra_op_num_threads = threads
    if not wait_actively:
        options.add_session_config_entry("session.force_spinning_stop", "1")


def _make_pool(threads: int) -> None:
    global _made
    import onnxruntime as ort

    with _lock:
        if not _made:
            ort.set_global_thread_pool_sizes(threads, 1)
            _made = True
