"""Serialises calls into transformers and silences its output."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold the lock around transformers, without its progress bars and warnings; errors are raised as usual.

    transformers imports its modules lazily and in circles, so that a second thread can see half-imported
    ones; and while it loads a model it patches module creation for all threads, so that two loads at once
    lose weights. An import that may be a module's first one belongs inside, too.
    """
    with _LOCK:
        from transformers.utils import logging  # noqa: PLC0415 - see transformers_lock

        from dpo_core.models.accelerator import set_accelerator  # noqa: PLC0415 - loads torch

        set_accelerator()  # before transformers imports DeepSpeed
        verbosity = logging.get_verbosity()
        loud = verbosity < logging.ERROR  # setting a level empties the caches of all loggers
        bars = logging.is_progress_bar_enabled()
        if loud:
            logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if loud:
                logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
