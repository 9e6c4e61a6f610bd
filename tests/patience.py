"""How long the tests wait for what has to happen.

Only a test that fails waits that long, so this is far more than a busy machine needs. No test is
about the time something takes; what is to happen late, or not at all, has a deadline of its own.
"""

from __future__ import annotations

#: For threads, processes and answers, in seconds.
PATIENCE = 120
