"""Settings that all tests share."""

import os

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from hypothesis import settings

# Examples are the same in every run; first calls import libraries, so examples have no deadline.
settings.register_profile("chunkrestore", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("chunkrestore")
