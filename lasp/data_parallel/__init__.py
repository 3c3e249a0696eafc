"""Data parallelism beside sequence parallelism, over `lasp.grad_mesh`. One file a scheme.

`lasp.data_parallel(model, mesh, scheme=.., optimizer=..)` takes one by its name: this package is that function, too.
"""

import inspect
import sys
import types

from lasp.data_parallel.co2 import CO2
from lasp.data_parallel.ddp import wrap_ddp
from lasp.data_parallel.fsdp2 import wrap_fsdp2
from lasp.data_parallel.legacy import average_after_backward
from lasp.data_parallel.manual import sync_grads
from lasp.data_parallel.once import no_sync
from lasp.data_parallel.schemes import data_parallel

__all__ = ["CO2", "average_after_backward", "data_parallel", "no_sync", "sync_grads", "wrap_ddp", "wrap_fsdp2"]


class _Package(types.ModuleType):
    """A module that can be called: `lasp.data_parallel` is a function for who has one model to wrap, and
    `lasp.data_parallel.wrap_ddp` and the files of this package are where they were."""

    __call__ = staticmethod(data_parallel)
    __signature__ = inspect.signature(data_parallel)


sys.modules[__name__].__class__ = _Package
