"""One thread per process: tests run side by side, and threads that wait for each other crawl."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the forks of the tests

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples every time, however busy the machine: a failure is somebody's change, not
# somebody's luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)
