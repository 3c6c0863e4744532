"""Several processes as one run: how they start, what they tell each other, how they end together.

A process is called a host here, as most clusters start one on each; the first is number 0.
"""

from jaxft.distributed.launch import refuse_several, require_joined, together
from jaxft.distributed.talk import (
    barrier,
    check_same,
    count,
    everywhere,
    first_host_first,
    from_all,
    from_first,
    host_name,
    hosts_that_do_not_see,
    is_first,
    is_first_on_machine,
    process,
    require_shared,
)
from jaxft.distributed.watch import sigterm_is_answered

__all__ = [
    "barrier",
    "check_same",
    "count",
    "everywhere",
    "first_host_first",
    "from_all",
    "from_first",
    "host_name",
    "hosts_that_do_not_see",
    "is_first",
    "is_first_on_machine",
    "process",
    "refuse_several",
    "require_joined",
    "require_shared",
    "sigterm_is_answered",
    "together",
]
