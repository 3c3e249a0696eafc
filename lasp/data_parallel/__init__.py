"""Data parallelism beside sequence parallelism, over `lasp.grad_mesh`. One file a scheme."""

from lasp.data_parallel.co2 import CO2
from lasp.data_parallel.ddp import wrap_ddp
from lasp.data_parallel.fsdp2 import wrap_fsdp2
from lasp.data_parallel.manual import sync_grads

__all__ = ["CO2", "sync_grads", "wrap_ddp", "wrap_fsdp2"]
