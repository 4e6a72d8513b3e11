"""Settings of the whole suite."""

import os

import torch

# The models here are tiny: more threads only wait for each other, and tests run in several processes.
torch.set_num_threads(1)
# No test may reach for a hub; sample models come from package registries and are cached.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
