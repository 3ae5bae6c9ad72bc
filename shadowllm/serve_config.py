"""Configuration of serving: the engine's sizes, and the server's address and limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shadowllm.config_fields import check_values, option
from shadowllm.errors import UserError


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine that serves many sequences at once.

    Attributes:
        slots: sequences that are computed at the same time.
        queue: requests that may wait for a slot; more are refused at once.
        prefill_chunk: prompt tokens of one step; the other sequences go on between two chunks.
        cache_positions: tokens that the running sequences may have together, prompts and new tokens; a request waits
            until its own fit. None is as many as the slots hold.

    Raises:
        UserError: a number is outside its limits.
    """

    slots: int = option(4, metavar="N", least=1, most=1024, called="the number of slots")
    queue: int = option(64, metavar="N", least=0, most=1 << 16, called="the length of the queue")
    prefill_chunk: int = option(256, metavar="N", least=1, called="the number of prompt tokens of one step")
    cache_positions: int | None = option(
        None, metavar="N", least=1, otherwise="as many as the slots hold", called="the number of cache positions"
    )

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class ServeConfig:
    """The server's address, and the limits of a request.

    Attributes:
        host: address to listen on; the default can be reached from this machine only.
        port: TCP port; 0 takes a free one.
        model_name: name of the model for clients.
        api_keys: file with one key per line; a request needs one of them. Without it no key is needed.
        max_body: bytes of a request's body.
        max_prompt_tokens: tokens of a prompt; None is the number of the model's positions.
        max_tokens: new tokens of a text.
        max_choices: texts of one request, prompts times n.
        max_stops: stop strings of one request.
        max_stop_length: characters of a stop string.
        request_timeout: seconds that a request may take, waiting included.
        transfer_timeout: seconds in which a client must send its request, and take what is sent to it.
        grace: seconds that running requests have to finish when the server stops.

    Raises:
        UserError: a number is outside its limits, or the address or the model's name is empty.
    """

    host: str = option("127.0.0.1", metavar="ADDRESS")
    port: int = option(8000, least=0, most=65535, called="the port")
    model_name: str | None = option(None, metavar="NAME", otherwise="the name in the bundle")
    api_keys: Path | None = option(None, metavar="FILE")
    max_body: int = option(1 << 20, metavar="BYTES", least=1)
    max_prompt_tokens: int | None = option(None, metavar="N", least=1, otherwise="the model's positions")
    max_tokens: int = option(1024, metavar="N", least=1)
    max_choices: int = option(8, metavar="N", least=1, most=128)
    max_stops: int = option(4, metavar="N", least=0, most=64)
    max_stop_length: int = option(128, metavar="N", least=1)
    request_timeout: float = option(600.0, metavar="SECONDS")
    transfer_timeout: float = option(30.0, metavar="SECONDS")
    grace: float = option(30.0, metavar="SECONDS")

    def __post_init__(self) -> None:
        check_values(self)
        if not self.host:
            raise UserError("the address to listen on is empty", "give one, or leave out --host")
        if self.model_name == "":
            raise UserError("the name of the model is empty", "give one, or leave out --model-name")
        for name in ("request_timeout", "transfer_timeout", "grace"):
            seconds = getattr(self, name)
            if not 0 < seconds < 1e6:
                raise UserError(f"{name} is {seconds}", "give a number of seconds above 0 and below a million")
