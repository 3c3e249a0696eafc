"""Your own model, trained with its sequences split over ranks.

torchrun --nproc-per-node 2 examples/minimal.py
python examples/minimal.py                         # one process: the same losses
"""

import torch
from torch import nn

import lasp


@lasp.register
class MyAttention(nn.Module):
    """Linear attention with a residual connection: x + out(norm(softmax(q) sum softmax(k)^T v))."""

    sequence = None  # lasp.parallelize sets it

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        """This rank's tokens [batch, tokens, width] to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [batch, tokens, heads, channels]
        o, _ = lasp.linear_attention(q.softmax(-1), k.softmax(-1), v, sequence=self.sequence)
        return x + self.out(nn.functional.rms_norm(o.flatten(2), x.shape[-1:]))


env = lasp.init()  # torchrun, mpirun, srun, or one process
mesh = lasp.init_mesh(dp_shard=1, sp=-1)
torch.manual_seed(0)  # the same weights on every rank
model = nn.Sequential(nn.Embedding(16, 64), MyAttention(64, 4), MyAttention(64, 4), nn.Linear(64, 16)).to(env.device)
lasp.parallelize(model, mesh["sp"])

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
batch = {"input_ids": torch.randint(16, (4, 8), device=env.device).repeat(1, 128)}  # [4, 1024], of period 8
local = lasp.shard_batch(batch, mesh)  # this rank's slice, its labels shifted before the cut
for step in range(31):
    loss, _ = lasp.token_loss(model(local["input_ids"]), local["labels"], mesh=mesh)  # the mean over all ranks
    optimizer.zero_grad()
    loss.backward()
    lasp.sync_grads(model, mesh)
    optimizer.step()
    if env.rank == 0 and step % 5 == 0:
        print(f"step {step:2d}: loss {loss.item():.4f} on {env.world_size} rank(s)")
torch.distributed.destroy_process_group()
