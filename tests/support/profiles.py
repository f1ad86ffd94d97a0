"""How many examples hypothesis tries: 25, the same every time, or with
``HYPOTHESIS_PROFILE=nightly`` 300, other ones each time."""

import os

from hypothesis import settings

# Derandomised: a failure is somebody's change, not somebody's luck. No deadline: a busy machine is
# no failure.
settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=300, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def fewer(times: int) -> settings:
    """For a test whose examples are dear: the profile's number divided by ``times``."""
    return settings(max_examples=settings.default.max_examples // times)
