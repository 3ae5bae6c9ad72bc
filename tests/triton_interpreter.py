"""Makes Triton's interpreter faster, in which kernels run where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def patch_once_per_launch() -> None:
    """Let the interpreter replace the functions of `triton.language` once per launch.

    Triton 3.9 replaces them at the start of a launch and again at each call of a device function. That takes most of
    the time of a launch and changes nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    done: set[str] = set()  # modules whose functions are replaced until the end of the launch

    @cache
    def seen_by(function: Callable[..., Any]) -> frozenset[str]:
        """The modules in which the interpreter replaces functions for this one."""
        return frozenset(one.__name__ for one in (tl, tl.core) if any(one is v for v in function.__globals__.values()))

    def patch(function: Callable[..., Any]) -> Any:
        if seen_by(function) <= done:
            return None  # the call of a device function, which does not use the result
        done.update(seen_by(function))
        scope = original(function)
        restore = scope.restore

        def end() -> None:
            done.clear()
            restore()

        scope.restore = end
        return scope

    interpreter._patch_lang = patch
