"""A gRPC client that goes away in the middle: `python triton_client.py ADDRESS REQUESTS TOKENS`.

Every second request is a stream. It runs in the environment of Triton Inference Server, because ``tritonclient`` needs
another version of protobuf.
"""

from __future__ import annotations

import json
import queue
import sys

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput


def given(name, text):
    found = InferInput(name, [1], "BYTES")
    found.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return found


def main(address, requests, tokens):
    client, responses = InferenceServerClient(address), queue.Queue()
    client.start_stream(lambda result, error: responses.put((result, error)))
    for place in range(int(requests)):
        parameters = json.dumps({"max_tokens": int(tokens), "stream": place % 2 == 0})
        client.async_stream_infer("small", [given("text_input", "Hello"), given("sampling_parameters", parameters)])
    for _ in range(3):
        result, error = responses.get(timeout=60)
        assert error is None, error
        assert result.as_numpy("finish_reason")[0] == b""
    client.stop_stream(cancel_requests=True)


main(*sys.argv[1:])
