"""Shared by all tests: hypothesis without deadlines, since CI machines are slow and shared."""

import hypothesis
import torch

hypothesis.settings.register_profile("sightline", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("sightline")

# The tensors of the tests are tiny: a second thread only waits for the first, badly so on a busy machine.
torch.set_num_threads(1)
