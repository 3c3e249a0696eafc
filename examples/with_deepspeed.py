"""DeepSpeed's engine around a model whose sequences are split: its ZeRO averages over all ranks, dp x sp.

    pip install deepspeed      # tried: 0.19.8 on 2 CPU ranks with DS_ACCELERATOR=cpu, without its shm extension
    torchrun --nproc-per-node 2 examples/with_deepspeed.py 2

The number is the stage. Its data-parallel group is the world, so tp must be 1. On CPUs DeepSpeed compiles an extension
at its first start, for minutes; one that is killed meanwhile leaves a lock on which the next waits without end.
"""

import sys

import deepspeed  # type: ignore[import-not-found]
import torch

import lasp
from lasp.models import TNL, TNLConfig

env = lasp.init()  # before deepspeed.initialize, which takes the process group as it is
mesh = lasp.init_mesh(sp=env.world_size)
torch.manual_seed(0)
model = lasp.parallelize(TNL(TNLConfig.named("tiny", vocab_size=256)).to(env.device), mesh)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": int(sys.argv[1]) if len(sys.argv) > 1 else 2},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 1.0,
}
adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config, dist_init_required=False)
ids = torch.randint(256, (1, 1001), generator=torch.Generator().manual_seed(0)).to(env.device)
for step in range(10):
    local = lasp.shard_batch({"input_ids": ids}, mesh)
    logits = engine(local["input_ids"], local["position_ids"], local["layout"])
    loss, _ = lasp.token_loss(logits, local["labels"], mesh=mesh)
    engine.backward(loss)
    engine.step()
    if env.rank == 0:
        print(f"step {step}: loss {loss.item():.4f}")
torch.distributed.destroy_process_group()
