"""Shared by all tests: hypothesis without deadlines, since CI machines are slow and shared."""

import hypothesis

hypothesis.settings.register_profile("sightline", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("sightline")
