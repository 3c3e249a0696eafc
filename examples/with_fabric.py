"""A model of transformers in a loop of Lightning Fabric, its sequences split over ranks.

torchrun --nproc-per-node 2 examples/with_fabric.py
python examples/with_fabric.py                         # one process: the same losses
"""

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lasp

SEQUENCE_RANKS, ACCUMULATE = 2, 2


class SequenceStrategy(DDPStrategy):
    """DDP over dp x sp. Samples are dealt by the place in data parallelism: ranks of a sequence get the same."""

    mesh: DeviceMesh

    @property
    def distributed_sampler_kwargs(self):
        """What Fabric gives to the sampler that it puts into a loader."""
        places = self.mesh["dp_shard"]
        return {"num_replicas": places.size(), "rank": places.get_local_rank()}


env = lasp.init()
mesh = lasp.init_mesh(dp_shard=-1, sp=min(SEQUENCE_RANKS, env.world_size))
strategy = SequenceStrategy(process_group_backend="gloo" if env.device.type == "cpu" else "nccl")
strategy.mesh = mesh
fabric = Fabric(
    accelerator="cpu" if env.device.type == "cpu" else "cuda",
    devices=env.local_world_size,
    num_nodes=env.world_size // env.local_world_size,
    strategy=strategy if env.world_size > 1 else "auto",
    plugins=LightningEnvironment(),  # the processes are there already
)
fabric.launch()

torch.manual_seed(0)  # the same weights on every rank
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)
lasp.parallelize(model, mesh["sp"])
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))

texts = [torch.randint(64, (8,), generator=torch.Generator().manual_seed(n)).repeat(25)[: 180 + n] for n in range(16)]
samples = [{"input_ids": text} for text in texts]
loader = fabric.setup_dataloaders(DataLoader(samples, batch_size=1))  # type: ignore[arg-type]

for epoch in range(3):
    for step, batch in enumerate(loader):
        local = lasp.shard_batch(batch, mesh)  # this rank's slice, its labels shifted before the cut
        last = (step + 1) % ACCUMULATE == 0
        with fabric.no_backward_sync(model, enabled=not last and env.world_size > 1):
            output = model(input_ids=local["input_ids"], layout=local["layout"])
            loss, tokens = lasp.token_loss(output.logits, local["labels"], mesh=mesh)  # over the tokens of all ranks
            fabric.backward(loss / ACCUMULATE)
        if last:
            norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
            assert norm is not None
            optimizer.step()
            optimizer.zero_grad()
            if env.rank == 0:
                print(f"epoch {epoch}, step {step}: loss {loss.item():.6f}, gradient norm {norm.item():.6f}")
if env.rank == 0:
    print(f"norm of the weights {sum(p.double().pow(2).sum() for p in model.parameters()) ** 0.5:.6f}")
torch.distributed.destroy_process_group()
