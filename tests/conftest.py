"""Settings shared by all tests. Fixtures live beside the tests that use them; the simulated world is the fake."""

import os

from hypothesis import settings

# No deadline: one example's wall time says more about the machine's other work than about the code.
settings.register_profile("dev", deadline=None)
# Where a change is judged, the examples are the same in every run, and a failure prints how to replay it.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
