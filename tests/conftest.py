"""For every test, and the programs that tests start."""

import os

# No test depends on the hub, which would be asked again and again for half a minute where it cannot be reached. Read
# when the hub's library is imported, so it comes before any test's imports.
os.environ["HF_HUB_OFFLINE"] = "1"
