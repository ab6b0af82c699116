"""What all tests share."""

import os

# pytest-xdist runs a process for each core; more threads in each would only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
