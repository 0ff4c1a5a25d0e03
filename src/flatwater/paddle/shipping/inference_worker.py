"""Paddle Inference for another process, which :mod:`flatwater.paddle.shipping.inference` is. Not for people to start.

Takes requests from the connection whose file descriptor is the first argument, until it closes or nothing comes for
:data:`IDLE` seconds. An answer is whether it failed, and what came of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["IDLE", "load", "main"]

IDLE = 60.0
"""Seconds after which nobody is expected to ask any more, and some 300 MB are given back."""


def load(program: str, parameters: str, ir: bool, onednn: bool) -> Callable[[list[Any]], list[Any]]:
    """A predictor, as a function of its inputs in order."""
    from paddle import inference

    config = inference.Config(program, parameters)
    config.disable_glog_info()
    config.switch_ir_optim(ir)
    if onednn:
        config.enable_mkldnn()
    else:
        config.disable_mkldnn()
    predictor = inference.create_predictor(config)
    names = predictor.get_input_names()

    def run(arrays: list[Any]) -> list[Any]:
        for name, array in zip(names, arrays, strict=True):
            handle = predictor.get_input_handle(name)
            handle.reshape(array.shape)
            handle.copy_from_cpu(array)
        predictor.run()
        return [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]

    return run


def main() -> None:
    """Answer requests."""
    # A script's folder is on the path, where its neighbours would stand for packages of their names.
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    connection = Connection(int(sys.argv[1]))
    loaded: dict[int, Callable[[list[Any]], list[Any]]] = {}
    try:
        while connection.poll(IDLE):
            kind, number, argument, dropped = connection.recv()
            for one in dropped:
                loaded.pop(one, None)
            answer: Any = None
            try:
                if kind == "load":
                    loaded[number] = load(*argument)
                else:
                    answer = loaded[number](argument)
            except Exception as error:  # it is raised again by whoever asked
                connection.send((True, str(error) or type(error).__name__))
            else:
                connection.send((False, answer))
    except (EOFError, ConnectionError):
        pass  # nobody asks any more


if __name__ == "__main__":
    main()
