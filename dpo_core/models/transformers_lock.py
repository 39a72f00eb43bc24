"""The one gate to transformers: one thread at a time, and no word on the terminal."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ONE_THREAD = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """One thread at a time, without transformers' own progress bars and advice; errors are raised anyway.

    transformers imports its parts when they are first asked for, in circles, so that a second thread may find
    halves of them; and it changes how modules are made for all threads while it loads one: two at once lose
    weights. So what may be the first import of a part stands inside, too.
    """
    with _ONE_THREAD:
        from transformers.utils import logging

        from dpo_core.models.accelerator import name_accelerator

        name_accelerator()  # transformers imports DeepSpeed
        verbosity = logging.get_verbosity()
        bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
